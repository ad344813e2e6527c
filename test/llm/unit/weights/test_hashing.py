"""Our two hashes of tensors against SGLang's own, and against a second writing of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.by_sglang import by_sglang
from torchrl_sglang.weights.verify import hashing
from torchrl_sglang.weights.verify.checksums import tensor_hash
from torchrl_sglang.weights.verify.hashing import Sha256Hash, WordHash

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def word_hash(raw: bytes) -> str:
    """The hash of CUDA tensors, written a second time: numpy, all words at once."""
    padded = raw + bytes(-len(raw) % 4)
    words = np.frombuffer(padded, np.uint32)
    at = np.arange(len(words), dtype=np.uint32)
    halves = []
    seed = 0x243F6A88
    for factor, start, turn in (
        (0x27D4EB2D, seed, 15),
        (0x165667B1, seed * 0x9E3779B1 ^ 0xDEADBEEF, 13),
    ):
        place = at * np.uint32(factor) + np.uint32(start & 0xFFFFFFFF)
        place ^= at << np.uint32(turn) | at >> np.uint32(32 - turn)
        mixed = np.pad(murmur(words ^ place), (0, -len(words) % 8192)).reshape(-1, 8192)
        tiles = mixed.sum(1, dtype=np.uint32) ^ np.uint32(len(padded) & 0xFFFFFFFF)
        halves.append(murmur(tiles).astype(np.uint64))
    x = int((halves[0] << np.uint64(32) | halves[1]).sum(dtype=np.uint64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    return f"{x ^ x >> 31:016x}"


def murmur(x: np.ndarray) -> np.ndarray:
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_tensors() -> list[torch.Tensor]:
    """Sizes about one tile (8192 words) and one chunk, odd numbers of bf16, views."""
    make = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(size, generator=make).to(dtype)
        for size in (1, 2, 3, 8191, 8192, 8193, 16385, 70001)
        for dtype in DTYPES
    ]
    table = torch.randn(9, 14, generator=make).bfloat16()
    return [*tensors, table.t(), table[:, 3:8], torch.tensor(1.5), torch.empty(0), torch.zeros(9)]


@pytest.mark.slow
def test_the_gpu_hash_is_sglangs_own(tmp_path: Path) -> None:
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "tensors.pt")
    theirs = by_sglang("hash", tmp_path / "tensors.pt")
    assert [tensor_hash(tensor, on_gpu=True) for tensor in tensors] == theirs
    # The second writing, which the tests below use for what the interpreter is too slow for.
    assert [word_hash(raw_bytes(tensor)) if tensor.numel() else "0" * 16 for tensor in tensors] == (
        theirs
    )


def test_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions whose rotation wraps around, over many chunks of any size, the GPU's too."""
    make = torch.Generator().manual_seed(1)
    large = torch.randn(9_500_001, generator=make).bfloat16()
    expected = word_hash(raw_bytes(large))
    for words in (hashing.CPU_CHUNK_WORDS, hashing.GPU_CHUNK_WORDS, 8192):
        monkeypatch.setattr(hashing, "CPU_CHUNK_WORDS", words)
        assert tensor_hash(large, on_gpu=True) == expected


@pytest.mark.parametrize("pieces", [[1, 2, 3], [5, 40_000, 7, 300_001], [0, 9]])
def test_pieces_add_up(pieces: list[int]) -> None:
    """However the bytes come, the hash is that of all of them."""
    make = torch.Generator().manual_seed(2)
    parts = [torch.randint(256, (n,), generator=make, dtype=torch.uint8) for n in pieces]
    words, sha = WordHash(sum(pieces), torch.device("cpu")), Sha256Hash()
    for part in parts:
        words.update(part)
        sha.update(part)
    whole = raw_bytes(torch.cat(parts))
    assert words.hexdigest() == word_hash(whole)
    assert sha.hexdigest() == hashlib.sha256(whole).hexdigest()[:16]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_bit_and_every_place_counts(on_gpu: bool) -> None:
    tensor = torch.randn(3 * 8192, generator=torch.Generator().manual_seed(3)).bfloat16()
    hashes = {tensor_hash(tensor, on_gpu=on_gpu)}
    changes = [(index, bit) for index in (0, 8191, 8192, 24575) for bit in range(16)]
    for index, bit in changes:
        changed = tensor.clone()
        changed.view(torch.int16)[index] ^= torch.tensor(1 << bit).to(torch.int16)
        hashes.add(tensor_hash(changed, on_gpu=on_gpu))
    swapped = tensor[torch.tensor([1, 0, *range(2, 3 * 8192)])]
    tiles = tensor.view(3, 8192)[[1, 0, 2]].reshape(-1)
    longer = torch.cat([tensor, tensor.new_zeros(2)])
    for other in (swapped, tiles, longer):
        hashes.add(tensor_hash(other, on_gpu=on_gpu))
    assert len(hashes) == 1 + len(changes) + 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    """The same hash on the trainer's GPU, and SGLang's kernel itself where it is installed."""
    tensors = [tensor.cuda() for tensor in some_tensors()]
    ours = [tensor_hash(tensor, on_gpu=True) for tensor in tensors]
    assert ours == [tensor_hash(tensor.cpu(), on_gpu=True) for tensor in tensors]
    large = torch.randn(50_000_001, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert tensor_hash(large, on_gpu=True) == word_hash(raw_bytes(large.cpu()))
    assert torch.cuda.max_memory_allocated() - before < 512 << 20
