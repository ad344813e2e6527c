"""The dtype that a server holds its weights in."""

from __future__ import annotations

import torch

from ..errors import WeightsError
from ..info import WorkerInfo
from .expected import Expected

DTYPES = {"half": torch.float16, "float": torch.float32}


def served_dtype(info: WorkerInfo, expected: Expected) -> torch.dtype:
    """The dtype of a server's weights.

    Source: SGLang's ``configs/model_config.py``: ``auto`` is the config's dtype, but float32
    becomes float16, and bfloat16 for Gemma.
    """
    if info.dtype != "auto":
        named = DTYPES.get(info.dtype) or getattr(torch, info.dtype, None)
        if not isinstance(named, torch.dtype):
            raise WeightsError(f"{info.url} serves dtype {info.dtype!r}, which torch lacks.")
        return named
    if expected.dtype is not torch.float32:
        return expected.dtype
    is_gemma = (info.model_type or "").startswith("gemma")
    return torch.bfloat16 if is_gemma else torch.float16
