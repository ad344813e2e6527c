"""Sampling options for every row, for one call, and for each row of a batch by itself."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from torchrl_sglang import SamplingParams
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError
from torchrl_sglang.generate.sampling_names import REFUSED
from torchrl_sglang.policy.arguments import choose_sampling, sampling_options

from_kwargs = SamplingParams.from_kwargs


def test_every_field_is_sent_and_no_other() -> None:
    assert SamplingParams().body() == {
        "max_new_tokens": 128,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "ignore_eos": False,
    }


# What SGLang's class holds beside what a request can say.
INTERNAL = {
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
    "ebnf_full_assistant",
}


def engine_fields() -> set[str]:
    """The fields of SGLang's own class, read from its source."""
    spec = importlib.util.find_spec("sglang")  # finds it, does not import it
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "srt" / "sampling" / "sampling_params.py"
    (params,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "SamplingParams"
    )
    return {node.target.id for node in params.body if isinstance(node, ast.AnnAssign)}


def test_the_engine_knows_every_name_that_is_sent() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= engine_fields()


def test_every_name_of_the_engine_is_known() -> None:
    """As an option, or refused with what to do instead."""
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    assert engine_fields() - INTERNAL <= ours | REFUSED.keys()
    for name in REFUSED:
        with pytest.raises(UnsupportedOptionError, match=f"'{name}' is not supported: "):
            from_kwargs({name: 1})


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"max_tokens": 7}, "max_new_tokens", 7),
        ({"max_generate_length": 7}, "max_new_tokens", 7),
        ({"max_new_tokens": 7}, "max_new_tokens", 7),
        ({"min_tokens": 7}, "min_new_tokens", 7),
        ({"stop_sequences": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": "a"}, "stop", ("a",)),
        ({"stop": None}, "stop", ()),
        ({"stop_token_ids": [3, 4]}, "stop_token_ids", (3, 4)),
        ({"stop_token_ids": [0]}, "stop_token_ids", (0,)),
        ({"stop_token_ids": None}, "stop_token_ids", ()),
        ({"seed": 5}, "sampling_seed", 5),
        ({"do_sample": False}, "temperature", 0.0),
        ({"do_sample": False, "temperature": 0}, "temperature", 0.0),
        ({"do_sample": True, "temperature": 0.5}, "temperature", 0.5),
        ({"do_sample": True}, "temperature", 1.0),
    ],
)
def test_spellings(given: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(from_kwargs(given), name) == value


def test_nothing_given_is_the_default() -> None:
    assert from_kwargs(None) == from_kwargs({}) == SamplingParams()


def test_one_stop_is_a_sequence_of_one() -> None:
    body = SamplingParams(stop="a", stop_token_ids=(3,)).body()
    assert (body["stop"], body["stop_token_ids"]) == (("a",), (3,))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [1, 10**6]),
        ("min_new_tokens", [0, 128]),
        ("temperature", [0, 0.0, 2.5]),
        ("top_p", [0.01, 1]),
        ("top_k", [-1, 1, 50]),
        ("min_p", [0, 0.5, 1]),
        ("repetition_penalty", [0.5, 2]),
        ("frequency_penalty", [-2, 0.5, 2]),
        ("presence_penalty", [-2, 0.5, 2]),
        ("ignore_eos", [True, False]),
        ("sampling_seed", [0, 2**61]),
    ],
)
def test_values_inside_the_range(name: str, values: list[Any]) -> None:
    for value in values:
        assert from_kwargs({name: value}).body()[name] == value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, "8", None, True]),
        ("min_new_tokens", [-1, 0.5, None]),
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True]),
        ("top_p", [0, -0.5, 1.01, None]),
        ("top_k", [0, -2, 1.5, True]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("stop", [[""], [1], ["a", None]]),
        ("stop_token_ids", [[-1], [1.5], ["3"], [True]]),
        ("ignore_eos", [None, 1, "yes"]),
        ("sampling_seed", [1.5, "3", True]),
    ],
)
def test_values_outside_the_range(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UnsupportedOptionError, match=f"^{name}=.*must be "):
            from_kwargs({name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"stop": 5},
        {"stop": 0},
        {"stop_token_ids": 5},
        {"stop_token_ids": 0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"sampling_seed": 2**63},
        {"do_sample": 0},
        {"do_sample": "no"},
        {"do_sample": True, "temperature": 0},
    ],
    ids=str,
)
def test_what_the_engine_refuses_or_would_drop_is_refused_here(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOptionError):
        from_kwargs(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temprature": 1}, "Did you mean 'temperature'"),
        ({"max_new_token": 1}, "Did you mean 'max_new_tokens'"),
        ({"do_sampel": False}, "Did you mean 'do_sample'"),
        ({"zzz": 1}, "Known: .*temperature"),
        ({"best_of": 2}, "choose among them"),
        ({"num_beams": 2}, "beam search"),
        ({"length_penalty": 1.0}, "beam search"),
        ({"early_stopping": True}, "beam search"),
        ({"logprobs": 1}, "return_log_probs"),
        ({"max_tokens": 1, "max_new_tokens": 1}, "another spelling of 'max_new_tokens'"),
        ({"stop": "a", "stop_sequences": "b"}, "another spelling of 'stop'"),
        ({"do_sample": False, "temperature": 0.5}, "leave one out"),
    ],
)
def test_options_that_can_not_be_served(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=says) as caught:
        from_kwargs(given)
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, ValueError)


