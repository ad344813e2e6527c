"""Requests: what a user may hand to ``generate``, and what is sent of it."""

from __future__ import annotations

import json
import re
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
from torchrl_sglang.generate.request import requests_of, to_requests


def in_short(value: Any) -> str:
    """The name of a parameter, the same in every process: no addresses, no random ids."""
    return re.sub(r" at 0x\w+|[0-9a-f]{16,}", "", repr(value))[:60]


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
        (torch.tensor([1, 2]), True, [(1, 2)]),
        (np.array([1, 2]), True, [(1, 2)]),
        ([np.int64(1), np.int32(2)], True, [(1, 2)]),
        ([torch.tensor(1), 2], True, [(1, 2)]),
    ],
    ids=in_short,
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
        torch.tensor([1.0, 2.0]),
        torch.tensor(5),
        [np.bool_(True)],
        "a\ud83d",  # half a character
        ["hi", "a\ud83d"],
    ],
    ids=in_short,
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
    ids=in_short,
)
def test_what_looks_like_a_prompt_but_is_none(prompts: Any) -> None:
    with pytest.raises(InputError):
        to_requests(prompts, None)


def test_unknown_options_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(UnsupportedOptionError):
        to_requests("a", {"temprature": 1.0})


@pytest.mark.parametrize("sampling", ["greedy", 0], ids=in_short)
def test_sampling_of_another_type(sampling: Any) -> None:
    with pytest.raises(SGLangError):
        to_requests("a", sampling)


# Requests that users make themselves


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2], (1, 2)),
        (torch.tensor([1, 2]), (1, 2)),
        (np.array([1, 2]), (1, 2)),
        ([np.int64(1), torch.tensor(2)], (1, 2)),
        (iter([1, 2]), (1, 2)),
    ],
    ids=in_short,
)
def test_ids_of_a_request(ids: Any, expected: tuple[int, ...]) -> None:
    made = GenerateRequest(input_ids=ids).input_ids
    assert made == expected
    assert {type(each) for each in made or ()} == {int}


@pytest.mark.parametrize(
    "ids",
    [[True, False], torch.tensor([True]), [1, True], [1.0], [None], ["a"], "12", b"12", 5, {1: 2}],
    ids=in_short,
)
def test_what_are_no_ids_of_a_request(ids: Any) -> None:
    with pytest.raises(InputError, match="token ids are"):
        GenerateRequest(input_ids=ids)


