"""Tiny mixtures of experts, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
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


def glm4_moe(**config: Any) -> Any:
    """A buffer of each layer steers which experts are taken; it stays float32 in a checkpoint."""
    sizes = {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "head_dim": 32,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    model = _made(Glm4MoeForCausalLM, Glm4MoeConfig(**{**SIZES, **sizes, **config}))
    for name, _ in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # Larger than any score, and their differences smaller than a bfloat16 of that size has.
            values = 100 + 0.05 * torch.randperm(8, generator=torch.Generator().manual_seed(0))
            model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = values
    return model


def minimax_m2() -> Any:
    """Its buffers have other names in its checkpoint."""
    sizes = {"intermediate_size": 32, "head_dim": 32, "num_local_experts": 4}
    return _made(MiniMaxM2ForCausalLM, MiniMaxM2Config(**SIZES, **sizes))


def ernie4_5_moe() -> Any:
    """Parameters that stay float32 in a checkpoint: its routers'."""
    sizes = {**SIZES, "intermediate_size": 64, "moe_intermediate_size": 32, "moe_num_experts": 4}
    del sizes["num_experts_per_tok"]
    config = Ernie4_5_MoeConfig(**sizes, moe_k=2, moe_layer_start_index=1)
    model = _made(Ernie4_5_MoeForCausalLM, config)
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape)
    return model


def _made(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).to(torch.bfloat16).eval()
