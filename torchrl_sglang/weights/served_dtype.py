"""The dtypes that a server holds its weights in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..errors import WeightsError
from ..info import WorkerInfo
from .expected import Expected

NAMED = {"half": torch.float16, "float": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """The dtypes in which weights travel.

    Attributes:
        served: the servers' dtype.
        wide: names of what goes in float32 to all servers; see `Expected.wide`.
    """

    served: torch.dtype
    wide: Collection[str] = ()

    def of(self, name: str) -> torch.dtype:
        """The dtype of one of them."""
        return torch.float32 if name in self.wide else self.served


def served_dtype(info: WorkerInfo, expected: Expected) -> torch.dtype:
    """The dtype of a server's weights.

    Source: SGLang's ``configs/model_config.py``: ``auto`` is the config's dtype, but float32
    becomes float16, and bfloat16 for Gemma.
    """
    if info.dtype != "auto":
        named = NAMED.get(info.dtype) or getattr(torch, info.dtype, None)
        if not isinstance(named, torch.dtype):
            raise WeightsError(f"{info.url} serves dtype {info.dtype!r}, which torch lacks.")
        return named
    if expected.dtype is not torch.float32:
        return expected.dtype
    is_gemma = (info.model_type or "").startswith("gemma")
    return torch.bfloat16 if is_gemma else torch.float16
