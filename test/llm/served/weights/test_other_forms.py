"""Checkpoints in another form, and merged adapters, pushed by every way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.asserts import error_of
from helpers.paths import ROOT
from helpers.prompts import PROMPTS
from helpers.servers import Connect, perturb, worst_error
from helpers.ways import config
from torchrl_sglang import AsyncSGLang, ServiceState, WeightSyncConfig, get_model_metadata
from torchrl_sglang.errors import WeightsError

SAMPLING = {"max_new_tokens": 24, "ignore_eos": True}


# Checkpoints in another form


def to_megatron(state: dict[str, Any], heads: int, groups: int) -> dict[str, Any]:
    """As Megatron names and fuses: q, k and v by groups of heads, and an entry without a tensor."""
    made: dict[str, Any] = {"decoder.layers._extra_state": None}
    for name, tensor in state.items():
        prefix, _, rest = name.partition(".self_attn.")
        if rest.startswith(("k_proj", "v_proj")):
            continue
        if rest.startswith("q_proj"):
            kind = rest.rpartition(".")[2]
            q, k, v = (state[f"{prefix}.self_attn.{x}_proj.{kind}"] for x in "qkv")
            size = k.shape[0] // groups
            parts = [
                torch.cat(
                    [
                        q.reshape(groups, heads // groups * size, -1)[group],
                        k.reshape(groups, size, -1)[group],
                        v.reshape(groups, size, -1)[group],
                    ]
                )
                for group in range(groups)
            ]
            fused = torch.cat(parts)
            made[f"decoder.{prefix}.linear_qkv.{kind}"] = fused if kind == "weight" else fused[:, 0]
        else:
            made[f"decoder.{name}"] = tensor
    return made


def from_megatron(heads: int, groups: int) -> Callable[[Any], Any]:
    def translate(state: Any) -> Any:
        for name, tensor in state.items():
            if tensor is None:
                continue
            plain = name.removeprefix("decoder.")
            if ".linear_qkv." not in plain:
                yield plain, tensor
                continue
            layer, kind = plain.split(".linear_qkv.")
            rows = tensor.shape[0] // groups
            size = rows // (heads // groups + 2)
            grouped = tensor.reshape(groups, rows, *tensor.shape[1:])
            for letter, part in zip(
                "qkv", grouped.split([rows - 2 * size, size, size], 1), strict=True
            ):
                yield f"{layer}.self_attn.{letter}_proj.{kind}", part.flatten(0, 1)

    return translate


def test_a_translation_of_names(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    given = to_megatron(perturb(model, seed=80).state_dict(), *heads)
    assert any("linear_qkv" in name for name in given)
    scheme = connected(config=config("auto", translate=from_megatron(*heads)))
    scheme.send(given)
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"
    assert error_of(service, model) < 0.02


def test_the_documents_snippet(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    text = (ROOT / "docs/source/weight_sync.rst").read_text()
    section = text.partition("What can be pushed\n---")[2].partition("\n---")[0]
    [block] = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", section)
    names: dict[str, Any] = {"WeightSyncConfig": WeightSyncConfig}
    exec(re.sub(r"(?m)^   ", "", block), names)
    perturb(model, seed=84)
    scheme = connected(config=names["config"])
    scheme.send({f"actor.{name}": tensor for name, tensor in model.state_dict().items()})
    assert error_of(service, model) < 0.02


def test_wrong_translations(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected(config=config("auto", translate=lambda state: [*state.items()] * 2))
    with pytest.raises(WeightsError, match="twice"):
        scheme.send(model.state_dict())
    scheme.close()
    scheme = connected(config=config("auto", translate=lambda state: {"a": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="a"):
        scheme.send(model.state_dict())
    assert service.state is ServiceState.SYNCED


# PEFT


def adapted(model: Any, **options: Any) -> Any:
    """A PEFT model whose adapters are not the zeros that they begin with."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["norm"]}],
    ids=lambda options: next(iter(options), "lora"),
)
def test_adapters_are_merged_as_they_are_sent(
    service: AsyncSGLang, model: Any, connected: Connect, options: dict[str, Any]
) -> None:
    peft = adapted(model, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            peft.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.1)
    before = {name: tensor.clone() for name, tensor in peft.state_dict().items()}
    scheme = connected(config=config("auto"))
    scheme.send(peft)
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"
    after = peft.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    completions = service.generate(PROMPTS, SAMPLING)
    merged = peft.merge_and_unload()
    assert worst_error(merged, PROMPTS, completions) < 0.02


@pytest.mark.parametrize("method", ["tensor", "disk"])
def test_merged_adapters_by_every_way(
    service: AsyncSGLang, model: Any, connected: Connect, method: str
) -> None:
    peft = adapted(model)
    scheme = connected(config=config(method, non_blocking=method == "disk"))
    scheme.send(peft)
    scheme.wait()
    completions = service.generate(PROMPTS, SAMPLING)
    assert worst_error(peft.merge_and_unload(), PROMPTS, completions) < 0.02


@pytest.mark.parametrize("non_blocking", [False, True])
def test_merged_adapters_are_probed_with_the_model_itself(
    service: AsyncSGLang, model: Any, connected: Connect, non_blocking: bool
) -> None:
    peft = adapted(model)
    scheme = connected(config=config("auto", verify_method="probe", non_blocking=non_blocking))
    scheme.send(peft)
    scheme.wait()
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "probe"
    completions = service.generate(PROMPTS, SAMPLING)
    assert worst_error(peft.merge_and_unload(), PROMPTS, completions) < 0.02


def test_adapters_that_are_switched_off_are_not_merged(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    peft = adapted(model)
    scheme = connected(config=config("auto"))
    with peft.disable_adapter():
        scheme.send(peft)
    completions = service.generate(PROMPTS, SAMPLING)
    assert worst_error(peft.unload(), PROMPTS, completions) < 0.02


def test_metadata_of_a_peft_model_is_its_bases(service: AsyncSGLang, model: Any) -> None:
    expected = get_model_metadata(model)
    assert get_model_metadata(adapted(model)) == expected == service.get_model_metadata()


def test_adapters_of_tied_embeddings_are_refused(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected(config=config("auto"))
    with pytest.warns(UserWarning, match="tied"):
        peft = adapted(model, target_modules=["embed_tokens"])
    with pytest.raises(WeightsError, match="ties"):
        scheme.send(peft)
    assert service.state is ServiceState.SYNCED


def test_adapters_that_are_not_finite(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    peft = adapted(model)
    with torch.no_grad():
        next(p for n, p in peft.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    scheme = connected(config=config("auto"))
    with pytest.raises(WeightsError, match="lora_B"):
        scheme.send(peft)
    assert service.state is ServiceState.SYNCED
