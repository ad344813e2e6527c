"""Hashes a tensor in SGLang's two ways, piece by piece, on whatever device the pieces are.

``/weights_checker`` answers 16 hex digits per parameter. Tensors on a CUDA device are hashed as
32-bit words, each mixed with its position; all others by SHA-256. Both read the tensor's bytes in
row-major order, so a parameter that is fused of others can be hashed without being built.

Source: ``srt/managers/mm_utils.py`` (``tensor_hash``) of SGLang 0.5.15 to 0.5.23, and the
``gpu_tensor_hash`` that it calls; it is the same in all of them.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Protocol

import torch

TILE_WORDS = 8192  # words that one block of SGLang's kernel adds up; not a matter of speed
# Words that are worked on at once, powers of two. On a CPU the most that torch does not divide
# among threads: there, waiting for threads on two busy cores took several times as long as work.
CPU_CHUNK_WORDS = 1 << 14
GPU_CHUNK_WORDS = 1 << 22

SEED_1 = 0x243F6A88
SEED_2 = (SEED_1 * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF
STREAMS = ((0x27D4EB2D, SEED_1, 15), (0x165667B1, SEED_2, 13))  # factor, seed, rotation
MIX_1, MIX_2 = 0x85EBCA6B, 0xC2B2AE35  # MurmurHash3's finalizer
SPLIT_1, SPLIT_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's
MASK_64 = (1 << 64) - 1


class Hash(Protocol):
    """A hash in progress."""

    def update(self, raw: torch.Tensor) -> None:
        """Takes the next bytes, a 1-D uint8 tensor."""

    def hexdigest(self) -> str:
        """16 hex digits; nothing may be added afterwards."""


class Sha256Hash:
    """The first 8 bytes of SHA-256: how SGLang hashes tensors that are not on a CUDA device."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, raw: torch.Tensor) -> None:
        """Takes the next bytes, a 1-D uint8 tensor."""
        self._hash.update(raw.cpu().numpy().data)

    def hexdigest(self) -> str:
        """16 hex digits."""
        return self._hash.hexdigest()[:16]


class WordHash:
    """The hash of tensors on a CUDA device, in torch's operations, on the device of the pieces.

    Integers are int32 and wrap around, which torch's do on every device. Needs memory for about
    ten times `CPU_CHUNK_WORDS` or `GPU_CHUNK_WORDS` words, and waits for a GPU once, at the end.

    Args:
        num_bytes: bytes of the whole tensor, which SGLang mixes into every tile. At most 8 GiB:
            beyond that SGLang's own positions overflow.
        device: where the pieces are.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self._seen = 0  # words
        self._rest = torch.empty(0, dtype=torch.uint8, device=device)
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._chunk = CPU_CHUNK_WORDS if device.type == "cpu" else GPU_CHUNK_WORDS
        self._length = _signed(_words(num_bytes) * 4)

    def update(self, raw: torch.Tensor) -> None:
        """Takes the next bytes, a 1-D uint8 tensor."""
        raw = torch.cat([self._rest, raw]) if self._rest.numel() else raw
        chunk_bytes = self._chunk * 4
        whole = raw.numel() // chunk_bytes * chunk_bytes
        for start in range(0, whole, chunk_bytes):
            self._add(_as_words(raw[start : start + chunk_bytes]))
        self._rest = raw[whole:]

    def hexdigest(self) -> str:
        """16 hex digits."""
        if self._rest.numel():
            self._add(_as_words(torch.nn.functional.pad(self._rest, (0, -self._num_bytes % 4))))
        if not self._num_bytes:
            return f"{0:016x}"
        x = int(self._total) & MASK_64
        x = (x ^ x >> 30) * SPLIT_1 & MASK_64
        x = (x ^ x >> 27) * SPLIT_2 & MASK_64
        return f"{x ^ x >> 31:016x}"

    def _add(self, words: torch.Tensor) -> None:
        """Adds the tiles of ``words``, int32 [at most a chunk]; all but the last are full."""
        count = words.numel()
        tables = _tables(self._chunk, words.device)
        high, low = (
            self._tiles(words, products[:count], turned[:count], stream)
            for stream, (products, turned) in zip(STREAMS, tables, strict=True)
        )
        self._total += ((high.long() << 32) | (low.long() & 0xFFFFFFFF)).sum()
        self._seen += count

    def _tiles(
        self,
        words: torch.Tensor,
        products: torch.Tensor,
        turned: torch.Tensor,
        stream: tuple[int, int, int],
    ) -> torch.Tensor:
        """One of the two 32-bit hashes of each tile, int32 [tiles]."""
        factor, seed, turn = stream
        # A chunk is a power of two, so that its first position and the positions within it share
        # no bit: what `_tables` holds needs only these two constants.
        mixed = products + _signed(self._seen * factor + seed)
        mixed ^= turned
        mixed ^= _signed(_rotated_int(self._seen & 0xFFFFFFFF, turn))
        mixed ^= words
        _mix(mixed)
        if mixed.numel() % TILE_WORDS:
            mixed = torch.nn.functional.pad(mixed, (0, -mixed.numel() % TILE_WORDS))
        tiles = mixed.view(-1, TILE_WORDS).sum(1, dtype=torch.int32)
        tiles ^= self._length
        return _mix(tiles)


@functools.lru_cache(maxsize=2)
def _tables(num_words: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each stream, of each position in a chunk: its product and its rotation, int32."""
    positions = torch.arange(num_words, dtype=torch.int32, device=device)
    return [
        (
            positions * _signed(factor),
            (positions << turn) | ((positions >> (32 - turn)) & ((1 << turn) - 1)),
        )
        for factor, _, turn in STREAMS
    ]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer, in place; the masks make the shifts logical ones."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(MIX_1)
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= _signed(MIX_2)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _as_words(raw: torch.Tensor) -> torch.Tensor:
    """Bytes as int32; a view that begins at an odd address can't be one, and is copied."""
    aligned = raw.storage_offset() % 4 == 0 and raw.data_ptr() % 4 == 0
    return (raw if aligned else raw.clone()).view(torch.int32)


def _words(num_bytes: int) -> int:
    return -(-num_bytes // 4)


def _signed(value: int) -> int:
    """The int32 with the same low 32 bits."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def _rotated_int(value: int, turn: int) -> int:
    return (value << turn | value >> (32 - turn)) & 0xFFFFFFFF
