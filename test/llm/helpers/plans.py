"""Fleets that are planned and never started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrl_sglang import ServerConfig
from torchrl_sglang.launch.plan import plan_fleet


def model_folder(folder: Path) -> str:
    """A folder that looks like a model."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return str(folder)


def server(**changes: Any) -> ServerConfig:
    return ServerConfig(**{"model_path": "/m", "device": "cuda", **changes})


# Fleets


def fleet(model: str, **changes: Any) -> tuple[ServerConfig, ...]:
    base = server(model_path=model, **changes.pop("server", {}))
    arguments = {"num_replicas": 1, "cuda_devices": None, "ports": None, **changes}
    return plan_fleet(base, **arguments)
