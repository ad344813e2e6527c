"""Routed experts of tokens that were computed anew under other weights."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.parts import parse_completion
from torchrl_sglang import Completion, GenerateRequest
from torchrl_sglang.errors import ResponseError
from torchrl_sglang.generate.completion import VersionSpan, joined
from torchrl_sglang.generate.experts import as_sampled
from torchrl_sglang.generate.request import Returns
from torchrl_sglang.policy.outputs.extras import _routed_experts

WIDTH = 4  # two layers of two experts

PROMPT, SAMPLED = 3, 5

TOKENS = PROMPT + SAMPLED - 1


def encoded(table: torch.Tensor) -> str:
    return base64.b64encode(table.to(torch.int32).numpy().tobytes()).decode()


def decoded(routes: str) -> list[list[int]]:
    raw = bytearray(base64.b64decode(routes))
    return torch.frombuffer(raw, dtype=torch.int32).view(-1, WIDTH).tolist()


TABLE = torch.arange(TOKENS * WIDTH).view(TOKENS, WIDTH)


def spans(*ends: int) -> list[dict[str, Any]]:
    starts = [0, *ends[:-1]]
    return [
        {"version": str(version), "start": start, "end": end}
        for version, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


@pytest.mark.parametrize(
    ("meta", "unknown"),
    [
        ({"num_retractions": 0, "weight_versions": spans(5)}, 0),
        # Paused in place: nothing was computed anew.
        ({"num_retractions": 0, "weight_versions": spans(2, 5)}, 0),
        ({"num_retractions": 1, "weight_versions": spans(2, 5)}, PROMPT + 1),
        ({"num_retractions": 2, "weight_versions": spans(1, 2, 5)}, PROMPT + 1),
        # No token came after the change, or the request had none before.
        ({"num_retractions": 1, "weight_versions": spans(5, 5)}, TOKENS),
        ({"num_retractions": 1, "weight_versions": spans(0, 5)}, PROMPT - 1),
        # For lack of memory: under the same weights.
        ({"num_retractions": 1, "weight_versions": spans(5)}, 0),
        # Servers that know one version per request do not say whether the weights changed.
        ({"num_retractions": 1}, TOKENS),
        ({"num_retractions": 1, "weight_versions": None}, TOKENS),
        ({"num_retractions": 0}, 0),
        # Servers that do not count.
        ({"weight_versions": spans(2, 5)}, PROMPT + 1),
        ({"weight_versions": spans(5)}, 0),
        ({}, 0),
    ],
    ids=str,
)
def test_what_is_not_known_any_more(meta: dict[str, Any], unknown: int) -> None:
    meta = {"prompt_tokens": PROMPT, **meta}
    expected = [[-1] * WIDTH] * unknown + TABLE[unknown:].tolist()
    assert decoded(as_sampled(encoded(TABLE), meta, SAMPLED)) == expected


def answer(routes: Any, **meta: Any) -> dict[str, Any]:
    return {
        "output_ids": [7] * SAMPLED,
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "length"},
            "prompt_tokens": PROMPT,
            "completion_tokens": SAMPLED,
            "weight_versions": spans(2, 5),
            "num_retractions": 1,
            "routed_experts": routes,
            **meta,
        },
    }


ASKING = GenerateRequest(
    input_ids=(5,) * PROMPT,
    rid="r1",
    return_log_probs=False,
    returns=Returns(routed_experts=True),
)


def test_completions_and_outputs_have_it() -> None:
    completion = parse_completion(answer(encoded(TABLE)), ASKING)
    table = _routed_experts([completion], Rows())["routed_experts"][0]
    assert table.dtype == torch.int32
    assert table.tolist() == [[-1] * WIDTH] * (PROMPT + 1) + TABLE[PROMPT + 1 :].tolist()


class Rows:
    prompts = (torch.zeros(PROMPT),)


@pytest.mark.parametrize("routes", [encoded(TABLE[:, 0])[:-8], "no base64!", "AAAA"])
def test_experts_of_something_else(routes: str) -> None:
    with pytest.raises(ResponseError, match="routed experts"):
        parse_completion(answer(routes), ASKING)
    unchanged = parse_completion(answer(encoded(TABLE), num_retractions=0), ASKING)
    with pytest.raises(ResponseError, match="routed experts"):
        _routed_experts([replace(unchanged, output_ids=[7] * 9)], Rows())


def part(num_sampled: int, prompt: int, routes: str | None) -> Completion:
    return Completion(
        rid="r",
        output_ids=[7] * num_sampled,
        log_probs=None,
        text=None,
        finish_type="abort",
        matched_stop=None,
        prompt_tokens=prompt,
        cached_tokens=0,
        version_spans=(VersionSpan(version="1", start=0, end=num_sampled),),
        routed_experts=routes,
    )


def test_what_goes_on_keeps_the_experts_that_it_had() -> None:
    """The second request computes the first one's tokens anew, perhaps under other weights."""
    first = TABLE[: PROMPT + 1]  # of two sampled tokens all but the last
    again = 1000 + TABLE
    whole = joined(part(2, PROMPT, encoded(first)), part(3, PROMPT + 2, encoded(again)))
    assert whole.routed_experts is not None
    assert decoded(whole.routed_experts) == [*first.tolist(), *again[PROMPT + 1 :].tolist()]
    for nothing in (None, ""):
        fresh = joined(part(0, PROMPT, nothing), part(5, PROMPT, encoded(again)))
        assert fresh.routed_experts == encoded(again)
        stuck = joined(part(2, PROMPT, encoded(first)), part(0, PROMPT + 2, nothing))
        assert stuck.routed_experts == encoded(first)
