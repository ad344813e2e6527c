"""Equal prompts of one call sample under seeds of their own, whichever way they come in."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from helpers.fault_proxy import FaultProxy
from helpers.seeds import asking, cut, rows
from torchrl_sglang import AsyncSGLang, SGLangWrapper

SEED = 7

SHORT = {"max_new_tokens": 2, "seed": SEED}


# What is sent


def sent_seeds(proxy: FaultProxy) -> list[int]:
    """The seeds of all samples that were asked for, in order."""
    seeds = []
    for path, raw in proxy.seen:
        if path == "/generate":
            sampling = json.loads(raw)["sampling_params"]
            each = sampling if isinstance(sampling, list) else [sampling]
            seeds += [
                one["sampling_seed"] + sample for one in each for sample in range(one.get("n", 1))
            ]
    proxy.seen.clear()
    return sorted(seeds)


GROUP = [[5, 6, 7]] * 4

EXPECTED = [SEED, SEED + 1, SEED + 2, SEED + 3]


def policy_on(service: AsyncSGLang, **kwargs: Any) -> SGLangWrapper:
    kwargs = {"generate_kwargs": SHORT, **kwargs}
    return SGLangWrapper(service, input_mode="tokens", inplace=False, **kwargs)


REQUESTS = [asking() for _ in GROUP]

WAYS: dict[str, Callable[[AsyncSGLang], Any]] = {
    "wrapper": lambda s: policy_on(s)(rows(*GROUP)),
    "agenerate": lambda s: asyncio.run(policy_on(s).agenerate(rows(*GROUP))),
    "seeds of rows": lambda s: policy_on(s, generate_kwargs={"max_new_tokens": 2})(
        rows(*GROUP, seed=[torch.tensor(SEED)] * 4)
    ),
    "options of a call": lambda s: policy_on(s)(rows(*GROUP), temperature=0.7),
    "samples and repeats": lambda s: policy_on(s, num_samples=2)(rows(*GROUP[:2])),
    "a batching policy": lambda s: policy_on(s, batching=True, batching_timeout=0.1)(rows(*GROUP)),
    "generate": lambda s: s.generate(GROUP, SHORT),
    "service.agenerate": lambda s: asyncio.run(s.agenerate(GROUP, SHORT)),
    "n": lambda s: s.generate(GROUP[:2], SHORT, n=2),
    "complete": lambda s: s.complete(REQUESTS),
    "acomplete": lambda s: asyncio.run(s.acomplete(REQUESTS)),
    "as_completed": lambda s: list(s.as_completed(REQUESTS)),
    "aas_completed": lambda s: asyncio.run(drained(s)),
    "complete_each": lambda s: s.complete_each(REQUESTS),
}


async def drained(service: AsyncSGLang) -> None:
    async for _ in service.aas_completed(REQUESTS):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in(proxied: AsyncSGLang, proxy: FaultProxy, way: str) -> None:
    WAYS[way](proxied)
    assert sent_seeds(proxy) == EXPECTED


def test_calls_that_share_a_batch_have_the_seeds_of_calls_that_do_not(
    proxied: AsyncSGLang, proxy: FaultProxy
) -> None:
    policy = policy_on(proxied, min_batch_size=4, batching_timeout=30.0)
    barrier = threading.Barrier(2)

    def call() -> None:
        barrier.wait(10.0)
        policy(rows(*GROUP[:2]))

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(call) for _ in range(2)]:
            future.result(60.0)
    assert sent_seeds(proxy) == [SEED, SEED, SEED + 1, SEED + 1]


def test_what_goes_on_keeps_the_seed_that_it_had(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """Of four equal prompts the second and the last were aborted."""
    policy = policy_on(
        proxied, generate_kwargs={**SHORT, "max_new_tokens": 6}, partial_rollouts=True
    )
    out = policy(rows(*GROUP))
    sent_seeds(proxy)
    for row in (1, 3):
        cut(out[row])
    policy.resume(out)
    assert sent_seeds(proxy) == [SEED + 1, SEED + 3]
