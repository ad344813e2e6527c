"""Divides tensors into buckets, each sent in one broadcast: pure functions over names and sizes.

How large a bucket may be is ``WeightSyncConfig.bucket_bytes``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch

FLATTENED = "flattened_bucket"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor as it is announced.

    Attributes:
        name: Hugging Face's name.
        dtype: dtype in which it travels.
        shape: its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.item_bytes


def spec_of(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorSpec:
    """How a tensor is announced that travels in ``dtype``."""
    return TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape))


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors that travel in one broadcast, end to end, as raw bytes in this order."""

    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the broadcast."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @classmethod
    def probe(cls, name: str) -> Self:
        """A bucket of one float32 element."""
        spec = TensorSpec(name=name, dtype=torch.float32, shape=(1,))
        return cls(tensors=(spec,))

    def announcement(self, group_name: str) -> dict[str, Any]:
        """The body of ``/update_weights_from_distributed``."""
        return {
            "names": [tensor.name for tensor in self.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors],
            "shapes": [list(tensor.shape) for tensor in self.tensors],
            "group_name": group_name,
            "load_format": FLATTENED,
            # The defaults are unsafe: a flush can fail after the weights changed, and the version
            # would be set before every engine has everything.
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": None,
        }


# Multi-head latent attention: SGLang fuses the first two, derives what it computes with from the
# third and its scales, and joins parts of the last, all within the call that loads them. Divided,
# they would be lost in silence.
# Source: ``models/deepseek_common/deepseek_weight_loader.py`` of SGLang 0.5.23.
TOGETHER = re.compile(r"(.*\.self_attn)\.(?:q_a_proj|kv_a_proj_with_mqa|kv_b_proj|indexer)\.")


def plan_buckets(tensors: Iterable[TensorSpec], bucket_bytes: int) -> list[Bucket]:
    """Divides tensors into buckets of at most ``bucket_bytes``; a larger tensor is one alone.

    Tensors that a server has to load together (`TOGETHER`) are never divided, even where they are
    more than that. Within a bucket wider elements come first: the server refuses a tensor whose
    offset is not a multiple of its element size, and any sum of wider elements is.
    """
    buckets: list[Bucket] = []
    held: list[TensorSpec] = []
    size = 0
    for group in _groups(tensors):
        added = sum(tensor.num_bytes for tensor in group)
        if held and size + added > bucket_bytes:
            buckets.append(_bucket(held))
            held, size = [], 0
        held += group
        size += added
    if held:
        buckets.append(_bucket(held))
    return buckets


def _groups(tensors: Iterable[TensorSpec]) -> Iterable[list[TensorSpec]]:
    groups: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        together = TOGETHER.match(tensor.name)
        groups.setdefault(together[1] if together else tensor.name, []).append(tensor)
    return sorted(groups.values(), key=lambda group: -max(t.item_bytes for t in group))


def _bucket(tensors: list[TensorSpec]) -> Bucket:
    return Bucket(tensors=tuple(sorted(tensors, key=lambda t: -t.item_bytes)))
