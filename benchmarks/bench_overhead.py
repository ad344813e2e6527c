"""What the client itself costs: from the bytes of the server's answers to a finished TensorDict.

A real server answers a few prompts; its answers, tiled to the batch, are then read and turned into
text, tokens, masks, log-probs, versions and (in history mode) histories again and again, on one
core and with no server in the way. Times are CPU time of the one thread that does it, so that other
work on the machine counts as little as possible; wall time is recorded too. The cost is linear in
rows and in tokens: the plot shows it.

    python benchmarks/bench_overhead.py --out benchmarks/results/overhead_cpu.json \\
        --plot benchmarks/results/overhead_cpu.png
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
os.environ["RAYON_NUM_THREADS"] = "1"

import orjson
import requests
import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from random_models import SIZES, random_model
from tiny_model import make_tiny_model

from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.generate.parse import parse_completions
from torchrl_sglang.policy.call import Sampling
from torchrl_sglang.policy.outputs.writer import RowWriter

MODES = ("history", "text", "tokens")
DISTINCT = 8  # real answers per length; more rows repeat them
QUESTION = "what does the agent do when the reward is late? "


def make_input(mode: str, num_rows: int, prompt_tokens: int, tokenizer: Any) -> TensorDict:
    text = (QUESTION * (prompt_tokens // 4))[: prompt_tokens * 3]
    if mode == "history":
        chats = [[{"role": "user", "content": text}] for _ in range(num_rows)]
        history = ChatHistory(prompt=History.from_chats(chats), batch_size=num_rows)
        return TensorDict(history=history, batch_size=num_rows)
    if mode == "text":
        return TensorDict(
            text=Text(prompt=[text] * num_rows, batch_size=num_rows), batch_size=num_rows
        )
    ids = torch.tensor(tokenizer(text)["input_ids"][:prompt_tokens])
    return lazy_stack(
        [TensorDict(tokens=Tokens(prompt=ids, batch_size=())) for _ in range(num_rows)]
    )


class Answers:
    """Real answers of the server, as bytes, by number of tokens."""

    def __init__(self, service: AsyncSGLang) -> None:
        self._service = service
        self._known: dict[tuple[int, int], list[bytes]] = {}

    def get(self, call: Sampling, new_tokens: int) -> list[bytes]:
        """One answer per request of the call, each with the request's own id."""
        request = call.requests[0]
        key = (len(request.input_ids), new_tokens)
        if key not in self._known:
            url = self._service.server_url + "/generate"
            self._known[key] = [
                requests.post(url, json=replace(request, rid=RID).body(), timeout=600).content
                for _ in range(DISTINCT)
            ]
        known = self._known[key]
        return [
            known[index % DISTINCT].replace(RID.encode(), one.rid.encode())
            for index, one in enumerate(call.requests)
        ]


RID = "0" * 32


def finish(call: Sampling, answers: Sequence[bytes]) -> Any:
    """What the client does with the answers of one call."""
    call = copy(call)  # which remembers nothing of the last time
    call._writer = RowWriter(call._settled, call._options.sampling)
    completions = []
    for answer, request in zip(answers, call.requests, strict=True):
        arrived = parse_completions(orjson.loads(answer), request)
        call.arrive(arrived)
        completions += arrived
    return call.outputs(completions)


def measure(
    policy: SGLangWrapper, answers: Answers, args: argparse.Namespace, num_rows: int, length: int
) -> dict[str, Any]:
    sampling = {"max_new_tokens": length}
    td = make_input(policy.input_mode, num_rows, args.prompt_tokens, policy.tokenizer)
    call = Sampling(td, policy._settled, policy.service, sampling)
    bodies = answers.get(call, length)
    finish(call, bodies)
    times, walls = [], []
    for _ in range(args.repeats):
        gc.collect()
        start, wall = time.thread_time(), time.perf_counter()
        finish(call, bodies)
        times.append(time.thread_time() - start)
        walls.append(time.perf_counter() - wall)
    tokens = num_rows * length
    return {
        "mode": policy.input_mode,
        "padded": policy.pad_output,
        "num_rows": num_rows,
        "new_tokens": length,
        "us_per_token": round(1e6 * statistics.median(times) / tokens, 3),
        "us_per_token_all": [round(1e6 * t / tokens, 3) for t in times],
        "cpu_s": round(statistics.median(times), 4),
        "wall_s": round(statistics.median(walls), 4),
    }


