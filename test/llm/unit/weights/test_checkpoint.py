"""A model's parameters as its checkpoint has them, against what transformers itself saves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_model, make_tokenizer
from transformers import Gemma3ForConditionalGeneration
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config

import torchrl_sglang.weights.verify.verifier as verify_module
from helpers.moe_models import ernie4_5_moe, glm4_moe, minimax_m2, mixtral, olmoe, qwen3_moe
from torchrl_sglang import WeightSyncConfig
from torchrl_sglang.errors import VerificationError, WeightsError
from torchrl_sglang.sync.sender import check_metadata, get_model_metadata
from torchrl_sglang.weights.source.checkpoint import CheckpointWeights, Writer, as_written
from torchrl_sglang.weights.source.expected import Dtypes, expected_model
from torchrl_sglang.weights.source.lazy import LazyWeights
from torchrl_sglang.weights.source.named import check_no_nan, matched, named_weights
from torchrl_sglang.weights.verify.verifier import Verifier, _check_names


def gemma3() -> Any:
    """One with eyes, whose parameters have other prefixes in its checkpoint."""
    config = Gemma3Config(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 300,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).to(torch.bfloat16)


MAKE = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "gemma3": gemma3,
    "glm4_moe": glm4_moe,
    "minimax_m2": minimax_m2,
    "ernie4_5_moe": ernie4_5_moe,
}


@pytest.fixture(scope="module", params=MAKE)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, the folder where it was saved, and what is in its file."""
    model = MAKE[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = qwen3_moe(), tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    return model, folder


def test_what_is_sent_is_what_the_file_has(saved: Any) -> None:
    model, folder, file = saved
    expected = expected_model(str(folder))
    sent = as_written(matched(named_weights(model), expected), expected.writer)
    assert isinstance(sent, CheckpointWeights)
    assert set(sent) == set(file)
    assert all(torch.equal(sent[name], file[name]) for name in file)
    assert {n: p.shape for n, p in sent.parts.items()} == {n: t.shape for n, t in file.items()}
    assert {expected.shape_of(name) == tensor.shape for name, tensor in file.items()} == {True}


def test_the_files_own_names_are_understood(saved: Any) -> None:
    """As of a trainer that holds the experts one by one."""
    _, folder, file = saved
    expected = expected_model(str(folder))
    named = matched(file, expected)
    assert as_written(named, expected.writer) is named
    assert set(named) == set(file)
    metadata = {name: (tensor.dtype, tensor.shape) for name, tensor in file.items()}
    check_metadata(metadata, expected)
    with pytest.raises(WeightsError, match="1 is missing: "):
        matched({n: t for n, t in file.items() if "embed_tokens" not in n}, expected)


def test_the_models_names_are_understood(saved: Any) -> None:
    model, folder, _ = saved
    check_metadata(get_model_metadata(model), expected_model(str(folder)))


def test_what_steers_experts_stays_float32(saved: Any) -> None:
    """Biases that are buffers, and routers: rounded, they would choose others."""
    _, folder, file = saved
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    wide = expected_model(str(folder)).wide & file.keys()
    routers = {name for name in file if kind == "ernie4_5_moe" and ".gate." in name}
    assert wide == {name for name in file if "e_score_correction_bias" in name} | routers
    assert bool(wide) == (kind in ("glm4_moe", "minimax_m2", "ernie4_5_moe"))


@pytest.mark.parametrize("kind", [glm4_moe, minimax_m2])
def test_a_trainer_without_those_buffers(kind: Any, tmp_path: Path) -> None:
    """As one that knows parameters only: the servers keep what they have."""
    model = kind()
    model.save_pretrained(tmp_path)
    expected = expected_model(str(tmp_path))
    named = matched(dict(model.named_parameters()), expected)
    assert expected.optional
    assert set(named) == set(expected.parameters) - expected.optional
    [first, *_] = expected.optional
    with pytest.raises(WeightsError, match="has shape"):
        matched({**named, first: torch.zeros(3)}, expected)
    with pytest.raises(WeightsError, match="buffers only"):
        matched({"model.rotary_emb.inv_freq": torch.zeros(3)}, expected, partial=True)
    assert list(matched({first: torch.zeros(expected.shape_of(first))}, expected, partial=True))


def test_an_adapters_base_model_has_its_buffers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = glm4_moe()
    model.save_pretrained(tmp_path)
    expected = expected_model(str(tmp_path))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert set(matched(named_weights(adapted), expected)) == set(expected.parameters)
    assert set(get_model_metadata(adapted)) == set(expected.parameters)


def test_buffers_below_wrappers(tmp_path: Path) -> None:
    """Which change the names of a state dict, and not those of modules."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    model = glm4_moe()
    model.save_pretrained(tmp_path)
    expected = expected_model(str(tmp_path))
    apply_activation_checkpointing(model, check_fn=lambda m: m is model.model.layers[1])
    assert set(matched(named_weights(model), expected)) == set(expected.parameters)
    assert set(get_model_metadata(model)) == set(expected.parameters)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert set(matched(named_weights(adapted), expected)) == set(expected.parameters)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_probe_rounds_what_is_sent_as_it_is_sent(tmp_path: Path, adapted: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = ernie4_5_moe()
    model.save_pretrained(tmp_path)
    expected = expected_model(str(tmp_path))
    asked: list[Any] = []

    def scores(model: Any, weights: Any, dtypes: Any, ids: list[int]) -> list[float]:
        asked.append({name: dtypes.of(name) for name in weights})
        return []

    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    weights = matched(named_weights(model), expected)
    dtypes = Dtypes(served=torch.bfloat16, wide=expected.wide)
    verifier = Verifier(WeightSyncConfig(verify_method="probe"), [], weights, dtypes, model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify_module, "reference_log_probs", scores)
        verifier._reference()
    wide = {n for n, dtype in asked[0].items() if dtype is torch.float32}
    held = expected.wide & expected.parameters.keys()
    assert {n.removeprefix("base_model.model.") for n in wide} == held
    assert held


def test_nan_in_a_buffer(tmp_path: Path) -> None:
    check_no_nan({"bounds": torch.tensor([math.inf, -math.inf]), "bias": torch.zeros(3)})
    with pytest.raises(WeightsError, match="NaN in 1 buffer: bias"):
        check_no_nan({"bounds": torch.tensor([math.inf]), "bias": torch.tensor([0.0, math.nan])})


def test_a_model_that_is_written_as_it_is() -> None:
    model = make_model(make_tokenizer(vocab_size=300))
    weights = dict(model.named_parameters())
    assert Writer(model).shapes == {}
    assert as_written(weights, Writer(model)) is weights


def test_a_part_of_the_experts(experts: tuple[Any, Path]) -> None:
    model, folder = experts
    expected = expected_model(str(folder))
    name = "model.layers.1.mlp.experts.down_proj"
    sent = as_written(
        matched({name: model.get_parameter(name)}, expected, partial=True), expected.writer
    )
    assert list(sent) == [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(8)]
    one = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(sent[one], model.get_parameter(name)[3])
    assert list(matched({one: sent[one]}, expected, partial=True)) == [one]
    with pytest.raises(WeightsError, match=r"it too: model\.layers\.1\.mlp\.experts\.3\.down"):
        matched({name: model.get_parameter(name), one: sent[one]}, expected, partial=True)
    with pytest.raises(WeightsError, match=r"has shape \(2, 2\); .* has \(64, 32\)"):
        matched({one: torch.zeros(2, 2)}, expected, partial=True)


class Counted(LazyWeights):
    """Tells what was announced and made."""

    def __init__(self, parts: Any) -> None:
        super().__init__(parts)
        self.announced: list[str] = []
        self.made: list[str] = []

    def announce(self, names: Any) -> None:
        self.announced += names

    def __getitem__(self, name: str) -> torch.Tensor:
        self.made.append(name)
        return self.parts[name]


@pytest.mark.parametrize("order", ["as they come", "backwards", "by turns", "with another between"])
def test_each_is_made_once_and_as_announced(experts: tuple[Any, Path], order: str) -> None:
    """What is gathered by several ranks has to be looked up exactly in the order announced."""
    model, folder = experts
    source = Counted(dict(model.named_parameters()))
    sent = CheckpointWeights(source, expected_model(str(folder)).writer)
    names = list(sent)
    if order == "backwards":
        names.reverse()
    elif order == "by turns":
        names = [*names[::2], *names[1::2]]
    elif order == "with another between":
        first = names.index("model.layers.0.mlp.experts.0.gate_proj.weight")
        names = [*names[:first], names[first], names[-1], *names[first + 1 : -1]]
    for start in (0, 3):  # another time, as for the checksums after a push
        source.announced, source.made = [], []
        sent.announce(names[start:])
        for name in names[start:]:
            assert sent[name].shape == sent.parts[name].shape
        assert source.made == source.announced
        assert order not in ("as they come", "backwards") or len(source.made) == len({*source.made})


def test_a_probe_needs_the_models_names(experts: tuple[Any, Path]) -> None:
    model, folder = experts
    writer = expected_model(str(folder)).writer
    weights = dict(model.named_parameters())
    _check_names(model, weights)
    with pytest.raises(VerificationError, match=r"has no model\.layers\.0\.mlp\.experts\.0"):
        _check_names(model, as_written(weights, writer))
