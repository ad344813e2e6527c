"""Rows that would be answered alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang import GenerateRequest, SamplingParams

SEED = 7


def asking(ids: Sequence[int] = (5, 6, 7), seed: int | None = SEED, **options: Any) -> Any:
    fields = {k: options.pop(k) for k in list(options) if k in GenerateRequest.__annotations__}
    sampling = SamplingParams(sampling_seed=seed, max_new_tokens=2).updated(options)
    return GenerateRequest(input_ids=tuple(ids), sampling=sampling, **fields)


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
