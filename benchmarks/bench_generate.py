"""Generation speed: our wrapper, a bare HTTP client and torchrl's own wrapper, in one run.

All three send the same prompts with log-probs and are interleaved, so that a noisy machine
disturbs them alike; compare them as ratios. Ours and the bare client go through the router;
torchrl's wrapper can't (it asks the router for a route that it lacks), so it talks to the server
itself, which saves it a hop. The bare client posts all prompts at once
over one pool, parses the JSON and does nothing more: the least that any client can do.

    python benchmarks/bench_generate.py --out benchmarks/results/generate_cpu.json
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.modules.llm.policies import SGLangWrapper as TorchRLWrapper
from torchrl.modules.llm.policies import Text

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from torchrl_sglang import AsyncSGLang, SGLangWrapper

Run = Callable[[], int]


def make_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab_size, (num_prompts, num_tokens), generator=generator).tolist()


def ours(service: AsyncSGLang, sampling: dict[str, Any], prompts: list[list[int]]) -> Run:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=sampling, inplace=False)

    def run() -> int:
        rows = [
            TensorDict(tokens=TensorDict(prompt=torch.tensor(ids)), batch_size=())
            for ids in prompts
        ]
        out = policy(lazy_stack(rows))
        return sum(len(ids) for ids in out.get(("tokens", "response"), as_list=True))

    return run


class Bare:
    """One pool on one event loop, as long as the benchmark runs."""

    def __init__(
        self, service: AsyncSGLang, sampling: dict[str, Any], prompts: list[list[int]]
    ) -> None:
        self.url = service.server_url + "/generate"
        self.bodies = [
            {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
            for ids in prompts
        ]
        self.loop = asyncio.new_event_loop()
        self.session = self.loop.run_until_complete(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    def run(self) -> int:
        return self.loop.run_until_complete(self._run())

    async def _run(self) -> int:
        return sum(await asyncio.gather(*map(self._post, self.bodies)))

    async def _post(self, body: dict[str, Any]) -> int:
        data, headers = orjson.dumps(body), {"Content-Type": "application/json"}
        async with self.session.post(self.url, data=data, headers=headers) as response:
            return len(orjson.loads(await response.read())["output_ids"])

    def close(self) -> None:
        self.loop.run_until_complete(self.session.close())
        self.loop.close()


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


def measure(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each repeat, after one warm-up each."""
    for run in runs.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            num_tokens = run()
            speeds[name].append(num_tokens / (time.perf_counter() - start))
    return speeds


def rows(speeds: dict[str, list[float]], args: argparse.Namespace, device: str) -> list[dict]:
    where = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, device {device}",
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("torchrl-sglang", "sglang", "sglang-router", "torchrl", "torch", "aiohttp")
        },
        "command": " ".join(["python", "benchmarks/bench_generate.py", *args.argv]),
        "num_prompts": args.num_prompts,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
    }
    return [
        {
            "name": name,
            "endpoint": "server" if name == "torchrl" else "router",
            "tokens_per_s": round(statistics.median(values), 1),
            "tokens_per_s_all": [round(value, 1) for value in values],
            **where,
        }
        for name, values in speeds.items()
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the JSON rows")
    parser.add_argument("--model", help="folder of a model; a tiny one by default")
    parser.add_argument("--device", help="cpu or cuda; what is there by default")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.argv = sys.argv[1:]
    return args


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore")
    set_list_to_stack(True).set()
    with tempfile.TemporaryDirectory() as folder:
        model_path = args.model or str(make_tiny_model(folder))
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        prompts = make_prompts(args.num_prompts, args.prompt_tokens, len(tokenizer), seed=0)
        sampling = {"max_new_tokens": args.new_tokens, "ignore_eos": True, "temperature": 1.0}
        # Without keys: torchrl's wrapper can't send one.
        with AsyncSGLang.from_pretrained(
            model_path,
            device=args.device,
            api_key="",
            admin_api_key="",
        ) as service:
            bare = Bare(service, sampling, prompts)
            runs = {
                "ours": ours(service, sampling, prompts),
                "bare": bare.run,
                "torchrl": torchrls(service, sampling, prompts, tokenizer),
            }
            results = rows(measure(runs, args.repeats), args, service.info.device)
            bare.close()
    by_name = {row["name"]: row["tokens_per_s"] for row in results}
    for name, speed in by_name.items():
        print(f"{name:8} {speed:10.0f} tokens/s  ({by_name['ours'] / speed:.2f}x for ours)")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
