"""Our hashes of what the servers should hold: one wrong bit is found, and by name."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from tiny_model import make_model, make_tokenizer

from torchrl_sglang.weights.layout import EMBEDDING, HEAD, Rank, sources_of
from torchrl_sglang.weights.source.expected import Dtypes
from torchrl_sglang.weights.source.named import named_weights
from torchrl_sglang.weights.verify.checksums import (
    RankChecksums,
    disagreements,
    expected_checksums,
    mismatches,
    parse_checksums,
    tensor_hash,
)

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."


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


def server(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """The checksums of a server that holds ``weights``, q, k, v and gate, up fused."""
    sums = {}
    for kind in ("weight", "bias"):
        q, k, v = (weights[f"{ATTENTION}{part}_proj.{kind}"] for part in "qkv")
        sums[f"{ATTENTION}qkv_proj.{kind}"] = sha(q, k, v)
    gate, up = (weights[f"{MLP}{part}_proj.weight"] for part in ("gate", "up"))
    sums[f"{MLP}gate_up_proj.weight"] = sha(gate, up)
    sums[EMBEDDING] = sha(weights[EMBEDDING], zero_rows=-len(weights[EMBEDDING]) % 64)
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rest = [name for name in weights if name != EMBEDDING and name.split(".")[-2] not in fused]
    return sums | {name: sha(weights[name]) for name in rest}


def wrong_names(
    sums: dict[str, str], weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Names that a server with one rank, which answered ``sums``, does not hold as sent."""
    rank = Rank(tp_rank=0, tp_size=1)
    return mismatches(
        sums,
        expected_checksums(sums, weights, dtypes=Dtypes(served=dtype), rank=rank, on_gpu=False),
    )


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
    assert sources_of(name) == parts


def test_equal_weights_have_no_mismatch(weights: dict[str, torch.Tensor]) -> None:
    sums = server(weights)
    assert len(sums) < len(weights)  # q, k, v and gate, up are one each
    assert wrong_names(sums, weights) == []


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_one_flipped_bit_is_found_by_name(weights: dict[str, torch.Tensor], kind: str) -> None:
    sums = server(weights)
    for name in (name for name in weights if name.endswith(kind)):
        for index, bit in ((0, 0), (-1, 15)):
            wrong = wrong_names(sums, with_one_bit_flipped(weights, name, index, bit))
            assert len(wrong) == 1
            assert name in sources_of(wrong[0])


def test_a_parameter_that_kept_its_old_value_is_found(weights: dict[str, torch.Tensor]) -> None:
    """As where a server ignores a name that was sent."""
    sent = {name: tensor * 2 for name, tensor in weights.items()}
    for kept in (f"{ATTENTION}v_proj.weight", f"{MLP}down_proj.weight", EMBEDDING):
        (wrong,) = wrong_names(server({**sent, kept: weights[kept]}), sent)
        assert kept in sources_of(wrong)


def test_parts_in_another_order_are_found(weights: dict[str, torch.Tensor]) -> None:
    k, v = f"{ATTENTION}k_proj.weight", f"{ATTENTION}v_proj.weight"
    swapped = {**weights, k: weights[v], v: weights[k]}
    assert wrong_names(server(weights), swapped) == [f"{ATTENTION}qkv_proj.weight"]


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_embeddings_are_padded_with_zero_rows(weights: dict[str, torch.Tensor], name: str) -> None:
    table = weights[EMBEDDING]
    rows = -len(table) % 64
    for zero_rows in (0, 1, rows, rows + 64):
        wrong = wrong_names({name: sha(table, zero_rows=zero_rows)}, {name: table})
        assert wrong == ([] if zero_rows == rows else [name])
    flipped = with_one_bit_flipped({name: table}, name)
    assert wrong_names({name: sha(table, zero_rows=rows)}, flipped) == [name]


def test_nothing_else_is_padded(weights: dict[str, torch.Tensor]) -> None:
    name = f"{ATTENTION}o_proj.weight"
    padded = {name: sha(weights[name], zero_rows=-len(weights[name]) % 64)}
    assert wrong_names(padded, weights) == [name]


def test_weights_are_hashed_in_the_dtype_of_the_server(weights: dict[str, torch.Tensor]) -> None:
    trained = {name: tensor.detach().float() + 1e-6 for name, tensor in weights.items()}
    served = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}
    assert wrong_names(server(served), trained) == []
    assert wrong_names(server(served), trained, torch.float16)


def test_weights_that_need_a_gradient_can_be_hashed() -> None:
    weight: Any = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    assert wrong_names({"a": sha(weight.detach())}, {"a": weight}) == []


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 26])
def test_large_tensors_are_laid_out_in_chunks(
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    on_gpu: bool,
    chunk_bytes: int,
) -> None:
    """The chunks do not show, of columns and odd numbers of elements neither."""
    rank = Rank(tp_rank=1, tp_size=2)
    # 45 rows of 3 of 7 columns in bfloat16: 6 bytes a row, and 2 bytes more than whole words.
    table = torch.randn(45, 7, dtype=torch.float32)
    sent = {"a.o_proj.weight": table, HEAD: table}
    options: Any = {"dtypes": Dtypes(served=torch.bfloat16), "rank": rank, "on_gpu": on_gpu}
    monkeypatch.setattr("torchrl_sglang.weights.verify.checksums.CHUNK_BYTES", chunk_bytes)
    sums = expected_checksums(sent, sent, **options)
    half = table.bfloat16()
    # 64 rows with the padding, 32 for each rank.
    rows = torch.cat([half[32:], torch.zeros(19, 7, dtype=torch.bfloat16)])
    assert sums == {
        "a.o_proj.weight": tensor_hash(half[:, 3:6].contiguous(), on_gpu=on_gpu),
        HEAD: tensor_hash(rows, on_gpu=on_gpu),
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "wrong"),
    [
        ({}, {}, []),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, []),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, ["b"]),
        ({"a": "1"}, {"a": "1", "b": "3"}, ["b"]),
        ({"a": "1", "b": "2"}, {"a": "1"}, ["b"]),
    ],
)
def test_mismatches(theirs: dict[str, str], ours: dict[str, str], wrong: list[str]) -> None:
    assert mismatches(theirs, ours) == wrong


