"""Every step of a push, and everything that can happen to it; the table is made by a run.

``make test-faults`` runs the rows marked ``faults`` too, and writes the table.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from servers import CPU_SERVER_ARGS, needs, perturb, worst_error
from test_launch import descendants

from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
    SGLangWeightSyncScheme,
    Timeouts,
    WeightSyncConfig,
)
from torchrl_sglang.errors import (
    EngineLostError,
    PushError,
    PushTimeoutError,
    ServiceBrokenError,
)
from torchrl_sglang.weights.payload import Payloads
from torchrl_sglang.weights.threads import in_thread

PROMPTS = [[5, 6, 7], [300, 301, 302, 303], list(range(40, 60))]
SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}
SHORT = Timeouts(control_s=2.0, transfer_s=2.0, group_s=3.0, request_s=60.0)
CONFIG = WeightSyncConfig(bucket_bytes=1 << 18)
WITHIN_S = 5.0
LAST = -1  # the last bucket

ROUTES = {
    "init": "/init_weights_update_group",
    "pause": "/pause_generation",
    "flush": "/flush_cache",
    "begin": "/begin_weight_update",
    "transfer": "/update_weights_from_distributed",
    "end": "/end_weight_update",
    "verify": "/weights_checker",
    "version": "/update_weight_version",
    "continue": "/continue_generation",
}
FAULTS: dict[str, tuple[dict[str, Any], type[PushError]]] = {
    "400": ({"status": 400}, PushError),
    "500": ({"status": 500}, PushError),
    "no answer": ({"delay_s": 60.0}, PushTimeoutError),
    "cut": ({"cut": True}, PushError),
    "answer lost": ({"lose": True}, PushError),
}
# What test_weights.py runs each time is not run twice.
PLACES: list[tuple[str, int | None]] = [
    *((step, None) for step in ROUTES if step != "transfer"),
    *(("transfer", bucket) for bucket in (0, 1, LAST)),
]
ALWAYS = [
    ("begin", None, "no answer"),
    ("transfer", 1, "no answer"),
    ("verify", None, "no answer"),
    ("version", None, "answer lost"),
    ("continue", None, "answer lost"),
]
ROWS = [
    pytest.param(step, bucket, fault, marks=[] if each in ALWAYS else [pytest.mark.faults])
    for step, bucket in PLACES
    for fault in FAULTS
    if (each := (step, bucket, fault))
]


@pytest.fixture(scope="module")
def report() -> Iterator[list[str]]:
    """Rows of the table; written where ``FAULTS_REPORT`` names a file."""
    rows: list[str] = []
    yield rows
    if path := os.environ.get("FAULTS_REPORT"):
        head = "| step | bucket | fault | error | after | state | next full push |\n"
        Path(path).write_text(head + "|---" * 7 + "|\n" + "\n".join(rows) + "\n")


@pytest.fixture
def impatient(
    proxy: FaultProxy, shared_service: AsyncSGLang, restore_weights: None
) -> Iterator[AsyncSGLang]:
    """A service that reaches the shared server through the proxy, and does not wait long."""
    keys = shared_service._keys
    with AsyncSGLang.connect(
        proxy.url, api_key=keys.api_key, admin_api_key=keys.admin_api_key, timeouts=SHORT
    ) as external:
        yield external


@pytest.fixture
def scheme(impatient: AsyncSGLang) -> Iterator[SGLangWeightSyncScheme]:
    made = SGLangWeightSyncScheme(impatient, config=CONFIG)
    made.connect_once()
    yield made
    made.close()


def repaired(service: AsyncSGLang, scheme: SGLangWeightSyncScheme, model: Any) -> float:
    """Seconds of the next full push, after which everything is as it should be."""
    begun = time.monotonic()
    scheme.send(model)
    took = time.monotonic() - begun
    assert service.state is ServiceState.SYNCED
    assert worst_error(model, PROMPTS, service.generate(PROMPTS, SAMPLING)) < 0.02
    return took


@pytest.mark.parametrize(("step", "bucket", "fault"), ROWS)
def test_a_server_that_fails(
    impatient: AsyncSGLang,
    scheme: SGLangWeightSyncScheme,
    proxy: FaultProxy,
    model: Any,
    report: list[str],
    step: str,
    bucket: int | None,
    fault: str,
) -> None:
    if step in ("begin", "end", "flush"):
        needs(impatient, "update_session")
    if bucket == LAST:
        scheme.send(model)
        bucket = scheme.last_push.num_buckets - 1  # type: ignore[union-attr]
    if step == "init":  # joining is a step of a push only after a failure
        scheme.pusher._drop()
    given, expected = FAULTS[fault]
    proxy.faults[ROUTES[step]] = Fault(**given, after=bucket or 0)
    perturb(model, seed=41)
    begun = time.monotonic()
    with pytest.raises(PushError) as caught:
        scheme.send(model)
    took = time.monotonic() - begun
    error = caught.value
    assert took < WITHIN_S
    assert type(error) is expected
    assert (error.engine, error.step, error.bucket) == (proxy.url, step, bucket)
    assert impatient.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError, match=step):
        impatient.generate(PROMPTS, SAMPLING)
    proxy.faults.clear()
    again = repaired(impatient, scheme, model)
    report.append(
        f"| {step} | {'' if bucket is None else bucket} | {fault} | {type(error).__name__} | "
        f"{took:.2f} s | broken | succeeds, {again:.2f} s |"
    )


def test_a_silent_server_with_the_usual_bounds(
    proxy: FaultProxy, shared_service: AsyncSGLang, model: Any, restore_weights: None
) -> None:
    keys = shared_service._keys
    with AsyncSGLang.connect(
        proxy.url, api_key=keys.api_key, admin_api_key=keys.admin_api_key
    ) as service:
        scheme = SGLangWeightSyncScheme(service, config=CONFIG)
        scheme.connect_once()
        scheme.send(model)
        proxy.faults[ROUTES["pause"]] = Fault(delay_s=60.0)
        begun = time.monotonic()
        with pytest.raises(PushTimeoutError, match="has to be started again") as caught:
            scheme.send(model)
        assert time.monotonic() - begun < WITHIN_S
        assert (caught.value.engine, caught.value.step) == (proxy.url, "pause")
        proxy.faults.clear()
        repaired(service, scheme, perturb(model, seed=47))
        scheme.close()


@pytest.mark.parametrize("index", [0, 2])
def test_a_trainer_that_raises_in_mid_push(
    impatient: AsyncSGLang,
    scheme: SGLangWeightSyncScheme,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    report: list[str],
    index: int,
) -> None:
    flattened = Payloads._flattened

    def raise_at(payloads: Payloads, number: int, bucket: Any) -> Any:
        if number == index:
            raise MemoryError("no memory for the test")
        return flattened(payloads, number, bucket)

    begun = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(Payloads, "_flattened", raise_at)
        with pytest.raises(PushError, match="no memory for the test") as caught:
            scheme.send(perturb(model, seed=42))
    took = time.monotonic() - begun
    assert took < WITHIN_S
    assert (caught.value.engine, caught.value.step) == (None, "transfer")
    assert caught.value.bucket == index
    assert impatient.state is ServiceState.BROKEN
    again = repaired(impatient, scheme, model)
    report.append(
        f"| transfer | {index} | the trainer raises | PushError | {took:.2f} s | broken | "
        f"succeeds, {again:.2f} s |"
    )


# Deaths

TRAINER = """
import pickle, sys, time
from transformers import AutoModelForCausalLM
from torchrl_sglang import SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.weights.payload import Payloads
service, path = pickle.loads(bytes.fromhex(sys.argv[1]))
flattened = Payloads._flattened

