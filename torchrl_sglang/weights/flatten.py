"""Tensors to the bytes of one broadcast, in the dtype that the server holds them in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import WeightsError
from ..info import WorkerInfo
from .expected import Expected
from .plan import Bucket, TensorSpec

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


def spec_of(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorSpec:
    """How a tensor is announced."""
    return TensorSpec(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        item_bytes=dtype.itemsize,
    )


def flattened(
    bucket: Bucket,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The bucket as one 1-D uint8 tensor."""
    return torch.cat(
        [
            weights[spec.name].detach().to(device, dtype).contiguous().reshape(-1).view(torch.uint8)
            for spec in bucket.tensors
        ]
    )