def engine(*ranks: str) -> list[RankChecksums]:
    """An engine of which each rank holds one parameter per letter, whose hash is that letter."""
    return [
        RankChecksums(tp_rank=i, checksums={f"p{place}": x for place, x in enumerate(letters)})
        for i, letters in enumerate(ranks)
    ]


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        ([], {}),
        ([engine("ab", "cd")], {}),
        ([engine("ab", "cd"), engine("ab", "cd")], {}),
        # Ranks of one engine hold different shards, which is no disagreement.
        ([engine("ab", "ac"), engine("ab", "ac")], {}),
        ([engine("ab", "cd"), engine("ab", "cx")], {1: ["p1"]}),
        (
            [engine("ab", "cd"), engine("ab", "cd"), engine("xb", "yz")],
            {0: ["p0"], 1: ["p0", "p1"]},
        ),
        ([engine("ab"), engine("a")], {0: ["p1"]}),
        ([engine("ab", "cd"), engine("cd", "ab")], {0: ["p0", "p1"], 1: ["p0", "p1"]}),
    ],
)
def test_disagreements(engines: list[Any], expected: dict[int, list[str]]) -> None:
    assert disagreements(engines) == expected


def answered(*infos: Any) -> dict[str, Any]:
    sums = {"a": "0" * 16, "draft.a": "1" * 16, "draft_step_0.a": "2" * 16, "drafting": "3" * 16}
    return {"ranks": [{"parallelism_info": info, "checksums": sums} for info in infos]}


@pytest.mark.parametrize(
    "form",
    [
        lambda rank: {"tp_rank": rank},  # SGLang 0.5.17
        lambda rank: [{"role": "target", "tp_rank": rank}, {"role": "draft", "tp_rank": rank}],
    ],
)
def test_an_answer_is_read_in_order_of_ranks_and_without_drafts(form: Any) -> None:
    for order in ((0, 1, 2), (2, 0, 1)):
        ranks = parse_checksums(answered(*map(form, order)), 3)
        assert [rank.tp_rank for rank in ranks] == [0, 1, 2]
        assert all(set(rank.checksums) == {"a", "drafting"} for rank in ranks)


@pytest.mark.parametrize("tp_ranks", [(0, 1), (0, 1, 0, 1), (1, 1, 0, 0), (0, 1) * 3])
def test_ranks_of_data_parallel_attention_may_come_once_per_group(tp_ranks: tuple[int]) -> None:
    """As SGLang 0.5.23 answers, whose info says dp_size 1: every group, of every rank."""
    info = {"role": "target", "dp_rank": 0, "dp_size": 2, "tp_size": 2, "pp_rank": 0}
    answer = answered(*([{**info, "tp_rank": rank}] for rank in tp_ranks))
    ranks = parse_checksums(answer, 2)
    assert [rank.tp_rank for rank in ranks] == sorted(tp_ranks)


@pytest.mark.parametrize(
    ("tp_ranks", "num_copies", "match"),
    [
        ((0, 0), 1, "ranks .0, 0. instead of 0 to 1$"),
        ((0, 1, 1), 1, "instead of 0 to 1$"),
        ((0, 1, 1, 1), 1, "instead of 0 to 1, 2 times each"),
        ((0, 1, 2, 0), 1, "instead of 0 to 1, 2 times each"),
        ((0, 1), 2, "instead of 0 to 1, 2 times each"),  # a replica has not answered
        ((), 1, "ranks .. instead of 0 to 1$"),
    ],
)
def test_ranks_that_do_not_come_equally_often(
    tp_ranks: tuple[int], num_copies: int, match: str
) -> None:
    answer = answered(*({"tp_rank": rank} for rank in tp_ranks))
    with pytest.raises(ValueError, match=match):
        parse_checksums(answer, 2, num_copies)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (None, "no checksums"),
        ({}, "no checksums"),
        ({"ranks": [{}]}, "no checksums"),
        ({"ranks": [{"checksums": {"a": "0"}}]}, "no checksums"),
        ({"ranks": [{"checksums": ["a"], "parallelism_info": {"tp_rank": 0}}]}, "no checksums"),
        (answered([]), "no checksums"),
        (answered({"tp_rank": 0}), "ranks .0. instead of 0 to 1"),
        (answered({"tp_rank": 0}, {"tp_rank": 0}), "ranks .0, 0. instead"),
        (answered(*({"tp_rank": i} for i in range(3))), "ranks .0, 1, 2. instead"),
    ],
)
def test_an_answer_that_lacks_a_rank_is_refused(answer: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_checksums(answer, 2)
