"""Proof by checksum of two tensor-parallel ranks: a real server, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from helpers.servers import CPU_SERVER_ARGS, perturb, told
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, Timeouts, WeightSyncConfig
from torchrl_sglang.errors import VerificationError
from torchrl_sglang.weights.carry.broadcast import Broadcast
from torchrl_sglang.weights.layout import Rank, heads_of
from torchrl_sglang.weights.source.expected import Dtypes, model_config
from torchrl_sglang.weights.source.named import named_weights
from torchrl_sglang.weights.verify.checksums import expected_checksums, mismatches, parse_checksums

pytestmark = pytest.mark.slow


LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the embedding are no multiple of 64, so the second rank's end with zeros."""
    folder = make_tiny_model(tmp_path_factory.mktemp("ranks"), vocab_size=300, hidden_size=64)
    assert model_config(str(folder)).vocab_size % 64  # type: ignore[union-attr]
    return folder


@pytest.fixture(scope="module")
def two_ranks(path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    with AsyncSGLang.from_pretrained(
        str(path),
        device="cpu",
        tp_size=2,
        timeouts=timeouts,
        **CPU_SERVER_ARGS,
    ) as service:
        yield service


@pytest.fixture
def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@pytest.fixture
def scheme(two_ranks: AsyncSGLang) -> Iterator[SGLangWeightSyncScheme]:
    made = SGLangWeightSyncScheme(two_ranks, config=WeightSyncConfig(verify_method="checksum"))
    made.init_on_sender()
    made.connect()
    yield made
    made.close()


def wrong_on_ranks(service: AsyncSGLang, path: Path, model: Any) -> list[list[str]]:
    """What each rank holds otherwise than ``model`` does."""
    answer = told(service.workers[0], "/weights_checker", {"action": "checksum"})
    weights = named_weights(model)
    heads = heads_of(model_config(str(path)))
    return [
        mismatches(
            rank.checksums,
            expected_checksums(
                rank.checksums,
                weights,
                dtypes=Dtypes(served=torch.bfloat16),
                rank=Rank(tp_rank=rank.tp_rank, tp_size=2, heads=heads),
                on_gpu=False,
            ),
        )
        for rank in parse_checksums(answer, 2)
    ]


def test_a_push_is_proved_on_both_ranks(
    two_ranks: AsyncSGLang, path: Path, model: Any, scheme: SGLangWeightSyncScheme
) -> None:
    scheme.send(perturb(model, seed=1))
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"
    assert wrong_on_ranks(two_ranks, path, model) == [[], []]


@pytest.mark.parametrize(
    ("name", "row", "column", "served", "ranks"),
    [
        (f"{LAYER}self_attn.q_proj.weight", 0, 0, f"{LAYER}self_attn.qkv_proj.weight", [0]),
        (f"{LAYER}self_attn.q_proj.weight", -1, -1, f"{LAYER}self_attn.qkv_proj.weight", [1]),
        (f"{LAYER}self_attn.v_proj.weight", 0, 0, f"{LAYER}self_attn.qkv_proj.weight", [0]),
        (f"{LAYER}mlp.up_proj.weight", -1, 0, f"{LAYER}mlp.gate_up_proj.weight", [1]),
        (f"{LAYER}mlp.down_proj.weight", 0, -1, f"{LAYER}mlp.down_proj.weight", [1]),
        (f"{LAYER}self_attn.o_proj.weight", -1, 0, f"{LAYER}self_attn.o_proj.weight", [0]),
        ("model.embed_tokens.weight", -1, 0, "model.embed_tokens.weight", [1]),
        ("model.norm.weight", 5, None, "model.norm.weight", [0, 1]),
    ],
)
def test_one_other_element_is_found_on_its_rank(
    two_ranks: AsyncSGLang,
    path: Path,
    model: Any,
    scheme: SGLangWeightSyncScheme,
    name: str,
    row: int,
    column: int | None,
    served: str,
    ranks: list[int],
) -> None:
    scheme.send(model)
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        place = (row,) if column is None else (row, column)
        parameter[place] += 1.0
    wrong = wrong_on_ranks(two_ranks, path, model)
    assert wrong == [[served] if rank in ranks else [] for rank in (0, 1)]


@pytest.mark.parametrize("method", ["tensor", "disk"])
def test_other_ways_reach_both_ranks(
    two_ranks: AsyncSGLang, path: Path, model: Any, method: Any
) -> None:
    """Each rank gets a message of its own, and takes its part of what it says."""
    made = SGLangWeightSyncScheme(
        two_ranks,
        config=WeightSyncConfig(method=method, verify_method="checksum", bucket_bytes=1 << 16),
    )
    made.connect()
    for seed in (61, 62):
        made.send(perturb(model, seed=seed))
        assert made.last_push is not None
        assert made.last_push.verified_by == "checksum"
        assert made.last_push.num_buckets > 2
        assert wrong_on_ranks(two_ranks, path, model) == [[], []]
    made.close()


def test_a_push_that_arrives_otherwise_is_refused(
    model: Any, scheme: SGLangWeightSyncScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = Broadcast.transfer

    def transfer_other_weights(carrier: Broadcast, buckets: Any, weights: Any, timer: Any) -> str:
        changed = dict(weights)
        changed[f"{LAYER}mlp.down_proj.weight"] = weights[f"{LAYER}mlp.down_proj.weight"].clone()
        changed[f"{LAYER}mlp.down_proj.weight"][0, -1] += 1.0  # a column of the second rank
        return transfer(carrier, buckets, changed, timer)

    with monkeypatch.context() as patched:
        patched.setattr(Broadcast, "transfer", transfer_other_weights)
        with pytest.raises(VerificationError, match=r"1 of .* on ranks \[1\].*down_proj"):
            scheme.send(model)
    scheme.send(model)
