"""Equal prompts of one call sample under seeds of their own, whichever way they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.seeds import asking
from torchrl_sglang import GenerateRequest
from torchrl_sglang.generate.request import LogitProcessor, Media, SessionTurn
from torchrl_sglang.generate.seeds import own_seeds

SEED = 7


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