def stall(payloads, index, bucket):
    if index == 1:
        time.sleep(0.5)  # by now the server was told of this bucket, and waits for it
        print("in the middle", flush=True)
        time.sleep(60)
    return flattened(payloads, index, bucket)

Payloads._flattened = stall
scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(bucket_bytes=1 << 18))
scheme.connect_once()
scheme.send(AutoModelForCausalLM.from_pretrained(path))
"""


def test_a_trainer_that_is_killed_in_mid_push(
    service: AsyncSGLang,
    attached: AsyncSGLang,
    model: Any,
    model_path: Path,
    restore_weights: None,
    report: list[str],
) -> None:
    """The server waits for a bucket that never comes; a new trainer gets it back.

    Who asks meanwhile waits, and is answered by the new trainer's weights.
    """
    told = pickle.dumps((attached, str(model_path))).hex()
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, told], stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "in the middle\n"
        trainer.kill()
    pending = in_thread(lambda: service.generate(PROMPTS, SAMPLING), "test")
    with pytest.raises(TimeoutError):
        pending.result(0.5)
    begun = time.monotonic()
    scheme = SGLangWeightSyncScheme(attached, config=CONFIG)
    scheme.connect_once()
    repaired(attached, scheme, perturb(model, seed=43))
    took = time.monotonic() - begun
    assert worst_error(model, PROMPTS, pending.result(20.0)) < 0.02
    scheme.close()
    assert took < 30.0
    report.append(
        "| transfer | 1 | the trainer is killed | none is left to see one | | servers paused, "
        f"requests wait | of a new trainer: succeeds, {took:.2f} s; they are answered then |"
    )


@pytest.fixture
def two(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    with AsyncSGLang.from_pretrained(
        str(model_path),
        num_replicas=2,
        device="cpu",
        timeouts=timeouts,
        **CPU_SERVER_ARGS,
    ) as service:
        yield service


def schedulers(pid: int) -> list[Any]:
    """The processes of a server that hold its weights."""
    return [each for each in descendants(pid) if "scheduler" in " ".join(each.cmdline())]


def killing(
    service: AsyncSGLang, url: str, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    """From now on a push kills a server, or a part of it, between its first bucket and second."""
    fleet = service._local.fleet
    assert fleet is not None
    name = f"server-{fleet.server_urls.index(url)}"
    [child] = [child for child in fleet._children if child.name == name]
    flattened, killed = Payloads._flattened, threading.Event()

    def kill_at(payloads: Payloads, index: int, bucket: Any) -> Any:
        if index == 1 and not killed.is_set():
            killed.set()
            if whole:
                os.killpg(child.pid, signal.SIGKILL)
            else:
                schedulers(child.pid)[0].kill()
            time.sleep(0.2)
        return flattened(payloads, index, bucket)

    monkeypatch.setattr(Payloads, "_flattened", kill_at)


def test_servers_that_are_killed_in_mid_push(
    two: AsyncSGLang, model: Any, monkeypatch: pytest.MonkeyPatch, report: list[str]
) -> None:
    """One of two is reported and left out, if the user allows it; the last one is an error.

    Of the first only the process that has the weights dies: it still takes connections then, and
    the other server is the first to notice.
    """
    first, second = (worker.url for worker in two.workers)
    config = WeightSyncConfig(bucket_bytes=1 << 18, lost_engines="drop")
    scheme = SGLangWeightSyncScheme(two, config=config)
    scheme.connect_once()
    scheme.send(model)
    assert scheme.last_push.lost_engines == ()  # type: ignore[union-attr]
    with monkeypatch.context() as patched:
        killing(two, second, patched, whole=False)
        begun = time.monotonic()
        scheme.send(perturb(model, seed=44))
        took = time.monotonic() - begun
    assert took < WITHIN_S + 5.0  # with the push to the one that is left
    push = scheme.last_push
    assert push is not None
    assert (push.lost_engines, push.verified_by) == ((second,), "checksum")
    assert [worker.url for worker in two.workers] == [first]
    repaired(two, scheme, perturb(model, seed=45))
    report.append(
        "| transfer | 1 | the scheduler of one of two servers is killed, lost_engines='drop' | | "
        f"{took:.2f} s | synced | of the other alone: the same one |"
    )
    with monkeypatch.context() as patched:
        killing(two, first, patched, whole=True)
        begun = time.monotonic()
        with pytest.raises(EngineLostError) as caught:
            scheme.send(perturb(model, seed=46))
        took = time.monotonic() - begun
    assert took < WITHIN_S
    assert (caught.value.engine, caught.value.step) == (first, "transfer")
    assert two.state is ServiceState.BROKEN
    begun = time.monotonic()
    scheme.close()
    assert time.monotonic() - begun < 10.0
    report.append(
        f"| transfer | 1 | the server is killed | EngineLostError | {took:.2f} s | broken | "
        "none, while it is gone |"
    )
