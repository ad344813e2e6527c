"""Equal prompts of one call sample under seeds of their own, whichever way they come in."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fault_proxy import FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper
from torchrl_sglang.generate.request import LogitProcessor, Media, SessionTurn
from torchrl_sglang.generate.seeds import own_seeds

SEED = 7
SHORT = {"max_new_tokens": 2, "seed": SEED}


def asking(ids: Sequence[int] = (5, 6, 7), seed: int | None = SEED, **options: Any) -> Any:
    fields = {k: options.pop(k) for k in list(options) if k in GenerateRequest.__annotations__}
    sampling = SamplingParams(sampling_seed=seed, max_new_tokens=2).updated(options)
    return GenerateRequest(input_ids=tuple(ids), sampling=sampling, **fields)


def seeds_of(requests: Sequence[GenerateRequest]) -> list[int | None]:
    return [request.sampling.sampling_seed for request in own_seeds(requests)]


TURN = SessionTurn(session_id="s", worker_url="http://s", before=(5,))
EQUAL = [
    ({}, {}),
    ({"max_new_tokens": 9}, {"min_new_tokens": 2}),  # they say how long, not what
    ({"stop": "a"}, {"stop_token_ids": [3]}),
    ({"logit_bias": {3: 1.0, 4: 2.0}}, {"logit_bias": {4: 2.0, 3: 1}}),
    ({"ids": (6, 7), "session": TURN}, {}),
    (
        {"ids": (6, 7), "session": TURN},
        {"ids": (6, 7), "session": replace(TURN, session_id="t")},
    ),
    ({"return_log_probs": False}, {"rid": "mine"}),
]
OTHER = [
    ({"ids": (5, 6)}, {}),
    ({"ids": (6, 7), "session": TURN}, {"ids": (6, 7)}),
    ({"temperature": 0.5}, {}),
    ({"top_p": 0.5}, {}),
    ({"logit_bias": {3: 1.0}}, {}),
    ({"regex": "a"}, {}),
    ({"lora": "a"}, {"lora": "b"}),
    ({"processor": LogitProcessor(serialized="p", params={"a": [1]})}, {}),
    ({"media": Media(images=("a",))}, {"media": Media(images=("b",))}),
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=str)
def test_prompts_that_would_be_answered_alike(one: Any, other: Any) -> None:
    assert seeds_of([asking(**one), asking(**other), asking((9,))]) == [SEED, SEED + 1, SEED]


@pytest.mark.parametrize(("one", "other"), OTHER, ids=str)
def test_requests_that_sample_from_something_else_keep_theirs(one: Any, other: Any) -> None:
    assert seeds_of([asking(**one), asking(**other)]) == [SEED, SEED]


def test_texts_and_what_needs_no_seed() -> None:
    text = [GenerateRequest(text="a", sampling=asking().sampling) for _ in range(2)]
    assert seeds_of(text) == [SEED, SEED + 1]
    assert seeds_of([asking(seed=None), asking(seed=None)]) == [None, None]
    assert seeds_of([asking(scoring=True), asking()]) == [SEED, SEED]


def test_seeds_that_users_gave_are_kept_where_they_can_be() -> None:
    given_seeds = [7, 8, 7, 8, -3, 7]
    assert seeds_of([asking(seed=seed) for seed in given_seeds]) == [7, 8, 9, 10, -3, 11]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(1, 4)), max_size=12))
def test_no_two_samples_of_one_prompt_share_a_seed(asked: list[tuple[int, int, int]]) -> None:
    requests = [asking((5 + prompt,), seed, n=n) for prompt, seed, n in asked]
    made = own_seeds(requests)
    for prompt in {request.input_ids for request in requests}:
        seeds = [seed for each in made if each.input_ids == prompt for seed in each.seeds()]
        assert len(set(seeds)) == len(seeds)
    assert own_seeds(made) == made  # one way in may be behind another
    assert [each.rid for each in made] == [each.rid for each in requests]


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


def rows(*prompts: list[int], **options: list[Any]) -> Any:
    made = [
        TensorDict(tokens=Tokens(prompt=torch.tensor(ids), batch_size=()), batch_size=())
        for ids in prompts
    ]
    for name, values in options.items():
        for row, value in zip(made, values, strict=True):
            if value is not None:
                row["sampling", name] = value
    return lazy_stack(made)


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


def cut(row: Any) -> None:
    """As if the row had been aborted after its first token."""
    length = len(row["tokens", "prompt"]) + 1
    for key in [
        ("tokens", "full"),
        ("masks", "all_attention_mask"),
        ("masks", "all_assistant_mask"),
    ]:
        row[key] = row[key][:length]
    row["log_probs", "full"] = row["log_probs", "full"][:length]
    row["rollout", "policy_version"] = row["rollout", "policy_version"][:length]
    row["rollout", "finish_reason"] = "abort"
