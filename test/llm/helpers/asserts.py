"""How far the servers are from what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from helpers.prompts import PROMPTS
from helpers.servers import hf_log_probs, worst_error
from torchrl_sglang import AsyncSGLang

SAMPLING = {"max_new_tokens": 24, "ignore_eos": True}


def error_of(
    service: AsyncSGLang,
    model: Any,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    sampling: Mapping[str, Any] = SAMPLING,
) -> float:
    """How far the log-probs that the servers report are from ``model``'s."""
    return worst_error(model, prompts, service.generate(prompts, sampling))


def distance(model: Any, prompt: list[int], answer: dict[str, Any]) -> float:
    """Largest difference of the answer's log-probs from the model's own."""
    theirs = [row[0] for row in answer["meta_info"]["output_token_logprobs"]]
    ours = hf_log_probs(model, prompt, answer["output_ids"])
    return max(abs(t - o) for t, o in zip(theirs, ours, strict=True))
