"""What each sampling option does to the tokens and their text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from helpers.behaviour import chosen, full_log_probs, hf_logits
from helpers.row_options import make_input, only
from helpers.servers import needs_xgrammar
from torchrl_sglang import AsyncSGLang, Completion, SamplingParams, SGLangWrapper

EOS = 2

PROMPTS = [[i, 2 * i + 3, 77, 100 + i] for i in range(3, 7)]

TAG = {
    "type": "structural_tag",
    "format": {"type": "json_schema", "json_schema": {"type": "integer"}},
}

SCHEMA = {"enum": ["x", "y"]}


def ends(*ids: int, by: str | int | None) -> Callable[[Completion, Any], bool]:
    """The completion is these ids, and ended by this."""
    reason = "length" if by == "length" else "stop"
    matched = None if by == "length" else by
    return lambda c, _: (
        (c.output_ids, c.finish_type, c.matched_stop) == (list(ids), reason, matched)
    )


def decoded(matches: Callable[[str], Any], **facts: Any) -> Callable[[Completion, Any], bool]:
    """What all its tokens say is like this, and so are fields of the completion."""
    return lambda c, tokenizer: bool(
        matches(tokenizer.decode(c.output_ids))
        and all(getattr(c, name) == value for name, value in facts.items())
    )


def is_json(*values: Any) -> Callable[[str], bool]:
    return lambda text: json.loads(text.removesuffix("<|im_end|>")) in values


ABC = {"regex": "(abc ){9}", "max_new_tokens": 40}


# Options, and what a completion is like then. Where several biases are given, one token is sure.
FIELDS: list[tuple[dict[str, Any], Callable[[Completion, Any], bool]]] = [
    ({"max_new_tokens": 3, "logit_bias": only(7)}, ends(7, 7, 7, by="length")),
    ({"max_new_tokens": 1, "logit_bias": only(7)}, ends(7, by="length")),
    ({"logit_bias": only(EOS), "max_new_tokens": 3}, ends(EOS, by=EOS)),
    (
        {"logit_bias": only(EOS), "max_new_tokens": 3, "ignore_eos": True},
        ends(EOS, EOS, EOS, by="length"),
    ),
    (
        {"logit_bias": {EOS: 100.0, 7: 50.0}, "min_new_tokens": 2, "max_new_tokens": 5},
        ends(7, 7, EOS, by=EOS),
    ),
    ({"logit_bias": only(7), "stop_token_ids": [9, 7]}, ends(7, by=7)),
    (
        {"logit_bias": {7: 100.0, 9: 50.0}, "stop_token_ids": [7], "min_new_tokens": 2},
        ends(9, 9, 7, by=7),
    ),
    ({"logit_bias": {7: -100.0}, "top_k": 1}, lambda c, _: 7 not in c.output_ids),
    (
        {**ABC, "stop": "c ab"},
        decoded(
            re.compile(r"abc abc?").fullmatch,
            finish_type="stop",
            matched_stop="c ab",
            text="ab",
        ),
    ),
    ({**ABC, "stop": ["zzz", "bc a"]}, decoded(re.compile("abc a").match, matched_stop="bc a")),
    ({**ABC, "stop": "c a", "no_stop_trim": True}, lambda c, _: c.text.startswith("abc a")),
    (
        {**ABC, "stop_regex": "c.*c"},
        decoded(re.compile("abc abc ?").fullmatch, finish_type="stop", matched_stop=None),
    ),
    ({"regex": "[ab]{3}x"}, decoded(re.compile(r"[ab]{3}x<\|im_end\|>").fullmatch)),
    ({"json_schema": SCHEMA}, decoded(is_json("x", "y"))),
    ({"json_schema": json.dumps(SCHEMA)}, decoded(is_json("x", "y"))),
    ({"ebnf": 'root ::= "yes" | "no"'}, decoded(re.compile(r"(yes|no)<\|im_end\|>").fullmatch)),
    ({"structural_tag": TAG}, decoded(re.compile(r"-?\d+(<\|im_end\|>)?").fullmatch)),
    (
        {"logit_bias": {1: 100.0}, "max_new_tokens": 1, "skip_special_tokens": False},
        lambda c, _: c.text == "<|im_start|>",
    ),
    ({"logit_bias": {1: 100.0}, "max_new_tokens": 1}, lambda c, _: c.text == ""),
]


@pytest.mark.parametrize(("options", "holds"), FIELDS, ids=lambda v: "" if callable(v) else str(v))
def test_fields(
    service: AsyncSGLang,
    tokenizer: Any,
    options: dict[str, Any],
    holds: Callable[[Completion, Any], bool],
) -> None:
    if "structural_tag" in options:
        needs_xgrammar("does not know this form of a structural tag")
    for completion in service.generate(PROMPTS, {"max_new_tokens": 12, **options}):
        assert holds(completion, tokenizer), completion


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"do_sample": False},
        {"top_k": 1, "temperature": 1.5},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "frequency_penalty": 2.0},
        {"temperature": 0.0, "presence_penalty": 2.0},
        {"temperature": 0.0, "presence_penalty": -2.0, "logit_bias": {50: 3.0}},
    ],
    ids=str,
)
def test_the_most_likely_token(service: AsyncSGLang, model: Any, options: dict[str, Any]) -> None:
    """Of the distribution that penalties and biases have changed."""
    sampling = SamplingParams.from_kwargs({"max_new_tokens": 12, "ignore_eos": True, **options})
    for prompt, completion in zip(PROMPTS, service.generate(PROMPTS, sampling), strict=True):
        ids = completion.output_ids
        scores = full_log_probs(hf_logits(model, prompt, ids), ids, sampling)
        assert (scores.max(-1).values - chosen(scores, ids)).max() < 0.1  # bf16


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3, "temperature": 3.0}, {"top_p": 0.2, "temperature": 2.0}, {"min_p": 0.3}],
    ids=str,
)
def test_truncation_keeps_the_likely_tokens(
    service: AsyncSGLang, model: Any, options: dict[str, Any]
) -> None:
    sampling = SamplingParams.from_kwargs({"max_new_tokens": 12, "ignore_eos": True, **options})
    for prompt, completion in zip(PROMPTS, service.generate(PROMPTS, sampling), strict=True):
        ids = completion.output_ids
        scores = full_log_probs(hf_logits(model, prompt, ids), ids, sampling)
        for position, token in enumerate(ids):
            # The token is among those that may be kept: as if it had been the only one.
            order = scores[position].argsort(descending=True)
            rank = int((order == token).nonzero())
            probs = scores[position][order].exp()
            if sampling.top_k > 0:  # two that are all but equally likely may change places in bf16
                assert probs[rank] > 0.97 * probs[sampling.top_k - 1]
            assert probs[:rank].sum() < sampling.top_p + 0.03
            assert probs[rank] > (sampling.min_p - 0.03) * probs[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "%<|im_end|>"),
        ({"skip_special_tokens": True}, "%"),
        ({"skip_special_tokens": False}, "%<|im_end|>"),
        ({"no_stop_trim": False}, "%"),
        ({"no_stop_trim": False, "spaces_between_special_tokens": True}, "%"),
        ({"no_stop_trim": True}, "%<|im_end|>"),
        ({"spaces_between_special_tokens": False}, "%<|im_end|>"),
        ({"skip_special_tokens": True, "no_stop_trim": False}, "%"),
    ],
    ids=str,
)
def test_how_text_is_written(service: AsyncSGLang, options: dict[str, Any], text: str) -> None:
    """As TorchRL's wrappers write it, special tokens and stop included, unless told otherwise."""
    forced = {"logit_bias": {EOS: 100.0, 7: 50.0}, "min_new_tokens": 1}  # 7 is "%"
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs={**forced, **options})
    per_call = SGLangWrapper(service, input_mode="tokens", generate_kwargs=forced)
    for out in (policy(make_input()), per_call(make_input(), **options)):
        for row in out.unbind(0):
            assert row["tokens"].response.tolist() == [7, EOS]
            assert row["text"].response == text
