"""Computes what the servers' ``/weights_checker`` should answer, and reads what it answered.

It answers one hash per parameter and rank, in the *server's* layout: q, k and v (and gate and up)
are one matrix, and each tensor-parallel rank has its part. Where the layout is known (`layout`), a
rank's parameters are hashed here the same way (`hashing`), so that equal hashes mean equal bytes.
Elsewhere, engines that got the same broadcast can at least be compared with each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import Rank, Shard, Slice, shard_of
from ..source.expected import Dtypes
from ..source.lazy import placeholders
from .hashing import Hash, Sha256Hash, WordHash

CHUNK_BYTES = 1 << 26  # what is cast and laid out at once, and so the extra memory, at most twice
DRAFT = re.compile(r"draft(_\w+)?\.")  # what SGLang puts before names of a draft model

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class RankChecksums:
    """What one rank of an engine answered.

    Attributes:
        tp_rank: its number.
        checksums: 16 hex digits by parameter, a draft model's left out.
    """

    tp_rank: int
    checksums: Mapping[str, str]


def parse_checksums(answer: Any, tp_size: int, num_copies: int = 1) -> list[RankChecksums]:
    """Reads an answer to ``{"action": "checksum"}``, in the order of the ranks.

    Args:
        answer: the JSON.
        tp_size: tensor-parallel ranks of the server.
        num_copies: how often each rank is in it at least: once for each data-parallel replica.
            Where attention is data-parallel, each of its groups may answer for all ranks, and how
            many those are is not always said by the server's info.

    Raises:
        ValueError: it is not one, or not every rank is in it, as often as the others.
    """
    try:
        ranks = [
            RankChecksums(
                tp_rank=_tp_rank(rank["parallelism_info"]),
                checksums={n: h for n, h in rank["checksums"].items() if not DRAFT.match(n)},
            )
            for rank in answer["ranks"]
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"no checksums in {str(answer)[:200]!r}") from error
    ranks.sort(key=lambda rank: rank.tp_rank)
    found = [rank.tp_rank for rank in ranks]
    copies = max(num_copies, len(found) // tp_size)
    if found != sorted([*range(tp_size)] * copies):
        times = f", {copies} times each" if copies > 1 else ""
        raise ValueError(f"checksums of ranks {found} instead of 0 to {tp_size - 1}{times}")
    return ranks


def _tp_rank(info: Any) -> int:
    """From 0.5.20 or so on there is one entry for each model on the rank, target and drafts."""
    return int((info[0] if isinstance(info, list) else info)["tp_rank"])


def expected_checksums(
    server_names: Iterable[str],
    weights: Weights,
    *,
    dtypes: Dtypes,
    rank: Rank,
    on_gpu: bool,
    device: torch.device | None = None,
) -> dict[str, str]:
    """The hashes that a rank answers if it holds exactly what was sent.

    Args:
        server_names: the parameters that it hashed; `shards.why_unknown` has no objection to them.
        weights: what was sent, under the checkpoint's names.
        dtypes: dtypes in which the server holds them.
        rank: which rank of how many.
        on_gpu: the server hashes as it does on CUDA devices, not as elsewhere.
        device: where to hash; by default where each tensor is.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in placeholders(weights).items()}
    shards = {name: shard_of(name, shapes, rank) for name in server_names}
    return {
        name: _shard_hash(shard, weights, dtypes.of(shard.slices[0].name), on_gpu, device)
        for name, shard in shards.items()
    }


def mismatches(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Names whose hashes differ, or that only one of the two has."""
    return [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]


def disagreements(engines: Sequence[Sequence[RankChecksums]]) -> dict[int, list[str]]:
    """Names that the same ranks of several engines hash differently, or not all of them have.

    Equal engines may still all be wrong: they show only that a broadcast reached all alike.

    Args:
        engines: answers of engines with the same tp_size, dtype and kind of device.

    Returns:
        Names by tp_rank; ranks that agree are left out.
    """
    by_rank: dict[int, list[Mapping[str, str]]] = {}
    for engine in engines:
        for rank in engine:
            by_rank.setdefault(rank.tp_rank, []).append(rank.checksums)
    found = {
        tp_rank: [
            name for name in {n: None for c in all_sums for n in c} if _differs(name, all_sums)
        ]
        for tp_rank, all_sums in sorted(by_rank.items())
    }
    return {tp_rank: names for tp_rank, names in found.items() if names}


def _differs(name: str, all_sums: Sequence[Mapping[str, str]]) -> bool:
    return len({sums.get(name) for sums in all_sums}) > 1


def tensor_hash(tensor: torch.Tensor, *, on_gpu: bool = False) -> str:
    """SGLang's hash of a whole tensor, 16 hex digits; for ``on_gpu`` see `expected_checksums`."""
    whole = Slice(name="", dim=0, start=0, length=tensor.shape[0] if tensor.ndim else 1)
    return _shard_hash(Shard(slices=(whole,)), {"": tensor}, tensor.dtype, on_gpu, None)


def _shard_hash(
    shard: Shard,
    weights: Weights,
    dtype: torch.dtype,
    on_gpu: bool,
    device: torch.device | None,
) -> str:
    views = _views(shard, weights)
    device = device or views[0].device
    num_bytes = sum(view.numel() for view in views) * dtype.itemsize
    digest: Hash = WordHash(num_bytes, device) if on_gpu else Sha256Hash()
    for view in views:
        for raw in _raw_chunks(view, dtype, device):
            digest.update(raw)
    return digest.hexdigest()


def _views(shard: Shard, weights: Weights) -> list[torch.Tensor]:
    """What a shard consists of, without copying any of it."""
    views = []
    for part in shard.slices:
        tensor = weights[part.name].detach()
        tensor = tensor if tensor.ndim else tensor.reshape(1)
        views.append(tensor.narrow(part.dim, part.start, part.length))
    if shard.zero_rows:
        row = views[-1].shape[1:]
        views.append(views[-1].new_zeros(1).expand(shard.zero_rows, *row))
    return views


def _raw_chunks(
    view: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor]:
    """The bytes of a tensor in ``dtype``, in row-major order, as 1-D uint8 tensors."""
    row_bytes = view[:1].numel() * dtype.itemsize
    rows = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, view.shape[0], rows):
        block = view[start : start + rows]
        if block.numel():
            yield block.to(device, dtype).contiguous().reshape(-1).view(torch.uint8)
