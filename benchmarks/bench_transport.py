"""What the HTTP library and the JSON parser cost, each alone, on one core.

HTTP: many requests for one token at once, CPU time of the client's thread per request. JSON: a real
answer with log-probs of 512 tokens, read again and again. The library uses the fastest of each.

    python benchmarks/bench_transport.py --out benchmarks/results/transport_cpu.json
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import msgspec
import orjson
import requests

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny_model import make_tiny_model

from torchrl_sglang import AsyncSGLang

BODY = {"input_ids": list(range(20, 52)), "sampling_params": {"max_new_tokens": 1}}


async def with_aiohttp(url: str, count: int) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post() -> bytes:
            async with session.post(url, json=BODY) as response:
                return await response.read()

        await asyncio.gather(*(post() for _ in range(count)))  # opens the connections
        start = time.thread_time()
        await asyncio.gather(*(post() for _ in range(count)))
        return time.thread_time() - start


async def with_httpx(url: str, count: int) -> float:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:

        async def post() -> bytes:
            return (await client.post(url, json=BODY)).content

        await asyncio.gather(*(post() for _ in range(count)))
        start = time.thread_time()
        await asyncio.gather(*(post() for _ in range(count)))
        return time.thread_time() - start


def json_cost(parse: Callable[[bytes], Any], answer: bytes, repeats: int = 200) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        parse(answer)
    return (time.thread_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    clients = {"aiohttp": with_aiohttp, "httpx": with_httpx}
    parsers = {"orjson": orjson.loads, "json": json.loads, "msgspec": msgspec.json.decode}
    costs: dict[str, list[float]] = {name: [] for name in (*clients, *parsers)}
    with (
        tempfile.TemporaryDirectory() as folder,
        AsyncSGLang.from_pretrained(
            str(make_tiny_model(folder)), device="cpu", api_key="", admin_api_key=""
        ) as service,
    ):
        url = service.server_url + "/generate"
        long = {"max_new_tokens": 512, "ignore_eos": True}
        body = {**BODY, "sampling_params": long, "return_logprob": True}
        answer = requests.post(url, json=body, timeout=300).content
        for _ in range(args.repeats):
            for name, client in clients.items():
                seconds = asyncio.run(client(url, args.requests))
                costs[name].append(1e6 * seconds / args.requests)
            for name, parse in parsers.items():
                costs[name].append(1e6 * json_cost(parse, answer))
    rows = [
        {
            "name": name,
            "us_median": round(statistics.median(values), 1),
            "us_all": [round(value, 1) for value in values],
            "per": "request" if name in clients else f"answer of {len(answer)} bytes, 512 tokens",
            "version": platform.python_version() if name == "json" else version(name),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": " ".join(["python", "benchmarks/bench_transport.py", *sys.argv[1:]]),
        }
        for name, values in costs.items()
    ]
    for row in rows:
        print(f"{row['name']:8} {row['us_median']:8.1f} us per {row['per']}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
