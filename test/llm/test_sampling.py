"""`SamplingParams`: the names that users write, and what is sent."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang import SamplingParams
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError
from torchrl_sglang.sampling_names import REFUSED

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
