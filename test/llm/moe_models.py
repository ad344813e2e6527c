"""Tiny mixtures of experts, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def qwen3_moe(**config: Any) -> Any:
    """Eight experts a layer."""
    sizes = {"moe_intermediate_size": 32, "head_dim": 32, "num_experts": 8, "norm_topk_prob": True}
    return _made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**SIZES, **sizes, **config}))


def mixtral() -> Any:
    """Its experts have other names in its checkpoint, and lie elsewhere."""
    return _made(
        MixtralForCausalLM, MixtralConfig(**SIZES, intermediate_size=64, num_local_experts=4)
    )


def olmoe() -> Any:
    """One more."""
    return _made(OlmoeForCausalLM, OlmoeConfig(**SIZES, intermediate_size=64, num_experts=4))


def _made(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).to(torch.bfloat16).eval()
