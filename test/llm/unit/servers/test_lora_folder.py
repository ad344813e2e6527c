"""What is found in an adapter's folder before a server reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.lora_files import CONFIG, PREFIX, write_adapter
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError
from torchrl_sglang.servers.lora_folder import adapter_path, check_folder, find_problem

HERE = ["http://127.0.0.1:30000", "http://localhost:30001"]

ELSEWHERE = ["http://127.0.0.1:30000", "http://node7:30000"]

BLOCK = PREFIX + "model.layers.0.self_attn"


def weights(*leaves: str, block: str = BLOCK, rank: int = 8) -> dict[str, list[int]]:
    """Names and shapes of an adapter of some modules."""
    found = {}
    for leaf in leaves:
        found[f"{block}.{leaf}.lora_A.weight"] = [rank, 16]
        found[f"{block}.{leaf}.lora_B.weight"] = [16, rank]
    return found


def tensors(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in shapes.items()}


SOUND = tensors(weights("q_proj", "v_proj"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", SOUND)


# Where it is


def test_a_folder_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert adapter_path("adapter", HERE) == adapter_path(folder, HERE) == str(folder)
    assert adapter_path("./adapter/", ELSEWHERE) == str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert adapter_path("~/adapter", HERE) == str(folder)


def test_a_hub_name_is_left_to_the_servers() -> None:
    assert adapter_path("someone/adapter", HERE) == "someone/adapter"


def test_a_folder_of_another_machine_is_left_to_it() -> None:
    assert adapter_path("/data/adapter", ELSEWHERE) == "/data/adapter"


@pytest.mark.parametrize("path", ["", "adapter", "./a/b", "/no/such", "~/no-such", Path("a/b")])
def test_a_folder_that_is_not_there(path: Any) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        adapter_path(path, HERE)


# What is in it


def test_a_sound_folder(folder: Path) -> None:
    check_folder(folder)


def break_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def cut(size: int) -> Callable[[Path], object]:
    """Leaves ``size`` bytes of the weights; a negative size takes bytes off the end."""

    def act(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)

    return act


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), r"no adapter_config\.json"),
        (break_config("{"), "can't be read"),
        (break_config("[]"), "no peft_type='LORA'"),
        (break_config(json.dumps({**CONFIG, "peft_type": "IA3"})), "no peft_type='LORA'"),
        (break_config(json.dumps({**CONFIG, "r": None})), "r=None"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
        (cut(0), "no whole safetensors file"),
        (cut(100), "it ends within its header"),
        (cut(-1), "it ends within its weights"),
    ],
)
def test_a_damaged_folder(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=says):
        check_folder(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("bias", "lora_only"),
    ],
)
def test_options_that_sglang_does_not_read(folder: Path, option: str, value: Any) -> None:
    write_adapter(folder, SOUND, **{option: value})
    with pytest.raises(UnsupportedOptionError, match=f"{option}=.* does not read"):
        check_folder(folder)
    write_adapter(folder, SOUND, without=option)
    check_folder(folder)
    write_adapter(folder, SOUND, **{option: None})
    check_folder(folder)


def test_older_formats_are_left_to_the_server(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    check_folder(folder)


def test_every_file_of_weights_is_read(folder: Path) -> None:
    save_file(tensors(weights("v_proj", block=f"{BLOCK}x")), folder / "more.safetensors")
    with pytest.raises(ConfigError, match="v_proj alone"):
        check_folder(folder)


# Its weights


@pytest.mark.parametrize(
    "shapes",
    [
        weights("q_proj", "v_proj"),
        weights("q_proj", "k_proj", "v_proj", "o_proj"),
        weights("o_proj"),
        weights("gate_proj", block="model.layers.0.mlp"),
        weights("qkv_proj"),
        # As PEFT names them before it saves, and embeddings.
        {name.replace(".weight", ".default.weight"): s for name, s in weights("o_proj").items()},
        {"m.embed_tokens.lora_embedding_A": [8, 99], "m.embed_tokens.lora_embedding_B": [16, 8]},
        {**weights("o_proj"), "m.embed_tokens.weight": [99, 16], "m.lm_head.weight": [99, 16]},
        # One tensor for all experts.
        {"e.w1.lora_A.weight": [4, 8, 16], "e.w1.lora_B.weight": [4, 16, 8]},
    ],
    ids=str,
)
def test_weights_that_can_be_served(shapes: dict[str, list[int]]) -> None:
    assert find_problem(shapes, 8) is None


def without(shapes: dict[str, list[int]], side: str) -> dict[str, list[int]]:
    return {name: shape for name, shape in shapes.items() if side not in name}


@pytest.mark.parametrize(
    ("shapes", "rank", "says"),
    [
        (weights("o_proj"), 4, "o_proj.lora_A.weight' has rank 8, the configuration says r=4"),
        ({**weights("o_proj"), f"{BLOCK}.o_proj.lora_B.weight": [16, 9]}, 8, "has rank 9"),
        (without(weights("o_proj"), "lora_B"), 8, "o_proj' has lora_A or lora_B, but not both"),
        (without(weights("o_proj"), "lora_A"), 8, "o_proj' has lora_A or lora_B, but not both"),
        (weights("v_proj"), 8, "v_proj alone"),
        (weights("q_proj"), 8, "q_proj alone"),
        (weights("q_proj", "k_proj"), 8, "k_proj and q_proj alone"),
        (
            weights("q_proj", "v_proj") | weights("v_proj", block="layers.1.a"),
            8,
            "'layers.1.a' has",
        ),
        ({**weights("o_proj"), "layers.0.norm.weight": [16]}, 8, "norm.weight' is no weight of"),
        ({"layers.0.o_proj.lora_magnitude_vector": [16]}, 8, "is no weight of LoRA"),
    ],
    ids=str,
)
def test_weights_that_can_not_be_served(shapes: dict[str, list[int]], rank: int, says: str) -> None:
    problem = find_problem(shapes, rank)
    assert problem is not None
    assert says in problem
