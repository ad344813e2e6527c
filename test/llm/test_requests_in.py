"""What a user may hand to ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from torchrl_sglang import GenerateRequest, SamplingParams
from torchrl_sglang.errors import (
    ConfigError,
    EmptyPromptError,
    InputError,
    SGLangError,
    UnsupportedOptionError,
)
from torchrl_sglang.requests_in import to_requests

REQUEST = GenerateRequest(input_ids=(1, 2), sampling=SamplingParams(max_new_tokens=3))


def generator() -> Iterator[Any]:
    yield [1, 2]
    yield "hi"


@pytest.mark.parametrize(
    ("prompts", "single", "expected"),
    [
        ("hi", True, ["hi"]),
        ([1, 2], True, [(1, 2)]),
        ((1, 2), True, [(1, 2)]),
        ([0], True, [(0,)]),
        (["hi", "ho"], False, ["hi", "ho"]),
        (["hi"], False, ["hi"]),
        ([[1, 2]], False, [(1, 2)]),
        ([[1, 2], "hi", (3,)], False, [(1, 2), "hi", (3,)]),
        (torch.tensor([[1, 2], [3, 4]]), False, [(1, 2), (3, 4)]),
        ([torch.tensor([1, 2]), [3]], False, [(1, 2), (3,)]),
        (np.array([[1, 2]]), False, [(1, 2)]),
        (generator(), False, [(1, 2), "hi"]),
        ([], False, []),
    ],
    ids=repr,
)
def test_forms(prompts: Any, single: bool, expected: list[Any]) -> None:
    requests, is_single = to_requests(prompts, None)
    assert is_single is single
    assert [request.text or request.input_ids for request in requests] == expected
    assert all(request.sampling == SamplingParams() for request in requests)


@pytest.mark.parametrize("prompts", [[REQUEST], [REQUEST, REQUEST]])
def test_requests_pass_as_they_are(prompts: list[GenerateRequest]) -> None:
    assert to_requests(prompts, None) == (prompts, False)
    assert to_requests(prompts[0], None) == ([REQUEST], True)


@pytest.mark.parametrize(
    "sampling", [{"max_tokens": 9}, SamplingParams(max_new_tokens=9)], ids=["dict", "params"]
)
def test_sampling_goes_to_every_request(sampling: Any) -> None:
    requests, _ = to_requests(["a", [1]], sampling)
    assert [request.sampling.max_new_tokens for request in requests] == [9, 9]


def test_every_request_has_an_id_of_its_own() -> None:
    requests, _ = to_requests(["a"] * 64, None)
    assert len({request.rid for request in requests}) == 64


@pytest.mark.parametrize("prompts", [REQUEST, [REQUEST], ["a", REQUEST]])
def test_a_request_brings_its_own_sampling(prompts: Any) -> None:
    with pytest.raises(ConfigError, match="its own sampling"):
        to_requests(prompts, {"max_new_tokens": 9})


@pytest.mark.parametrize("prompts", ["", [""], [[]], ["a", []], [torch.empty(0, dtype=torch.long)]])
def test_empty_prompts(prompts: Any) -> None:
    with pytest.raises(EmptyPromptError):
        to_requests(prompts, None)


@pytest.mark.parametrize(
    "prompts",
    [
        {"text": "a"},
        [{"text": "a"}],
        [None],
        [1.5],
        [[1.5, 2.5]],
        [[1, "a"]],
        [1, "a"],
        [torch.tensor([1.5])],
        torch.tensor([[[1]]]),
    ],
    ids=repr,
)
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(InputError):
        to_requests(prompts, None)


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        5,
        b"hello",  # bytes are no token ids
        [b"hello"],
        [True, False],  # a mask is no prompt
        [[True, False]],
        [torch.tensor([True, False])],
        [-1, 5],
        [[-1, 5]],
    ],
    ids=repr,
)
def test_what_looks_like_a_prompt_but_is_none(prompts: Any) -> None:
    with pytest.raises(InputError):
        to_requests(prompts, None)


def test_unknown_options_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(UnsupportedOptionError):
        to_requests("a", {"temprature": 1.0})


@pytest.mark.parametrize("sampling", ["greedy", 0], ids=repr)
def test_sampling_of_another_type(sampling: Any) -> None:
    with pytest.raises(SGLangError):
        to_requests("a", sampling)
