"""Scores one prompt on every server and in the trainer's model, to compare the weights behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import ResponseError
from ..source.expected import Dtypes
from ..source.named import unwrap

NUM_TOKENS = 32
SEED = 20_261_121


def probe_ids(vocab_size: int) -> list[int]:
    """The prompt: ids drawn from the whole vocabulary, the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    ids: list[int] = torch.randint(vocab_size - 1, (NUM_TOKENS,), generator=generator).tolist()
    return ids


def probe_body(ids: list[int], salt: str, lora: str | None = None) -> dict[str, Any]:
    """The body of ``/generate`` that scores ``ids``, under a salt that no cache has seen.

    Args:
        ids: the prompt.
        salt: the salt.
        lora: the adapter to score with.
    """
    adapter = {} if lora is None else {"lora_path": lora}
    return {
        **adapter,
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "stream": False,
        "extra_key": salt,
    }


def parse_probe(answer: Any, ids: list[int]) -> list[float]:
    """Log-probs of ``ids[1:]``; the first token has none.

    Raises:
        ResponseError: the answer scores something else.
    """
    try:
        rows = answer["meta_info"]["input_token_logprobs"]
        scored = [row[1] for row in rows]
        log_probs = [float(row[0]) for row in rows[1:]]
    except (KeyError, TypeError, IndexError) as error:
        raise ResponseError(f"the probe got no scores: {str(answer)[:200]!r}.") from error
    if scored != ids or not all(map(math.isfinite, log_probs)):
        raise ResponseError(f"the probe's scores are of other tokens, or not finite: {rows[:4]}.")
    return log_probs


@torch.no_grad()
def reference_log_probs(
    model: nn.Module, weights: Mapping[str, torch.Tensor], dtypes: Dtypes, ids: list[int]
) -> list[float]:
    """What the trainer's model gives ``ids[1:]``, computed with the weights as they were sent.

    Args:
        model: the model, also in a wrapper.
        weights: what was sent, by the names of its parameters; it has others of its own.
        dtypes: dtypes in which it was sent.
        ids: the prompt.
    """
    model = unwrap(model)
    sent = {name: tensor.detach().to(dtypes.of(name)) for name, tensor in weights.items()}
    inputs = torch.tensor([ids], dtype=torch.int64, device=next(iter(sent.values())).device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits = torch.func.functional_call(
            model, sent, (inputs,), {"use_cache": False}, tie_weights=True
        ).logits
    finally:
        for module in training:  # each by itself: a trainer may keep some of them in eval mode
            module.training = True
    scores = logits[0, :-1].float().log_softmax(-1)
    values: list[float] = scores.gather(-1, inputs[0, 1:, None]).squeeze(-1).tolist()
    return values
