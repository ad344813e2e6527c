"""A mixture of experts: its layers are one tensor in the trainer, and many in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.moe_models import glm4_moe, qwen3_moe
from helpers.servers import CPU_SERVER_ARGS, perturb, worst_error
from helpers.two_ranks import moved, trained
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, Timeouts, WeightSyncConfig
from torchrl_sglang.errors import VerificationError
from torchrl_sglang.weights.source.checkpoint import as_written
from torchrl_sglang.weights.source.expected import expected_model

pytestmark = pytest.mark.slow


PROMPTS = [[5, 6, 7], [200, 201, 202, 203], list(range(40, 60))]

ALL = {"max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    qwen3_moe(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def service(path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    with AsyncSGLang.from_pretrained(
        str(path), device="cpu", timeouts=timeouts, **CPU_SERVER_ARGS
    ) as service:
        yield service


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return qwen3_moe(vocab_size=len(tokenizer))


def error(service: AsyncSGLang, model: Any) -> float:
    """Of the log-probs of new tokens."""
    return worst_error(model, PROMPTS, service.generate(PROMPTS, ALL))


def pushed(service: AsyncSGLang, source: Any, partial: bool = False, **config: Any) -> Any:
    scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(**config))
    scheme.init_on_sender()
    scheme.connect()
    try:
        scheme.push(source, partial=partial)
        scheme.wait()
    finally:
        scheme.close()
    return scheme.last_push


@pytest.mark.parametrize(
    ("config", "proof"),
    [
        ({}, "checksum"),
        ({"verify_method": "probe"}, "probe"),
        ({"bucket_bytes": 1 << 14}, "checksum"),
        ({"non_blocking": True}, "checksum"),
        ({"method": "tensor"}, "checksum"),
        ({"method": "disk"}, "checksum"),
    ],
    ids=str,
)
def test_every_way_reaches_the_experts(
    service: AsyncSGLang, model: Any, config: dict[str, Any], proof: str
) -> None:
    perturb(model, seed=len(str(config)), scale=0.5)
    assert error(service, model) > 0.1
    assert pushed(service, model, **config).verified_by == proof
    assert error(service, model) < 0.02


def test_experts_one_by_one(service: AsyncSGLang, model: Any, path: Path) -> None:
    """Of a trainer that holds them as a checkpoint does, all of them or some."""
    perturb(model, seed=50, scale=0.5)
    named = as_written(dict(model.named_parameters()), expected_model(str(path)).writer)
    weights = {name: tensor.clone() for name, tensor in named.items()}
    with pytest.raises(VerificationError, match="verify_method='checksum' will do"):
        pushed(service, weights)
    assert pushed(service, weights, verify_method="checksum").verified_by == "checksum"
    assert error(service, model) < 0.02
    layer = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(layer)[:4] *= 3.0
    some = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
    part = {name: weights[name] * 3.0 for name in some}
    pushed(service, part, partial=True, verify="never")
    assert error(service, model) < 0.02


def test_a_trainer_of_two_ranks(service: AsyncSGLang, path: Path, model: Any) -> None:
    first, second = trained(service, path)
    assert (first["verified_by"], second) == ("checksum", {})
    assert error(service, moved(model)) < 0.02


def test_a_buffer_that_steers_experts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, timeouts: Timeouts
) -> None:
    """In float32: in bfloat16 its values would all be the same.

    The bound leaves room for a token whose experts are nearly tied: the server may take others.
    """
    model = glm4_moe(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj *= 10.0  # for all to see which are taken
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with AsyncSGLang.from_pretrained(
        str(tmp_path), device="cpu", timeouts=timeouts, **CPU_SERVER_ARGS
    ) as service:
        assert error(service, model) < 0.1
        router = model.model.layers[1].mlp.gate
        assert router.e_score_correction_bias.dtype is torch.float32
        for method in ("broadcast", "tensor", "disk"):
            router.e_score_correction_bias = router.e_score_correction_bias.roll(1)
            assert error(service, model) > 0.15
            assert pushed(service, model, method=method).verified_by == "probe"
            assert error(service, model) < 0.1
