"""The distribution that SGLang samples from, computed from Hugging Face's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchrl_sglang import SamplingParams


@torch.no_grad()
def hf_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Logits for each token of ``response``, float32 ``[R, vocabulary]``; a float32 head."""
    ids = torch.tensor([[*prompt, *response]])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return hidden.float() @ model.lm_head.weight.float().T


def full_log_probs(
    logits: torch.Tensor,
    response: Sequence[int],
    sampling: SamplingParams,
    *,
    stops: Sequence[int] = (),
    allowed: Sequence[Sequence[int] | None] = (),
) -> torch.Tensor:
    """Log-probs of every token before truncation, ``[R, vocabulary]``.

    Args:
        logits: what `hf_logits` gives.
        response: the sampled tokens, on which penalties depend.
        sampling: how they were sampled.
        stops: EOS and stop tokens, which ``min_new_tokens`` holds back.
        allowed: per position, the ids that a grammar allows; None for all.
    """
    logits = logits.clone()
    for position in range(len(response)):
        counts = torch.zeros(logits.shape[-1])
        for token in response[:position]:
            counts[token] += 1
        row, seen = logits[position], counts > 0
        row -= sampling.frequency_penalty * counts + sampling.presence_penalty * seen
        factor = torch.where(row < 0, sampling.repetition_penalty, 1 / sampling.repetition_penalty)
        row[seen] *= factor[seen]
        for token, bias in (sampling.logit_bias or {}).items():
            row[token] += bias
        if position < sampling.min_new_tokens:
            row[list(stops)] = -torch.inf
        if position < len(allowed) and allowed[position] is not None:
            mask = torch.ones_like(row, dtype=torch.bool)
            mask[list(allowed[position])] = False
            row[mask] = -torch.inf
    return (logits / (1.0 if sampling.greedy else sampling.temperature)).log_softmax(-1)


def chosen(log_probs: torch.Tensor, response: Sequence[int]) -> torch.Tensor:
    """Log-probs of the sampled tokens, ``[R]``."""
    return log_probs.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def renormalised(log_probs: torch.Tensor, kept: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probs among the ids kept at each position; all others are -inf."""
    mask = torch.full_like(log_probs, -torch.inf)
    for row, ids in zip(mask, kept, strict=True):
        row[list(ids)] = 0
    return (log_probs + mask).log_softmax(-1)


def assert_close(
    got: torch.Tensor, expected: torch.Tensor, sampling: SamplingParams | None = None
) -> None:
    """Log-probs agree up to bf16's noise, which a temperature below 1 magnifies."""
    temperature = 1.0 if sampling is None or sampling.greedy else sampling.temperature
    torch.testing.assert_close(got, expected, atol=0.02 / min(1.0, temperature), rtol=0)


def check_kept(log_probs: torch.Tensor, kept: Sequence[int], sampling: SamplingParams) -> None:
    """Checks the ids that top-k, top-p and min-p kept at one position.

    Tokens this close to a limit may fall on either side of it, for bf16's sake.
    """
    slack = 0.03
    order = log_probs.argsort(descending=True)
    probs = log_probs[order].exp()
    before = probs.cumsum(-1) - probs  # the mass of the likelier tokens
    limit = sampling.top_k if sampling.top_k > 0 else len(order)
    least = log_probs[order[min(limit, len(order)) - 1]]
    surely = (
        (log_probs[order] > least + slack)
        & (before < sampling.top_p - slack)
        & (probs > sampling.min_p * probs[0] * (1 + slack))
    )
    possibly = (
        (log_probs[order] > least - slack)
        & (before < sampling.top_p + slack)
        & (probs > sampling.min_p * probs[0] * (1 - slack))
    )
    assert set(order[surely].tolist()) <= set(kept) <= set(order[possibly].tolist())
    assert 1 <= len(kept) <= limit
