"""Our hashes of what the servers should hold: one wrong bit is found, and by name."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from tiny_model import make_model, make_tokenizer

from torchrl_sglang.weights.checksum import can_check, mismatches, parts_of, tensor_hash
from torchrl_sglang.weights.source import named_weights

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """What a trainer sends; the 282 rows of the embedding are no multiple of 64."""
    tokenizer = make_tokenizer(vocab_size=300)
    assert len(tokenizer) % 64
    return named_weights(
        make_model(
            tokenizer,
            hidden_size=32,
            intermediate_size=48,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
        )
    )


def sha(*parts: torch.Tensor, zero_rows: int = 0) -> str:
    """The same hash, written a second time: 8 bytes of SHA-256 over the values' own bytes."""
    raw = b"".join(part.contiguous().view(torch.int16).numpy().tobytes() for part in parts)
    row_bytes = parts[0][0].numel() * 2
    return hashlib.sha256(raw + bytes(zero_rows * row_bytes)).hexdigest()[:16]


def server(weights: dict[str, torch.Tensor], *, zero_rows: int = 0) -> dict[str, str]:
    """The checksums of a server that holds ``weights``, q, k, v and gate, up fused."""
    sums = {}
    for kind in ("weight", "bias"):
        q, k, v = (weights[f"{ATTENTION}{part}_proj.{kind}"] for part in "qkv")
        sums[f"{ATTENTION}qkv_proj.{kind}"] = sha(q, k, v)
    gate, up = (weights[f"{MLP}{part}_proj.weight"] for part in ("gate", "up"))
    sums[f"{MLP}gate_up_proj.weight"] = sha(gate, up)
    sums[EMBEDDING] = sha(weights[EMBEDDING], zero_rows=zero_rows)
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rest = [name for name in weights if name != EMBEDDING and name.split(".")[-2] not in fused]
    return sums | {name: sha(weights[name]) for name in rest}


def with_one_bit_flipped(
    weights: dict[str, torch.Tensor], name: str, index: int = -1, bit: int = 0
) -> dict[str, torch.Tensor]:
    changed = weights[name].detach().clone()
    changed.view(torch.int16).reshape(-1)[index] ^= 1 << bit
    assert (changed.view(torch.int16) != weights[name].view(torch.int16)).sum() == 1
    return {**weights, name: changed}


@pytest.mark.parametrize(
    ("tensor", "raw"),
    [
        (torch.tensor([1.0, -2.0]), bytes.fromhex("0000803f000000c0")),
        (torch.tensor([1.0, -2.0], dtype=torch.bfloat16), bytes.fromhex("803f00c0")),
        (torch.tensor([1.0, -2.0], dtype=torch.float16), bytes.fromhex("003c00c0")),
        (torch.tensor(1.0), bytes.fromhex("0000803f")),
        (torch.tensor([[1.0, 0.0], [2.0, 0.0]])[:, 0], bytes.fromhex("0000803f00000040")),
        (torch.tensor([[1.0, 2.0]]).t(), bytes.fromhex("0000803f00000040")),
        (torch.empty(0), b""),
    ],
    ids=str,
)
def test_tensor_hash(tensor: torch.Tensor, raw: bytes) -> None:
    assert tensor_hash(tensor) == hashlib.sha256(raw).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            f"{ATTENTION}qkv_proj.weight",
            [f"{ATTENTION}{part}_proj.weight" for part in "qkv"],
        ),
        (f"{ATTENTION}qkv_proj.bias", [f"{ATTENTION}{part}_proj.bias" for part in "qkv"]),
        (
            f"{MLP}gate_up_proj.weight",
            [f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"],
        ),
        (f"{ATTENTION}o_proj.weight", [f"{ATTENTION}o_proj.weight"]),
        (EMBEDDING, [EMBEDDING]),
        ("model.qkv_proj_norm.weight", ["model.qkv_proj_norm.weight"]),
    ],
)
def test_parts_of_a_fused_parameter(name: str, parts: list[str]) -> None:
    assert parts_of(name) == parts


def test_equal_weights_have_no_mismatch(weights: dict[str, torch.Tensor]) -> None:
    sums = server(weights)
    assert len(sums) < len(weights)  # q, k, v and gate, up are one each
    assert can_check(sums, weights)
    assert mismatches(sums, weights, torch.bfloat16) == []


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_one_flipped_bit_is_found_by_name(weights: dict[str, torch.Tensor], kind: str) -> None:
    sums = server(weights)
    for name in (name for name in weights if name.endswith(kind)):
        for index, bit in ((0, 0), (-1, 15)):
            wrong = mismatches(
                sums, with_one_bit_flipped(weights, name, index, bit), torch.bfloat16
            )
            assert len(wrong) == 1
            assert name in parts_of(wrong[0])


def test_parts_in_another_order_are_found(weights: dict[str, torch.Tensor]) -> None:
    k, v = f"{ATTENTION}k_proj.weight", f"{ATTENTION}v_proj.weight"
    swapped = {**weights, k: weights[v], v: weights[k]}
    assert mismatches(server(weights), swapped, torch.bfloat16) == [f"{ATTENTION}qkv_proj.weight"]


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_embeddings_may_be_padded_with_zero_rows(
    weights: dict[str, torch.Tensor], name: str
) -> None:
    table = weights[EMBEDDING]
    rows = -len(table) % 64
    for zero_rows in (0, rows):
        assert mismatches({name: sha(table, zero_rows=zero_rows)}, {name: table}, table.dtype) == []
    for zero_rows in (1, rows + 64):
        assert mismatches({name: sha(table, zero_rows=zero_rows)}, {name: table}, table.dtype)
    flipped = with_one_bit_flipped({name: table}, name)
    assert mismatches({name: sha(table, zero_rows=rows)}, flipped, table.dtype) == [name]


def test_nothing_else_may_be_padded(weights: dict[str, torch.Tensor]) -> None:
    name = f"{ATTENTION}o_proj.weight"
    padded = {name: sha(weights[name], zero_rows=-len(weights[name]) % 64)}
    assert mismatches(padded, weights, torch.bfloat16) == [name]


def test_a_whole_table_is_not_padded() -> None:
    table = torch.ones(64, 2, dtype=torch.bfloat16)
    padded = {EMBEDDING: sha(table, zero_rows=64)}
    assert mismatches(padded, {EMBEDDING: table}, torch.bfloat16) == [EMBEDDING]


def test_weights_are_hashed_in_the_dtype_of_the_server(weights: dict[str, torch.Tensor]) -> None:
    trained = {name: tensor.detach().float() + 1e-6 for name, tensor in weights.items()}
    served = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}
    assert mismatches(server(served), trained, torch.bfloat16) == []
    assert mismatches(server(served), trained, torch.float16)


def test_weights_that_need_a_gradient_can_be_hashed() -> None:
    weight: Any = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    assert mismatches({"a": sha(weight.detach())}, {"a": weight}, torch.bfloat16) == []


@pytest.mark.parametrize(
    ("server_names", "expected"),
    [
        (["a.qkv_proj.weight", "b"], True),
        (["a.qkv_proj.weight", "b", "c"], False),
        (["a.qkv_proj.bias", "b"], False),
        (["a.gate_up_proj.weight"], False),
        # What the servers leave out was not compared, so nothing is proved of it.
        (["a.qkv_proj.weight"], False),
        (["b"], False),
        ([], False),
    ],
)
def test_whether_a_comparison_proves_anything(server_names: list[str], expected: bool) -> None:
    known = ["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "b"]
    assert can_check(server_names, known) is expected