def profile(policy: SGLangWrapper, answers: Answers, args: argparse.Namespace) -> str:
    td = make_input(policy.input_mode, 256, args.prompt_tokens, policy.tokenizer)
    call = Sampling(td, policy._settled, policy.service, {"max_new_tokens": 256})
    bodies = answers.get(call, 256)
    profiler = cProfile.Profile()
    profiler.runcall(finish, call, bodies)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("cumulative").print_stats(35)
    return text.getvalue()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for mode in MODES:
        for padded, style in ((False, "-o"), (True, "--s")):
            points = sorted(
                (r["num_rows"] * r["new_tokens"], r["cpu_s"])
                for r in rows
                if r["mode"] == mode and r["padded"] == padded
            )
            label = f"{mode}, {'padded' if padded else 'ragged'}"
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens in the batch", ylabel="CPU seconds on one core"
    )
    axes.set_title("From JSON to the finished TensorDict")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # run from a checkout that is not installed
        return "from source"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the JSON rows")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    parser.add_argument("--profile", choices=MODES, help="print a profile of 256 x 256 instead")
    parser.add_argument("--url", help="a running server; one is started by default")
    parser.add_argument("--size", choices=SIZES, help="a random model of this size, on a GPU")
    parser.add_argument("--model-dir", type=Path, help="where the random model is kept")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="256 x 256 alone")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    set_list_to_stack(True).set()
    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        service = AsyncSGLang.connect(args.url) if args.url else start(args, folder)
        with service:
            os.sched_setaffinity(0, {core})  # after the servers were started, which keep theirs
            run(args, service)


def start(args: argparse.Namespace, folder: str) -> AsyncSGLang:
    keys = {"api_key": "", "admin_api_key": ""}
    if args.size is None:
        return AsyncSGLang.from_pretrained(str(make_tiny_model(folder)), device="cpu", **keys)
    model = random_model(args.model_dir or Path(folder), args.size, args.gpu)
    return AsyncSGLang.from_pretrained(
        str(model),
        device="cuda",
        cuda_devices=[args.gpu],
        attention_backend="triton",
        sampling_backend="pytorch",
        mem_fraction_static=0.5,
        **keys,
    )


def run(args: argparse.Namespace, service: AsyncSGLang) -> None:
    answers = Answers(service)
    kwargs = {"generate_kwargs": {"ignore_eos": True}, "inplace": False}
    if args.profile:
        policy = SGLangWrapper(service, input_mode=args.profile, **kwargs)
        print(profile(policy, answers, args))
        return
    sizes = (
        [(256, 256)] if args.quick else [(64, 64), (256, 64), (256, 256), (1024, 256), (1024, 512)]
    )
    rows = []
    for mode in MODES:
        for padded in (False, True):
            policy = SGLangWrapper(service, input_mode=mode, pad_output=padded, **kwargs)
            for num_rows, length in sizes:
                rows.append(measure(policy, answers, args, num_rows, length))
                row = rows[-1]
                print(
                    f"{mode:8} {'padded' if padded else 'ragged'} {num_rows:5} x {length:4} "
                    f"{row['us_per_token']:7.2f} us per token  {row['cpu_s']:7.3f} s",
                    flush=True,
                )
    where = {
        "machine": f"{platform.machine()}, {cpu_name()}, one of {os.cpu_count()} cores",
        "model": args.size or "tiny",
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("torchrl-sglang", "sglang", "torchrl", "tensordict", "torch", "orjson")
        },
        "prompt_tokens": args.prompt_tokens,
        "command": " ".join(["python", "benchmarks/bench_overhead.py", *sys.argv[1:]]),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([{**row, **where} for row in rows], indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
