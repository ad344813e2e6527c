"""PEFT models as a trainer has them, and the plain models that they stand for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def base_model(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)


def peft_model(model_path: Path, *, seed: int | None = None, **config: Any) -> Any:
    """A PEFT model of the served one; without a seed a fresh one, which changes nothing."""
    usual: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    chosen = LoraConfig(**{"task_type": "CAUSAL_LM", **usual, **config})
    model = get_peft_model(base_model(model_path), chosen)
    return model if seed is None else train(model, seed)


@torch.no_grad()
def train(model: Any, seed: int, scale: float = 0.1) -> Any:
    """Gives every LoRA matrix other values, far enough for other log-probs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def merged(model: Any) -> Any:
    """The plain model that a PEFT model stands for now."""
    return copy.deepcopy(model).merge_and_unload()
