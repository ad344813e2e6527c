"""Completions, read and made, and parts of them."""

from __future__ import annotations

from typing import Any

import torch

from helpers.rows import rows_of
from torchrl_sglang.generate.completion import Completion, VersionSpan
from torchrl_sglang.generate.parse import parse_completions
from torchrl_sglang.generate.request import GenerateRequest


def parse_completion(answer: object, request: GenerateRequest) -> Completion:
    """The answer to a request of one sample."""
    return parse_completions(answer, request)[0]


# Putting parts together


def part(ids: list[int], finish_type: Any = "abort", version: str = "1", **fields: Any) -> Any:
    made: dict[str, Any] = {
        "rid": "a",
        "output_ids": ids,
        "log_probs": [-float(i) for i in ids],
        "text": "x",
        "finish_type": finish_type,
        "matched_stop": None,
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "version_spans": (VersionSpan(version=version, start=0, end=len(ids)),),
        "latency_s": 1.5,
    }
    return Completion(**{**made, **fields})


FORGOTTEN = [
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.5},
    {"repetition_penalty": 1.1},
    {"stop": "a"},
    {"stop_regex": "a+"},
]


def reasons(td: Any) -> list[str]:
    return [row["rollout", "finish_reason"] for row in rows_of(td)]


def split(row: Any) -> tuple[list[int], list[int], list[float], list[int]]:
    """Prompt, sampled ids, their log-probs and versions; everything else is as it should be."""
    tokens, masks = row["tokens"], row["masks"]
    every, answer = masks.all_attention_mask, masks.all_assistant_mask
    scores, versions = row["log_probs"].full, row["rollout", "policy_version"]
    assert every.shape == answer.shape == scores.shape == versions.shape == tokens.full.shape
    assert torch.equal(tokens.full, torch.cat([tokens.prompt, tokens.response]))
    assert not (answer & ~every).any()
    assert (versions[~answer] == -1).all()
    ids, sampled = tokens.full[every & ~answer].tolist(), tokens.full[answer].tolist()
    assert row["text"].full == row["text"].prompt + row["text"].response
    return ids, sampled, scores[answer].tolist(), versions[answer].tolist()