def test_options_of_a_call_are_laid_over_the_others() -> None:
    base = from_kwargs({"max_new_tokens": 7, "temperature": 0.5})
    changed = base.updated({"max_tokens": 9})
    assert (changed.max_new_tokens, changed.temperature) == (9, 0.5)
    assert base.max_new_tokens == 7
    assert base.updated({}) == base


def test_greedy_can_be_undone_for_one_call() -> None:
    greedy = from_kwargs({"do_sample": False})
    assert greedy.updated({"temperature": 1.0}).temperature == 1.0
    # do_sample=True on top of greedy either samples or raises; it is not ignored.
    with pytest.raises(UnsupportedOptionError):
        greedy.updated({"do_sample": True})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ()),
        ({"top_p": 0.9}, ("top_p",)),
        ({"top_k": 5}, ("top_k",)),
        ({"min_p": 0.1}, ("min_p",)),
        ({"top_p": 0.9, "top_k": 5, "min_p": 0.1}, ("top_p", "top_k", "min_p")),
        ({"top_p": 0.9, "temperature": 0}, ()),  # greedy: the most likely token either way
        ({"repetition_penalty": 1.1}, ()),  # in the reported log-probs
    ],
)
def test_what_the_log_probs_do_not_reflect(
    given: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert from_kwargs(given).truncates == expected


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", np.int64(4), 4),
        ("max_new_tokens", torch.tensor(4), 4),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("top_p", np.float64(0.25), 0.25),
        ("ignore_eos", np.bool_(True), True),
        ("seed", np.uint32(7), 7),
        ("stop_token_ids", np.array([3, 4]), (3, 4)),
        ("stop_token_ids", torch.tensor([3, 4]), (3, 4)),
        ("stop_token_ids", [np.int64(3), torch.tensor(4)], (3, 4)),
        ("stop", np.array(["a", "b"]), ("a", "b")),
        ("logit_bias", {np.int64(3): np.float32(0.5)}, {3: 0.5}),
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_torch(name: str, value: Any, expected: Any) -> None:
    """They are sent as JSON, which knows only Python's own."""
    params = SamplingParams.from_kwargs({name: value})
    made = getattr(params, {"seed": "sampling_seed"}.get(name, name))
    assert (made, type(made)) == (expected, type(expected))
    json.dumps(params.body())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", np.float64(4.0)),
        ("max_new_tokens", torch.tensor([4])),
        ("max_new_tokens", np.bool_(True)),
        ("temperature", torch.tensor([1.0, 2.0])),
        ("stop_token_ids", np.array([1.5])),
        ("stop", ["a\ud83d"]),
        ("stop", "a\ud83d"),
        ("regex", "a\ud83d"),
        ("ebnf", "a\ud83d"),
        ("stop_regex", "a\ud83d"),
    ],
    ids=repr,
)
def test_what_is_still_no_value(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedOptionError, match=name):
        SamplingParams.from_kwargs({name: value})


@pytest.mark.parametrize("given", [GenerationConfig(max_new_tokens=4), [("n", 2)], 5, "greedy"])
def test_options_that_are_no_mapping(given: Any) -> None:
    """Such as another library's object."""
    says = f"mapping of names to values.*not a {type(given).__name__}"
    for read in (SamplingParams.from_kwargs, SamplingParams.of, sampling_options):
        with pytest.raises(ConfigError, match=says):
            read(given)


def test_parameters_where_options_are_taken() -> None:
    params = SamplingParams(max_new_tokens=4, stop="a")
    assert SamplingParams.of(params) is params
    assert choose_sampling(params, None, True) == (params, None)
    assert choose_sampling(params.updated({"n": 3}), None, True)[1] == 3
    assert choose_sampling({"num_samples": 3}, None, True)[1] == 3


def test_a_name_that_is_no_string() -> None:
    with pytest.raises(UnsupportedOptionError, match="name is a string, got 5"):
        SamplingParams.from_kwargs({5: 1})


@pytest.mark.parametrize(
    "options",
    [{"stop_regex": "("}, {"stop_regex": "ä" * 129}, {"stop": ["a"] * 33}],
    ids=["no regex", "bytes", "too many"],
)
def test_stops_that_the_server_would_fail_on(options: dict[str, Any]) -> None:
    """It answers 500 to the first, which looks like a failure that is worth another attempt."""
    with pytest.raises(ConfigError):
        SamplingParams(**options)