@pytest.mark.parametrize("text", [5, ["a"], b"a", "a\ud83d"], ids=in_short)
def test_what_is_no_text_of_a_request(text: Any) -> None:
    with pytest.raises(InputError, match="a text is a string of Unicode"):
        GenerateRequest(text=text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampling", 5),
        ("returns", {"hidden_states": True}),
        ("processor", "a"),
        ("lora", 5),
        ("media", {"images": ["a"]}),
        ("session", "a session's id"),
        ("rid", 5),
        ("rid", ""),
    ],
)
def test_fields_of_another_type(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        GenerateRequest(input_ids=(1,), **{field: value})


def test_sampling_of_a_request_may_be_a_mapping() -> None:
    made = GenerateRequest(input_ids=(1,), sampling={"max_tokens": 3})
    assert made.sampling == SamplingParams(max_new_tokens=3)


@pytest.mark.parametrize("batch", ["a", REQUEST, None, 5, ["a"], [REQUEST, [1, 2]]], ids=in_short)
def test_what_is_no_batch_of_requests(batch: Any) -> None:
    with pytest.raises(InputError, match="GenerateRequest"):
        requests_of(batch)


def test_batches_of_requests() -> None:
    assert requests_of(iter([REQUEST])) == [REQUEST]
    assert requests_of([]) == []


# Other ways to say it


def test_ids_by_name() -> None:
    assert to_requests(None, None, input_ids=[1, 2])[1] is True
    requests, single = to_requests(None, None, input_ids=torch.tensor([[1, 2], [3, 4]]))
    assert ([each.input_ids for each in requests], single) == ([(1, 2), (3, 4)], False)
    for prompts, ids in ((None, None), ([1], [1])):
        with pytest.raises(InputError, match="one of the two"):
            to_requests(prompts, None, input_ids=ids)


@pytest.mark.parametrize(
    "sampling", [None, {"max_new_tokens": 3, "min_p": 0.5}, SamplingParams(min_p=0.5)], ids=in_short
)
def test_options_are_laid_over_sampling_params(sampling: Any) -> None:
    options = {"max_tokens": 9, "num_samples": 2}
    (request,), _ = to_requests("a", sampling, options)
    assert (request.sampling.max_new_tokens, request.sampling.n) == (9, 2)
    assert request.sampling.min_p == (0.0 if sampling is None else 0.5)
    with pytest.raises(ConfigError, match="its own sampling"):
        to_requests([REQUEST], None, options)


@pytest.mark.parametrize("name", ["return_logprobs", "return_text", "timeout"])
def test_options_of_torchrls_engine(name: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"{name}.*is not supported: "):
        to_requests("a", None, {name: 1})


def test_fitting_can_be_refused_for_every_request() -> None:
    for prompts in ("a", [1], [REQUEST]):
        assert to_requests(prompts, None)[0][0].fit_context is True
        assert to_requests(prompts, None, fit_context=False)[0][0].fit_context is False


# Requests


def test_the_body_of_a_request() -> None:
    sampling = SamplingParams(max_new_tokens=5)
    body = GenerateRequest(input_ids=(1, 2), sampling=sampling, rid="r").body("weights-3")
    assert body == {
        "rid": "r",
        "input_ids": (1, 2),
        "sampling_params": sampling.body(),
        "return_logprob": True,
        "stream": False,
        "extra_key": "weights-3",
    }
    assert json.loads(json.dumps(body))["input_ids"] == [1, 2]


def test_text_goes_as_text_and_no_salt_as_nothing() -> None:
    body = GenerateRequest(text="hi", return_log_probs=False).body()
    assert (body["text"], body["return_logprob"]) == ("hi", False)
    assert not {"input_ids", "extra_key"} & set(body)


def test_ids_are_kept_as_a_tuple() -> None:
    assert GenerateRequest(input_ids=[1, 2]).input_ids == (1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{}, {"input_ids": (1,), "text": "a"}], ids=str)
def test_a_request_takes_one_prompt(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        GenerateRequest(**given)


@pytest.mark.parametrize("given", [{"input_ids": ()}, {"text": ""}], ids=str)
def test_a_request_takes_no_empty_prompt(given: dict[str, Any]) -> None:
    with pytest.raises(EmptyPromptError, match="empty"):
        GenerateRequest(**given)


def test_every_sample_has_a_seed_of_its_own() -> None:
    """Where a server samples deterministically: it gives the same one to all that have none."""
    sampling = SamplingParams(n=3, max_new_tokens=4, logit_bias={5: 1.0})
    request = GenerateRequest(input_ids=(5, 6), sampling=sampling, lora="a")
    body = request.bodies(seeded=True, cache_salt="s")
    seeds = [params["sampling_seed"] for params in body["sampling_params"]]
    assert len(set(seeds)) == 3
    assert body["rid"] == [f"{request.rid}-s{i}" for i in range(3)]
    assert body["input_ids"] == [(5, 6)] * 3
    assert body["lora_path"] == ["a"] * 3
    assert body["extra_key"] == ["s"] * 3
    for params in body["sampling_params"]:
        assert "n" not in params
        assert params["logit_bias"] == {"5": 1.0}
    # The same request has the same seeds, another one others: also for the same prompt.
    assert request.seeds() == seeds
    other = GenerateRequest(input_ids=(5, 6), sampling=sampling)
    assert not set(other.seeds()) & set(seeds)
    single = GenerateRequest(input_ids=(5, 6))
    (seed,) = single.seeds()
    assert single.bodies(seeded=True)["sampling_params"]["sampling_seed"] == seed
    assert "sampling_seed" not in single.bodies(seeded=False)["sampling_params"]


def test_seeds_follow_the_users() -> None:
    sampling = SamplingParams(n=3, sampling_seed=7)
    body = GenerateRequest(input_ids=(5,), sampling=sampling).bodies(seeded=True)
    assert [params["sampling_seed"] for params in body["sampling_params"]] == [7, 8, 9]
    single = GenerateRequest(input_ids=(5,), sampling=SamplingParams(sampling_seed=7))
    assert single.bodies(seeded=True)["sampling_params"]["sampling_seed"] == 7
    scored = GenerateRequest(input_ids=(5,), scoring=True)
    assert "sampling_seed" not in scored.bodies(seeded=True)["sampling_params"]
