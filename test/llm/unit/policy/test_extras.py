"""Extras: how they are named, and read from completions."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from torchrl_sglang import Completion
from torchrl_sglang.generate.completion import VersionSpan
from torchrl_sglang.policy.outputs.extras import EXTRAS, InfoSpec, build_info, parse_extras
from torchrl_sglang.policy.outputs.tensors import Rows


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ((), {}),
        (["latency", "cached_tokens"], {"latency": 1, "cached_tokens": 1}),
        ({"latency": True, "cached_tokens": False}, {"latency": 1}),
        ({"top_log_probs": 3, "sampling_mask": False}, {"top_log_probs": 3}),
        ({"top_log_probs": 0}, {}),
    ],
    ids=str,
)
def test_ways_to_name_extras(given: Any, parsed: dict[str, int]) -> None:
    assert parse_extras(given) == parsed


def completion(output_ids: list[int], **fields: Any) -> Completion:
    spans = fields.pop("spans", [("default", 0, len(output_ids))])
    return Completion(
        **{
            "rid": "r",
            "output_ids": output_ids,
            "log_probs": [-1.0] * len(output_ids),
            "text": None,
            "finish_type": "abort",
            "matched_stop": None,
            "prompt_tokens": 2,
            "cached_tokens": 0,
            "version_spans": tuple(VersionSpan(version=v, start=a, end=b) for v, a, b in spans),
            **fields,
        }
    )


def info_of(given: Completion, **extras: int) -> TensorDict:
    rows = Rows(
        prompts=[torch.tensor([5, 6])],
        responses=[torch.tensor(given.output_ids, dtype=torch.int64)],
        layout=lambda prompts, responses, fill: (
            prompts,
            responses,
            [torch.cat(pair) for pair in zip(prompts, responses, strict=True)],
        ),
        pad_id=0,
    )
    (info,) = build_info(rows, [given], InfoSpec(key="rollout", extras=extras))
    return info


def test_versions_of_tokens_between_which_the_weights_changed() -> None:
    spans = [("default", 0, 1), ("3", 1, 3), ("4", 3, 4)]
    info = info_of(completion([7, 7, 7, 7], spans=spans))
    assert info["policy_version"].tolist() == [-1, -1, 0, 3, 3, 4]
    assert info["weight_version"] == 4


def test_a_row_that_was_aborted_before_its_first_token() -> None:
    """It has all extras, and nothing in them."""
    info = info_of(
        completion(
            [],
            top_log_probs=[],
            sampling_mask=[],
            sampling_log_probs=[],
            hidden_states=[],
            routed_experts="",
        ),
        **dict.fromkeys(EXTRAS, 1),
    )
    for name in ("top_log_probs", "top_token_ids", "hidden_states", "routed_experts"):
        assert len(info[name]) == 0
    assert info["sampling_mask_ids"].tolist() == []
    assert info["sampling_mask_offsets"].tolist() == [0]
    assert info["policy_version"].tolist() == [-1, -1]
    assert info["weight_version"] == -1
    assert info["latency_s"].isnan()


@pytest.mark.parametrize("spans", [[], [("7", 0, 0)]], ids=["never ran", "from the queue"])
def test_no_weights_sampled_a_row_without_a_token(spans: list[Any]) -> None:
    assert info_of(completion([], spans=spans))["weight_version"] == -1
    assert completion([], spans=spans).weight_version == (spans[0][0] if spans else None)


def test_routed_experts_are_read() -> None:
    """Two layers of two experts for all tokens but the last, which no layer has seen."""
    numbers = torch.arange(3 * 4, dtype=torch.int32)
    encoded = base64.b64encode(numbers.numpy().tobytes()).decode()
    info = info_of(completion([7, 8], routed_experts=encoded), routed_experts=1)
    assert info["routed_experts"].tolist() == numbers.view(3, 4).tolist()
