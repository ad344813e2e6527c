"""What fails in a push over NCCL, how soon it is an error, and what brings the servers back.

    python benchmarks/check_gpu_faults.py --out benchmarks/results/faults_gpu.json
    python benchmarks/check_gpu_faults.py --faults killed stuck

A trainer on GPU 0 pushes into a managed server on GPU 1, which starts anew for each fault. The same
and many more over gloo are in ``make test-faults``. With ``--device cpu`` over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from gpu_checks import about, error, make_dense, perturb, sending_device, serve

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import RequestRefusedError, ServiceError, SGLangError
from torchrl_sglang.weights.carry.payload import Payloads

BUCKET_BYTES = 1 << 20
ASKED_S = 12.0
TOLERANCE = 0.1  # of log-probs

TRAINER = """
import pickle, sys, time
import torch
from transformers import AutoModelForCausalLM
from torchrl_sglang import SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.weights.carry.payload import Payloads
service, path, device = pickle.loads(bytes.fromhex(sys.argv[1]))
flattened = Payloads._flattened

def stall(payloads, index, bucket):
    if index == 1:
        time.sleep(1.0)  # by now the server was told of this bucket, and waits for it
        print("in the middle", flush=True)
        time.sleep(60)
    return flattened(payloads, index, bucket)

Payloads._flattened = stall
config = WeightSyncConfig(bucket_bytes=1 << 20, layout="flattened")
scheme = SGLangWeightSyncScheme(service, device=device, config=config)
scheme.connect()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
scheme.send(model.to(device or "cpu"))
"""


class Case:
    """A server, a trainer's model, and what is found out about a fault."""

    def __init__(self, service: AsyncSGLang, model: Any, folder: str) -> None:
        self.service = service
        self.model = model
        self.folder = folder
        self.device = sending_device(model)
        self.found: dict[str, Any] = {}

    def scheme(self, **config: Any) -> SGLangWeightSyncScheme:
        made = SGLangWeightSyncScheme(
            self.service,
            device=self.device,
            config=WeightSyncConfig(
                bucket_bytes=BUCKET_BYTES, layout="flattened", probe_tolerance=0.1, **config
            ),
        )
        made.init_on_sender()
        return made

    def failing(self, what: Callable[[], Any]) -> None:
        """Records what a call raises, and how soon."""
        start = time.perf_counter()
        try:
            what()
            raised, said = "nothing", ""
        except SGLangError as caught:
            place = [getattr(caught, name, None) for name in ("step", "bucket", "engine")]
            raised, said = f"{type(caught).__name__} {place}", str(caught)
        self.found |= {
            "raised": raised,
            "message": said,
            "raised_after_s": round(time.perf_counter() - start, 2),
            "state": self.service.state.value,
        }

    def answers(self) -> None:
        """Records whether the server's scheduler answers after the fault."""
        start = time.perf_counter()
        try:
            self.service.workers[0].server_info(ASKED_S)
            said = "yes"
        except ServiceError as caught:
            said = f"no: {caught}"[:200]
        took = round(time.perf_counter() - start, 2)
        self.found |= {"server_info_answers": said, "asked_s": took}

    def repairing(self, scheme: SGLangWeightSyncScheme) -> None:
        """Records what the next push does, and that it arrived."""
        perturb(self.model)
        start = time.perf_counter()
        scheme.send(self.model)
        took = round(time.perf_counter() - start, 2)
        push = scheme.last_push
        self.found |= {
            "repaired_after_s": took,
            "restarted": len(push.restarted_engines),
            "steps_s": {step: round(s, 3) for step, s in push.step_s.items()},
            "state_then": self.service.state.value,
            "error_then": error(self.service, self.model),
        }

    @property
    def pid(self) -> int:
        fleet = self.service.servers.fleet
        assert fleet is not None
        [child] = [child for child in fleet._children if child.name == "server-0"]
        return child.pid


@contextlib.contextmanager
def at_bucket(index: int, act: Callable[[], None]) -> Iterator[None]:
    """Does something once, when the trainer makes this bucket."""
    flattened, done = Payloads._flattened, []

    def acting(payloads: Payloads, number: int, bucket: Any) -> Any:
        if number == index and not done:
            done.append(True)
            act()
        return flattened(payloads, number, bucket)

    Payloads._flattened = acting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Payloads._flattened = flattened  # type: ignore[method-assign]


def connected(case: Case, **config: Any) -> SGLangWeightSyncScheme:
    scheme = case.scheme(**config)
    scheme.connect()
    scheme.send(case.model)
    return scheme


