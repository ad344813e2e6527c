"""Helpers of the tests that talk to a real server."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme
from torchrl_sglang.errors import ServiceError

# Small enough for a laptop; the rest are the library's own defaults for a CPU. bf16 logits of 8 to
# 16 are 0.06 apart, which would hide an error of log-probs: with the head in float32 (on both
# sides, see `hf_log_probs`) a bound of 0.02 means something on a peaked distribution too.
CPU_SERVER_ARGS = {
    "max_total_tokens": 16384,
    "random_seed": 0,
    "enable_fp32_lm_head": True,
}


@torch.no_grad()
def make_peaked_model(path: Path, *, seed: int = 0) -> Path:
    """A tiny Qwen2 with next-token distributions as peaked as a trained model's.

    Its layers are scaled down, so that bf16 noise (two right implementations differ by it) stays
    far below the differences that the tests look for, and its logits are scaled up.
    """
    make_tiny_model(path, seed=seed, hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.mul_(0.5)
    model.model.norm.weight.mul_(3.0)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def hf_log_probs(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probs of ``response`` after ``prompt`` in a Hugging Face forward of the same weights."""
    ids = torch.tensor([[*prompt, *response]])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    logits = hidden.float() @ model.lm_head.weight.float().T
    scores = (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
    return scores.squeeze(-1).tolist()


def worst_error(model: Any, prompts: Any, completions: Any, temperature: float = 1.0) -> float:
    """Largest difference between reported and Hugging Face log-probs over all tokens."""
    return max(
        abs(theirs - ours)
        for prompt, completion in zip(prompts, completions, strict=True)
        for theirs, ours in zip(
            completion.log_probs,
            hf_log_probs(model, prompt, completion.output_ids, temperature),
            strict=True,
        )
    )


def perturb(model: Any, seed: int, scale: float = 0.05) -> Any:
    """Moves every weight a little, as optimiser steps would; the model stays in bf16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale * parameter.std()
            parameter.add_(noise.to(parameter.dtype))
    return model


def ready_weights(service: AsyncSGLang, model_path: Path) -> None:
    """Brings a server back to its checkpoint, whatever state a test left it in."""
    for worker in service.workers:
        with contextlib.suppress(ServiceError):
            worker.post("/end_weight_update")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    scheme = SGLangWeightSyncScheme(service)
    scheme.init_on_sender()
    scheme.connect()
    scheme.send(model)
    scheme.close()
