"""A model whose checksums are worked out by hand."""

from __future__ import annotations

from typing import Any

import torch

from helpers.worker_infos import worker_info
from torchrl_sglang.servers.info import WorkerInfo
from torchrl_sglang.weights.layout import EMBEDDING

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."

SHAPES = {
    EMBEDDING: (70, 8),
    **{f"{ATTENTION}{part}_proj.weight": (16, 8) for part in "qkv"},
    f"{ATTENTION}o_proj.weight": (8, 16),
    **{f"{MLP}{part}_proj.weight": (128, 8) for part in ("gate", "up")},
    f"{MLP}down_proj.weight": (8, 128),
}


class Config:
    num_attention_heads = num_key_value_heads = 4
    model_type = "llama"


def make(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in SHAPES.items()}


def worker(**changes: Any) -> WorkerInfo:
    return worker_info(**{"url": "http://a", "device": "cpu", **changes})
