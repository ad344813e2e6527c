"""Generation speed: our wrapper, a bare HTTP client and torchrl's own wrapper, in one run.

All three ask for the same number of tokens with log-probs and are interleaved, so that a noisy
machine disturbs them alike; compare them as ratios. Ours and the bare client go through the router;
torchrl's wrapper can't (it asks the router for a route that it lacks), so it talks to the server
itself, which saves it a hop. The bare client posts all prompts at once over one pool, parses the
JSON and does nothing more: the least that any client can do.

    python benchmarks/bench_generate.py --out benchmarks/results/generate_cpu.json

On a GPU, with a random model of a real size:

    python benchmarks/bench_generate.py --size 0.5b --cases 256x256,1024x512 --prompt-tokens 128 \\
        --torchrl-prompts 16 --forms --samples --out generate_h200.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.modules.llm.policies import SGLangWrapper as TorchRLWrapper
from torchrl.modules.llm.policies import Text

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from random_models import SIZES, random_model
from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper

Run = Callable[[], int]


def make_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab_size, (num_prompts, num_tokens), generator=generator).tolist()


def ours(service: AsyncSGLang, sampling: dict[str, Any], prompts: list[list[int]]) -> Run:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=sampling, inplace=False)
    rows = [TensorDict(tokens=TensorDict(prompt=torch.tensor(ids))) for ids in prompts]
    td = lazy_stack(rows)
    complete, in_service = service.complete, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        completions = complete(*args, **kwargs)
        in_service.append(time.perf_counter() - start)
        return completions

    service.complete = timed  # type: ignore[method-assign]

    def run() -> int:
        start = time.perf_counter()
        out = policy(td)
        outside = time.perf_counter() - start - in_service[-1]
        print(f"ours: {in_service[-1]:.3f} s in the service, {outside:.3f} s beside it", flush=True)
        return sum(len(ids) for ids in out.get(("tokens", "response"), as_list=True))

    return run


class Bare:
    """One pool on one event loop, as long as the benchmark runs."""

    def __init__(self, url: str) -> None:
        self.url = url + "/generate"
        self.loop = asyncio.new_event_loop()
        self.session = self.loop.run_until_complete(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    def runs(self, bodies: list[dict[str, Any]]) -> Run:
        return lambda: self.loop.run_until_complete(self._run(bodies))

    async def _run(self, bodies: list[dict[str, Any]]) -> int:
        return sum(await asyncio.gather(*map(self._post, bodies)))

    async def _post(self, body: dict[str, Any]) -> int:
        data, headers = orjson.dumps(body), {"Content-Type": "application/json"}
        async with self.session.post(self.url, data=data, headers=headers) as response:
            answer = orjson.loads(await response.read())
        answers = answer if isinstance(answer, list) else [answer]
        return sum(len(one["output_ids"]) for one in answers)

    def close(self) -> None:
        self.loop.run_until_complete(self.session.close())
        self.loop.close()


def one_each(prompts: list[list[int]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids, "sampling_params": sampling, "return_logprob": True} for ids in prompts
    ]


def chunked(prompts: list[list[int]], sampling: dict[str, Any], size: int) -> list[dict[str, Any]]:
    return one_each([prompts[i : i + size] for i in range(0, len(prompts), size)], sampling)


def torchrls(
    service: AsyncSGLang, sampling: dict[str, Any], prompts: list[list[int]], tokenizer: Any
) -> Run:
    policy = TorchRLWrapper(
        service.workers[0].url,
        tokenizer=tokenizer,
        input_mode="text",
        # Of what SGLang needs to generate a fixed number of tokens, it passes only this on.
        generate_kwargs={"max_new_tokens": sampling["max_new_tokens"]},
        inplace=False,
    )
    texts = tokenizer.batch_decode(prompts)

    def run() -> int:
        td = TensorDict(text=Text(prompt=texts, batch_size=len(texts)), batch_size=len(texts))
        out = policy(td)
        return sum(len(row) for row in out.get(("log_probs", "response"), as_list=True))

    return run


def measure(
    runs: dict[str, Run], repeats: dict[str, int], before: Callable[[], None]
) -> dict[str, list[float]]:
    """Tokens per second of each repeat, after one warm-up each.

    ``before`` empties the prefix cache: each run computes its prompts, and none evicts another's.
    """
    for run in runs.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(max(repeats.values())):
        for name, run in runs.items():
            if index >= repeats[name]:
                continue
            before()
            start = time.perf_counter()
            num_tokens = run()
            speeds[name].append(num_tokens / (time.perf_counter() - start))
    return speeds


class Benchmark:
    """The cases of one server."""

    def __init__(self, service: AsyncSGLang, tokenizer: Any, args: argparse.Namespace) -> None:
        self.service, self.tokenizer, self.args = service, tokenizer, args
        self.bare = Bare(service.server_url)
        self.direct = Bare(service.workers[0].url)
        self.rows: list[dict[str, Any]] = []

    def prompts(self, count: int, seed: int = 0) -> list[list[int]]:
        return make_prompts(count, self.args.prompt_tokens, len(self.tokenizer), seed)

    def clients(self, num_prompts: int, new_tokens: int) -> None:
        """Ours beside the bare client and torchrl's."""
        sampling = sampling_of(new_tokens)
        prompts = self.prompts(num_prompts)
        few = prompts[: self.args.torchrl_prompts or num_prompts]
        runs = {
            "ours": ours(self.service, sampling, prompts),
            "bare": self.bare.runs(one_each(prompts, sampling)),
        }
        if self.args.torchrl:
            runs["torchrl"] = torchrls(self.service, sampling, few, self.tokenizer)
        self._add(
            "clients",
            num_prompts,
            new_tokens,
            self._measure(runs),
            few,
        )

    def forms(self, num_prompts: int, new_tokens: int) -> None:
        """Forms of a request: one per prompt, or chunks; through the router, or not."""
        sampling, prompts = sampling_of(new_tokens), self.prompts(num_prompts)
        runs = {
            "one per prompt": self.bare.runs(one_each(prompts, sampling)),
            "one per prompt, no router": self.direct.runs(one_each(prompts, sampling)),
            "chunks of 8": self.bare.runs(chunked(prompts, sampling, 8)),
            "chunks of 64": self.bare.runs(chunked(prompts, sampling, 64)),
            "one chunk": self.bare.runs(chunked(prompts, sampling, num_prompts)),
        }
        self._add(
            "forms",
            num_prompts,
            new_tokens,
            self._measure(runs),
            prompts,
        )

    def samples(self, num_prompts: int, count: int, new_tokens: int) -> None:
        """Several samples of one prompt: the server's own n, or a request each.

        Prompts are new in every run, so that none is cached from the run before.
        """
        base = sampling_of(new_tokens)
        seeds = iter(range(1, 10_000))

        def bodies(
            make: Callable[[list[list[int]]], Iterable[dict[str, Any]]], client: Bare = self.bare
        ) -> Run:
            return lambda: client.runs(list(make(self.prompts(num_prompts, next(seeds)))))()

        def batches(prompts: list[list[int]]) -> list[dict[str, Any]]:
            params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, n=count)
            requests = [GenerateRequest(input_ids=tuple(p), sampling=params) for p in prompts]
            return [request.bodies(seeded=True) for request in requests]

        runs = {
            "the server's n": bodies(lambda p: one_each(p, {**base, "n": count})),
            "a request each": bodies(
                lambda p: one_each([ids for ids in p for _ in range(count)], base)
            ),
            "a batch per prompt, no router": bodies(batches, self.direct),
        }
        speeds = self._measure(runs)
        self._add(f"samples, {count} each", num_prompts, new_tokens, speeds, [])

    def _measure(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        repeats = dict.fromkeys(runs, self.args.repeats)
        if "torchrl" in runs:
            repeats["torchrl"] = self.args.torchrl_repeats or self.args.repeats
        return measure(runs, repeats, self.service.flush_cache)

    def _add(
        self,
        what: str,
        num_prompts: int,
        new_tokens: int,
        speeds: dict[str, list[float]],
        few: list[list[int]],
    ) -> None:
        for name, values in speeds.items():
            row = {
                "name": name,
                "compares": what,
                "tokens_per_s": round(statistics.median(values), 1),
                "tokens_per_s_all": [round(value, 1) for value in values],
                "num_prompts": len(few) if name == "torchrl" else num_prompts,
                "prompt_tokens": self.args.prompt_tokens,
                "new_tokens": new_tokens,
                "endpoint": "server" if name == "torchrl" or "no router" in name else "router",
            }
            self.rows.append({**row, **where(self.args, self.service)})
        self._write()  # after each comparison: the next one may take minutes
        best = next(iter(speeds))
        for name, values in speeds.items():
            ratio = statistics.median(speeds[best]) / statistics.median(values)
            print(
                f"{what:18} {num_prompts:5} x {new_tokens:4}  {name:29} "
                f"{statistics.median(values):10.0f} tokens/s  ({ratio:.3f}x for {best!r})",
                flush=True,
            )

    def _write(self) -> None:
        if self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.write_text(json.dumps(self.rows, indent=2) + "\n")

    def close(self) -> None:
        self.bare.close()
        self.direct.close()


def sampling_of(new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 1.0}


def where(args: argparse.Namespace, service: AsyncSGLang) -> dict[str, Any]:
    device = service.info.device
    if device == "cuda":
        device = torch.cuda.get_device_name(0)
    names = ("torchrl-sglang", "sglang", "sglang-router", "torchrl", "torch", "aiohttp", "orjson")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, device {device}",
        "model": args.size or "tiny",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "command": " ".join(["python", "benchmarks/bench_generate.py", *sys.argv[1:]]),
        "repeats": args.repeats,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # run from a checkout that is not installed
        return "from source"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the JSON rows")
    parser.add_argument("--size", choices=SIZES, help="a random model of this size, on a GPU")
    parser.add_argument("--model-dir", type=Path, help="where the random model is kept")
    parser.add_argument("--gpu", type=int, help="the GPU to serve on")
    parser.add_argument("--device", help="cpu or cuda; what is there by default")
    parser.add_argument("--cases", default="32x32", help="prompts x new tokens, comma-separated")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torchrl-prompts", type=int, help="fewer prompts for torchrl's wrapper")
    parser.add_argument("--torchrl-repeats", type=int, help="fewer repeats for it, as it is slow")
    parser.add_argument("--no-torchrl", dest="torchrl", action="store_false")
    parser.add_argument("--forms", action="store_true", help="compare forms of a request too")
    parser.add_argument("--samples", action="store_true", help="compare ways to several samples")
    parser.add_argument("--log-dir", type=Path)
    return parser.parse_args()


def server_args(args: argparse.Namespace) -> dict[str, Any]:
    if args.size is None:
        return {"device": args.device}
    return {
        "device": "cuda",
        "cuda_devices": None if args.gpu is None else [args.gpu],
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "mem_fraction_static": 0.8,
    }


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore")
    set_list_to_stack(True).set()
    cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        if args.size is None:
            model_path = str(make_tiny_model(folder))
        else:
            model_path = str(random_model(args.model_dir or Path(folder), args.size, args.gpu or 0))
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        start = time.perf_counter()
        # Without keys: torchrl's wrapper can't send one.
        with AsyncSGLang.from_pretrained(
            model_path, api_key="", admin_api_key="", log_dir=args.log_dir, **server_args(args)
        ) as service:
            print(f"server ready after {time.perf_counter() - start:.0f} s", flush=True)
            benchmark = Benchmark(service, tokenizer, args)
            try:
                for num_prompts, new_tokens in cases:
                    benchmark.clients(num_prompts, new_tokens)
                if args.forms:
                    benchmark.forms(*cases[0])
                if args.samples:
                    benchmark.samples(max(1, cases[0][0] // 8), 8, cases[0][1])
            finally:
                benchmark.close()


if __name__ == "__main__":
    main()
