"""Our own hashes of the weights, in the layout in which SGLang holds them.

SGLang's ``/weights_checker`` answers one hash per parameter of the *server's* layout, where q, k
and v (and gate and up) are fused into one matrix. On CPU a hash is the first 8 bytes of a SHA-256
over the parameter's bytes. For the Llama family of layouts, on one rank, the fused parameters are
built here and hashed the same way, so that equal hashes mean equal weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

# A fused parameter of the server, and the parameters that it is made of, in order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
VOCAB_MULTIPLE = 64  # SGLang pads embeddings with zero rows to a multiple of this
VOCAB_PARAMETERS = ("embed_tokens.weight", "lm_head.weight")


def parts_of(server_name: str) -> list[str]:
    """The checkpoint's names behind one parameter of the server."""
    for fused, parts in FUSED.items():
        marker = f".{fused}."
        if marker in server_name:
            return [server_name.replace(marker, f".{part}.") for part in parts]
    return [server_name]


def can_check(server_names: Iterable[str], weight_names: Iterable[str]) -> bool:
    """Whether the server's parameters are built of the checkpoint's, and of all of them."""
    parts = {part for name in server_names for part in parts_of(name)}
    return bool(parts) and parts == set(weight_names)


def mismatches(
    server_checksums: Mapping[str, str], weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> list[str]:
    """Names of the server's parameters that do not hold what was sent.

    Args:
        server_checksums: what one rank of the server answered.
        weights: what was sent, under the checkpoint's names.
        dtype: dtype in which the server holds them.
    """
    return [
        name
        for name, theirs in server_checksums.items()
        if theirs not in _hashes(name, weights, dtype)
    ]


def _hashes(name: str, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Iterable[str]:
    parts = [weights[part].detach().to("cpu", dtype) for part in parts_of(name)]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    yield tensor_hash(whole)
    if name.endswith(VOCAB_PARAMETERS) and whole.shape[0] % VOCAB_MULTIPLE:
        rows = VOCAB_MULTIPLE - whole.shape[0] % VOCAB_MULTIPLE
        yield tensor_hash(torch.cat([whole, whole.new_zeros(rows, *whole.shape[1:])]))


def tensor_hash(tensor: torch.Tensor) -> str:
    """SGLang's hash of a CPU tensor: 16 hex digits."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).digest()[:8].hex()
