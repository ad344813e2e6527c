"""Fleets that are planned: GPUs, ports, models and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.plans import fleet, model_folder
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.launch.plan import check_model, check_tokenizer, divide_gpus
from torchrl_sglang.servers.start import choose_device


@pytest.fixture
def model(tmp_path: Path) -> str:
    return model_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("devices", "replicas", "per_replica", "device", "expected"),
    [
        (None, 1, 2, "cuda", [None]),
        (None, 2, 2, "cuda", [(0, 1), (2, 3)]),
        ([4, 5, 6, 7], 2, 2, "cuda", [(4, 5), (6, 7)]),
        ([3], 1, 1, "cuda", [(3,)]),
        (range(3), 3, 1, "cuda", [(0,), (1,), (2,)]),
        (None, 3, 2, "cpu", [None, None, None]),
    ],
)
def test_gpus_are_divided_in_order(
    devices: Any, replicas: int, per_replica: int, device: str, expected: list[Any]
) -> None:
    assert divide_gpus(devices, replicas, per_replica, device) == expected


@pytest.mark.parametrize(
    ("devices", "replicas", "device", "says"),
    [
        ([0, 1, 2], 2, "cuda", r"2 replicas of 1 GPUs need 2 cuda_devices, got 3: \[0, 1, 2\]"),
        ([], 1, "cuda", "got 0"),
        ([0], 1, "cpu", "leave one out"),
        ([0, 0], 2, "cuda", "twice"),
    ],
)
def test_gpus_that_do_not_divide(devices: Any, replicas: int, device: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        divide_gpus(devices, replicas, 1, device)


def test_one_config_per_replica(model: str) -> None:
    planned = fleet(
        model,
        server={"tp_size": 2, "api_key": "k"},
        num_replicas=2,
        cuda_devices=[0, 1, 2, 3],
        ports=[30000, 30001],
    )
    assert [(c.cuda_devices, c.port) for c in planned] == [((0, 1), 30000), ((2, 3), 30001)]
    assert {(c.api_key, c.tp_size, c.model_path) for c in planned} == {("k", 2, model)}


def test_free_ports_by_default(model: str) -> None:
    assert [config.port for config in fleet(model, num_replicas=3)] == [None, None, None]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_replicas": 0}, "num_replicas must be an integer >= 1, got 0"),
        ({"num_replicas": 1.5}, "num_replicas must be an integer"),
        ({"num_replicas": True}, "num_replicas must be an integer"),
        ({"ports": [1, 2]}, "server_ports needs 1 different ports"),
        ({"num_replicas": 2, "ports": [3000, 3000]}, "server_ports needs 2 different ports"),
        ({"num_replicas": 2, "ports": [3000, 3001, 3001]}, "server_ports needs 2 different"),
        ({"server": {"extra_args": {"port": 1}}}, "server_ports="),
        ({"server": {"extra_args": {"tp_size": 2}}}, "tp_size="),
        ({"cuda_devices": [0, 1]}, "1 replicas of 1 GPUs"),
    ],
    ids=str,
)
def test_fleets_that_can_not_be(model: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fleet(model, **changes)


@pytest.mark.parametrize(
    ("files", "extra", "fine"),
    [
        ([], {}, False),
        (["model.safetensors", "generation_config.json", "special_tokens_map.json"], {}, False),
        ([], {"skip_tokenizer_init": True}, True),
        ([], {"skip_tokenizer_init": False}, False),
        ([], {"tokenizer_path": "Qwen/Qwen2.5-0.5B"}, True),
        (["tokenizer.json"], {}, True),
        (["tokenizer.json"], {"tokenizer_path": "{bare}"}, False),
        (["tokenizer.model"], {}, True),
        (["vocab.json", "merges.txt"], {}, True),
        (["spiece.model"], {}, True),
        (["qwen.tiktoken"], {}, True),
        (["tekken.json"], {}, True),
        (["m.gguf"], {}, True),
    ],
    ids=str,
)
def test_a_model_without_a_tokenizer(
    tmp_path: Path, files: list[str], extra: dict[str, Any], fine: bool
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    given = {name: str(bare) if value == "{bare}" else value for name, value in extra.items()}
    if fine:
        check_tokenizer(str(tmp_path), given)
        assert len(fleet(str(tmp_path), server={"extra_args": given})) == 1
        return
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True"):
        fleet(str(tmp_path), server={"extra_args": given})


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json: it is no model"):
        fleet(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/no-such-folder", "a/b/c"])
def test_a_path_that_leads_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        check_model(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_hub_names_are_left_to_the_engine(name: str) -> None:
    check_model(name)


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected"),
    [
        (None, False, "cpu"),
        (None, True, "cuda"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
        (torch.device("cpu"), False, "cpu"),
    ],
)
def test_choice_of_device(
    monkeypatch: pytest.MonkeyPatch, asked: Any, has_gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(asked) == expected


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("cuda", "no GPU is visible here; device='cpu' works"),
        ("cuda:1", "choose GPUs with cuda_devices="),
        ("tpu", "must be 'cpu', 'cuda' or None, got 'tpu'"),
    ],
)
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, asked: str, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        choose_device(asked)
