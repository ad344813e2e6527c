"""LoRA adapters written by hand: files as PEFT writes them, and the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], *, without: str = "", **config: Any
) -> Path:
    """Writes an adapter's folder; ``without`` leaves out one key of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    whole = {key: value for key, value in {**CONFIG, **config}.items() if key != without}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def random_adapter(
    folder: Path,
    model: Any,
    *,
    seed: int,
    rank: int = 8,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    scale: float = 0.1,
) -> Path:
    """An adapter of ``model`` with random weights, none of them zero as a fresh one's B is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            out_size, in_size = module.weight.shape
            tensors[f"{PREFIX}{name}.lora_A.weight"] = draw(rank, in_size)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = draw(out_size, rank)
    return write_adapter(folder, tensors, r=rank, target_modules=list(targets))


@torch.no_grad()
def merge_adapter(model: Any, folder: Path) -> Any:
    """Adds what an adapter stands for to the model's weights."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            delta = b.float() @ a.float() * config["lora_alpha"] / config["r"]
            weight = model.get_parameter(name.removeprefix(PREFIX).replace(".lora_A", ""))
            weight.copy_((weight.float() + delta).to(weight.dtype))
    return model
