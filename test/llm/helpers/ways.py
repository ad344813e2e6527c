"""Configurations of each way to push."""

from __future__ import annotations

from typing import Any

from torchrl_sglang import WeightSyncConfig

SMALL = 1 << 18


def config(method: Any, **more: Any) -> WeightSyncConfig:
    return WeightSyncConfig(method=method, **{"bucket_bytes": SMALL, **more})