def refused(case: Case) -> None:
    """An announcement is refused while the trainer is in the broadcast already."""
    scheme = connected(case)
    worker = case.service.workers[0]

    def refuse(*_: Any, **__: Any) -> None:
        time.sleep(0.5)  # by now the trainer waits in NCCL
        raise RequestRefusedError("refused for the test", status=400)

    worker.announce = refuse  # type: ignore[method-assign]
    try:
        case.failing(lambda: scheme.send(perturb(case.model)))
    finally:
        del worker.announce  # type: ignore[attr-defined]
    case.answers()
    case.repairing(scheme)
    scheme.close()


def raises(case: Case) -> None:
    """The trainer runs out of memory in the middle; the server waits for its next bucket."""
    scheme = connected(case)

    def fail() -> None:
        time.sleep(0.5)  # by now the server waits in NCCL
        raise MemoryError("no memory for the test")

    with at_bucket(1, fail):
        case.failing(lambda: scheme.send(perturb(case.model)))
    case.answers()
    case.repairing(scheme)
    scheme.close()


def killed(case: Case) -> None:
    """The server dies in the middle of a push, which starts it again."""
    scheme = connected(case, lost_engines="restart")
    with at_bucket(1, lambda: os.killpg(case.pid, signal.SIGKILL)):
        case.repairing(scheme)
    scheme.close()


def killed_raise(case: Case) -> None:
    """The server dies in the middle of a push; the next one starts it again."""
    scheme = connected(case)
    with at_bucket(1, lambda: os.killpg(case.pid, signal.SIGKILL)):
        case.failing(lambda: scheme.send(perturb(case.model)))
    case.repairing(scheme)
    scheme.close()


def stuck(case: Case) -> None:
    """The server's scheduler stops in the middle of a push, which starts it again."""
    scheme = connected(case, lost_engines="restart")

    def stop() -> None:
        for process in psutil.Process(case.pid).children(recursive=True):
            if "scheduler" in " ".join(process.cmdline()):
                process.suspend()

    with at_bucket(1, stop):
        case.repairing(scheme)
    scheme.close()


def trainer_killed(case: Case) -> None:
    """The trainer dies in the middle of a push; another one takes over."""
    keys = case.service._keys
    with AsyncSGLang.connect(
        case.service.server_url, api_key=keys.api_key, admin_api_key=keys.admin_api_key
    ) as copied:
        told = pickle.dumps((copied, case.folder, case.device)).hex()
        with subprocess.Popen(
            [sys.executable, "-c", TRAINER, told], stdout=subprocess.PIPE, text=True
        ) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == "in the middle\n"
            trainer.kill()
    case.answers()
    start = time.perf_counter()
    scheme = case.scheme()
    scheme.connect()
    case.found["connected_after_s"] = round(time.perf_counter() - start, 2)
    case.repairing(scheme)
    scheme.close()


def disagree(case: Case) -> None:
    """Server and trainer were started with other NCCL settings (see ``SERVER_ENV``)."""
    scheme = case.scheme()
    case.failing(scheme.connect)
    case.answers()
    by_files = case.scheme(method="disk")
    by_files.connect()
    case.repairing(by_files)
    by_files.close()


SERVER_ENV = {"disagree": {"NCCL_CUMEM_ENABLE": "0"}}
FAULTS: dict[str, Callable[[Case], None]] = {
    case.__name__: case
    for case in (
        refused,
        raises,
        killed,
        killed_raise,
        stuck,
        trainer_killed,
        disagree,
    )
}


def check(name: str, args: argparse.Namespace) -> dict[str, Any]:
    logs = None if args.log_dir is None else args.log_dir / name
    with tempfile.TemporaryDirectory() as folder:
        model = make_dense(folder, "cpu" if args.device == "cpu" else "cuda:0")
        env = SERVER_ENV.get(name, {})
        with serve(folder, args.device, [1], log_dir=logs, server_env=env) as service:
            case = Case(service, model, folder)
            row = {"fault": name, "what": FAULTS[name].__doc__} | about(
                service, args.device, "check_gpu_faults.py"
            )
            try:
                FAULTS[name](case)
            except Exception as failure:  # noqa: BLE001
                traceback.print_exc()
                row["failed"] = f"{type(failure).__name__}: {failure}"[:2000]
            return row | case.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in args.faults:
        rows.append(check(name, args))
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(not all(map(as_it_should_be, rows)))


def as_it_should_be(row: dict[str, Any]) -> bool:
    """What failed was an error, and the push after it arrived."""
    return (
        "failed" not in row
        and row.get("raised") != "nothing"
        and row.get("error_then", 1.0) < TOLERANCE
    )


if __name__ == "__main__":
    main()
