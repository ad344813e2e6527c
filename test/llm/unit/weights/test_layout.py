"""Which rows and columns each rank holds: a table, and SGLang's own weight loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from helpers.by_sglang import by_sglang
from torchrl_sglang.weights.layout import (
    EMBEDDING,
    HEAD,
    Heads,
    Rank,
    heads_of,
    shard_of,
    sources_of,
    why_unknown,
)
from torchrl_sglang.weights.source.expected import Dtypes, expected_model, model_config
from torchrl_sglang.weights.verify.checksums import expected_checksums

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."

QKV, GATE_UP = f"{ATTENTION}qkv_proj.weight", f"{MLP}gate_up_proj.weight"

OUT, DOWN = f"{ATTENTION}o_proj.weight", f"{MLP}down_proj.weight"

NORM = "model.norm.weight"

# 8 heads of queries and 4 of keys, each of 6 rows.
SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDING: (300, 32),
    f"{ATTENTION}q_proj.weight": (48, 32),
    f"{ATTENTION}k_proj.weight": (24, 32),
    f"{ATTENTION}v_proj.weight": (24, 32),
    f"{ATTENTION}q_proj.bias": (48,),
    f"{ATTENTION}k_proj.bias": (24,),
    f"{ATTENTION}v_proj.bias": (24,),
    OUT: (32, 48),
    f"{ATTENTION}o_proj.bias": (32,),
    f"{MLP}gate_proj.weight": (80, 32),
    f"{MLP}up_proj.weight": (80, 32),
    DOWN: (32, 80),
    NORM: (32,),
}

HEADS = Heads(queries=8, keys=4)

SERVED = [
    EMBEDDING,
    QKV,
    f"{ATTENTION}qkv_proj.bias",
    OUT,
    f"{ATTENTION}o_proj.bias",
    GATE_UP,
    DOWN,
    NORM,
]


@pytest.mark.parametrize(
    ("name", "tp_rank", "tp_size", "expected"),
    [
        (QKV, 0, 1, [(0, 0, 48), (0, 0, 24), (0, 0, 24)]),
        (QKV, 1, 2, [(0, 24, 24), (0, 12, 12), (0, 12, 12)]),
        (QKV, 3, 4, [(0, 36, 12), (0, 18, 6), (0, 18, 6)]),
        # More ranks than heads of keys: neighbours hold the same head.
        (QKV, 4, 8, [(0, 24, 6), (0, 12, 6), (0, 12, 6)]),
        (QKV, 5, 8, [(0, 30, 6), (0, 12, 6), (0, 12, 6)]),
        (QKV, 7, 8, [(0, 42, 6), (0, 18, 6), (0, 18, 6)]),
        (f"{ATTENTION}qkv_proj.bias", 5, 8, [(0, 30, 6), (0, 12, 6), (0, 12, 6)]),
        (GATE_UP, 1, 4, [(0, 20, 20), (0, 20, 20)]),
        (OUT, 0, 1, [(0, 0, 32)]),
        (OUT, 1, 2, [(1, 24, 24)]),
        (DOWN, 3, 4, [(1, 60, 20)]),
        (f"{ATTENTION}o_proj.bias", 1, 2, [(0, 0, 32)]),
        (NORM, 3, 4, [(0, 0, 32)]),
    ],
)
def test_slices(name: str, tp_rank: int, tp_size: int, expected: list[tuple[int, ...]]) -> None:
    shard = shard_of(name, SHAPES, Rank(tp_rank=tp_rank, tp_size=tp_size, heads=HEADS))
    assert [(part.dim, part.start, part.length) for part in shard.slices] == expected
    assert [part.name for part in shard.slices] == sources_of(name)
    assert shard.zero_rows == 0


@pytest.mark.parametrize(
    ("num_rows", "tp_rank", "tp_size", "expected"),
    [
        (300, 0, 1, (0, 300, 20)),
        (320, 0, 1, (0, 320, 0)),
        (300, 0, 5, (0, 64, 0)),
        (300, 4, 5, (256, 44, 20)),
        (300, 0, 2, (0, 160, 0)),
        (300, 1, 2, (160, 140, 20)),
        # 192 is not divisible by 128, so the padding becomes 64 rows for each rank: 8192 in all.
        (192, 1, 128, (64, 64, 0)),
        (192, 3, 128, (192, 0, 64)),
        (192, 127, 128, (192, 0, 64)),
        (151936, 7, 8, (132944, 18992, 0)),
    ],
)
def test_rows_of_embeddings(
    num_rows: int, tp_rank: int, tp_size: int, expected: tuple[int, int, int]
) -> None:
    shapes = {EMBEDDING: (num_rows, 4), HEAD: (num_rows, 4)}
    for name in shapes:
        shard = shard_of(name, shapes, Rank(tp_rank=tp_rank, tp_size=tp_size))
        (part,) = shard.slices
        assert (part.name, part.dim) == (name, 0)
        assert (part.start, part.length, shard.zero_rows) == expected


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_hold_everything_once(tp_size: int) -> None:
    """No element is left out or held twice, except by what is replicated."""
    held = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for tp_rank in range(tp_size):
        for name in SERVED:
            rank = Rank(tp_rank=tp_rank, tp_size=tp_size, heads=HEADS)
            for part in shard_of(name, SHAPES, rank).slices:
                held[part.name].narrow(part.dim, part.start, part.length).add_(1)
    for name, counts in held.items():
        replicated = name in (NORM, f"{ATTENTION}o_proj.bias")
        assert counts.unique().tolist() == [tp_size if replicated else 1], name


def test_a_head_that_was_not_sent_is_tied() -> None:
    shapes = {EMBEDDING: (64, 4)}
    assert sources_of(HEAD, shapes) == [EMBEDDING]
    assert sources_of(HEAD, {**shapes, HEAD: (64, 4)}) == [HEAD]
    assert shard_of(HEAD, shapes, Rank(tp_rank=0, tp_size=1)).slices[0].name == EMBEDDING


def known(**changes: Any) -> str | None:
    served = changes.pop("served", SERVED)
    shapes = {**SHAPES, **changes.pop("shapes", {})}
    options = {"family": "llama", "tp_size": 2, "heads": HEADS, **changes}
    return why_unknown(served, shapes, **options)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"tp_size": 1, "heads": None, "family": None}, None),
        ({"tp_size": 8}, None),
        ({"served": [*SERVED, HEAD]}, None),  # tied
        ({"served": [*SERVED, f"{MLP}experts.w13"]}, "not sent: model.layers.0.mlp.experts.w13"),
        ({"served": SERVED[:-1]}, "parameter: model.norm.weight"),
        ({"served": SERVED[:-1], "tp_size": 1}, "nothing of 1 parameter: model.norm.weight"),
        ({"served": []}, "nothing of 13 parameters"),
        ({"shapes": {"lm_head.weight": (300, 32)}}, "nothing of 1 parameter: lm_head.weight"),
        ({"family": "gpt_neox"}, "gpt_neox"),
        ({"family": None}, "None"),
        ({"heads": None}, "config"),
        ({"tp_size": 3}, "tp_size=3"),
        ({"tp_size": 16}, "tp_size=16"),
        ({"tp_size": 4, "heads": Heads(queries=8, keys=3)}, "tp_size=4"),
        ({"on_cpu": True}, "intermediate size"),
        ({"on_cpu": True, "shapes": {DOWN: (32, 128)}}, None),
        ({"on_cpu": True, "tp_size": 8, "shapes": {DOWN: (32, 256)}}, "tp_size=8"),
    ],
)
def test_whether_a_layout_is_known(changes: dict[str, Any], why: str | None) -> None:
    found = known(**changes)
    assert (found is None) if why is None else (found is not None and why in found), found


def test_heads_of_a_config() -> None:
    assert heads_of(Qwen2Config(num_attention_heads=8, num_key_value_heads=2)) == Heads(
        queries=8, keys=2
    )
    assert heads_of(PretrainedConfig()) is None
    assert heads_of(None) is None


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 300,
    "dtype": torch.bfloat16,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        **SMALL,
        num_key_value_heads=8,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, head_dim=24, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": Qwen3Config(
        **{**SMALL, "vocab_size": 192}, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL,
        moe_intermediate_size=48,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
}


def make_weights(folder: Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Random values for every parameter, norms and biases too, so that each place shows."""
    config.architectures = [f"{config.model_type.title().replace('_', '')}ForCausalLM"]
    config.save_pretrained(folder)
    make = torch.Generator().manual_seed(0)
    expected = expected_model(str(folder))
    shapes = {name: shape for name, (_, shape) in expected.parameters.items()} | expected.written
    weights = {
        name: torch.randn(shape, generator=make).bfloat16()
        for name, shape in shapes.items()
        if name not in expected.writer.shapes
    }
    torch.save(weights, folder / "sent.pt")
    return weights


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each family: where it is, what was sent, and what SGLang's models hold of it then."""
    folders = {family: tmp_path_factory.mktemp(family) for family in CONFIGS}
    sent = {family: make_weights(folder, CONFIGS[family]) for family, folder in folders.items()}
    theirs = by_sglang("shards", *folders.values())
    return {
        family: (folder, sent[family], theirs[str(folder)]) for family, folder in folders.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_sglangs_own_models_hold_the_same(loaded: dict[str, Any], family: str) -> None:
    """Every parameter of every rank, for 1, 2, 4 and 8 ranks, loaded by SGLang itself."""
    folder, weights, theirs = loaded[family]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    heads = heads_of(model_config(str(folder)))
    assert len(theirs) == 1 + 2 + 4 + 8
    for place, sums in theirs.items():
        tp_rank, tp_size = map(int, place.split("/"))
        assert why_unknown(sums, shapes, family=family, tp_size=tp_size, heads=heads) is None
        rank = Rank(tp_rank=tp_rank, tp_size=tp_size, heads=heads)
        ours = expected_checksums(
            sums, weights, dtypes=Dtypes(served=torch.bfloat16), rank=rank, on_gpu=False
        )
        assert ours == sums, place
