"""Reading an adapter from what a trainer holds, and refusing what SGLang would compute wrongly."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tensordict import TensorDict
from torch import nn

from helpers.lora_files import random_adapter
from helpers.peft_models import base_model, peft_model, train
from helpers.worker_infos import worker_info as worker
from torchrl_sglang.errors import ConfigError, TopologyError, UnsupportedOptionError, WeightsError
from torchrl_sglang.servers.control import ControlClient
from torchrl_sglang.servers.info import Capabilities, Features
from torchrl_sglang.weights.lora.load import prepared
from torchrl_sglang.weights.lora.push import check_servers
from torchrl_sglang.weights.lora.source import AdapterSource, plain_config, read_adapter

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

PARAMETER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


def read(source: Any, reference: Any = None, *, finite: bool = False) -> AdapterSource:
    return read_adapter(source, reference, server_urls=["http://127.0.0.1:1"], finite=finite)


class Wrapper(nn.Module):
    """As DDP and TorchRL's wrapper hold their model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_peft_model(model_path: Path) -> None:
    model = peft_model(model_path, seed=1)
    adapter = read(model)
    assert len(adapter.tensors) == 8
    assert adapter.tensors[NAME].equal(model.get_parameter(PARAMETER))
    assert adapter.parameters.keys() == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert json.loads(json.dumps(adapter.config)) == adapter.config
    assert adapter.config["target_modules"] == ["q_proj", "v_proj"]
    assert (adapter.config["peft_type"], adapter.config["r"]) == ("LORA", 8)
    assert adapter.model is model
    assert adapter.folder is None


def test_wrapped_models(model_path: Path) -> None:
    model = peft_model(model_path, seed=1)
    compiled = torch.compile(model, backend="eager")  # the default one warns on import
    for wrapped in (Wrapper(model), compiled, Wrapper(compiled)):
        adapter = read(wrapped)
        assert adapter.model is model
        assert adapter.tensors[NAME].equal(model.get_parameter(PARAMETER))


def test_patterns_become_names(model_path: Path) -> None:
    model = peft_model(model_path, target_modules=r".*\.(q|v)_proj")
    assert read(model).config["target_modules"] == ["q_proj", "v_proj"]
    model = peft_model(model_path, target_modules="all-linear")
    assert set(read(model).config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_the_active_adapter_is_meant(model_path: Path) -> None:
    model = peft_model(model_path, seed=1)
    second = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", second)
    assert read(model).config["r"] == 8
    model.set_adapter("second")
    adapter = read(model)
    assert adapter.config["r"] == 4
    assert len(adapter.tensors) == 8
    assert adapter.tensors[NAME].shape[0] == 4
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(WeightsError, match=r"2 active adapters, .*set_adapter\(name\)"):
        read(model)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(
    "form",
    [
        lambda model: tensors_of(model),
        lambda model: dict(read(model).tensors),
        lambda model: model.state_dict(),
        lambda model: Wrapper(model).state_dict(),
        lambda model: TensorDict.from_module(model).data.clone(),
    ],
    ids=["parameters", "files", "state_dict", "wrapped", "tensordict"],
)
def test_mappings(model_path: Path, form: Any) -> None:
    model = peft_model(model_path, seed=1)
    given = form(copy.deepcopy(train(model, 2)))
    expected = {name: t.detach().clone() for name, t in read(model).tensors.items()}
    adapter = read(given, Wrapper(train(model, 3)))
    assert adapter.tensors.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in adapter.tensors.items())
    assert not adapter.tensors[NAME].equal(model.get_parameter(PARAMETER))


def test_mappings_that_are_no_adapter(model_path: Path) -> None:
    model = peft_model(model_path, seed=1)
    given = tensors_of(model)
    for changed, says in (
        ({}, r"of the adapter's 8 tensors, 8 are missing: base_model"),
        ({PARAMETER: given[PARAMETER]}, "of the adapter's 8 tensors, 7 are missing"),
        ({**given, "x.weight": torch.ones(1)}, "1 name is not of the adapter: x.weight"),
        ({**given, PARAMETER: given[PARAMETER][:4]}, r"lora_A.weight is torch.Size.*\(8, 128\)"),
        ({**given, PARAMETER: 3}, r"lora_A.weight is int; .*has \(8, 128\)"),
    ):
        with pytest.raises(WeightsError, match=says):
            read(changed, model)


def test_what_is_no_adapter(model_path: Path, tmp_path: Path) -> None:
    base = base_model(model_path)
    works = "push a PEFT model, the path of an adapter's folder, or a mapping"
    for source, reference, says in (
        (base, None, f"from a Qwen2ForCausalLM: {works}"),
        (3, None, f"from a int: {works}"),
        ({}, None, f"from a dict without a PEFT model that it belongs to: {works}"),
        ({}, base, f"from a dict that belongs to a Qwen2ForCausalLM, which is no PEFT.*{works}"),
    ):
        with pytest.raises(WeightsError, match=says):
            read(source, reference)
    with pytest.raises(WeightsError, match=works):
        read(None)
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        read(str(tmp_path / "nowhere"))
    prefix = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedOptionError, match=r"type PREFIX_TUNING: SGLang serves LORA"):
        read(prefix)


@pytest.mark.parametrize(
    "option",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"use_dora": True},
        {"modules_to_save": ["o_proj"]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_options_that_sglang_does_not_read(model_path: Path, option: dict[str, Any]) -> None:
    model = peft_model(model_path, **option)
    with pytest.raises(UnsupportedOptionError, match=rf"has {next(iter(option))}=.*merged"):
        read(model)


def test_a_fused_module_that_is_incomplete(model_path: Path) -> None:
    with pytest.raises(WeightsError, match="SGLang needs q_proj and v_proj together"):
        read(peft_model(model_path, target_modules=["q_proj", "o_proj"]))


def test_values_that_are_not_finite(model_path: Path) -> None:
    model = peft_model(model_path, seed=1)
    with torch.no_grad():
        model.get_parameter(PARAMETER)[0, 0] = torch.inf
    assert read(model).tensors
    with pytest.raises(WeightsError, match="NaN or infinity in 1 of the 8 tensors"):
        read(model, finite=True)


def test_sharded_tensors(model_path: Path) -> None:
    class Part(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            raise AssertionError("was gathered")

    model = peft_model(model_path, seed=1)
    given = {name: t.as_subclass(Part) for name, t in tensors_of(model).items()}
    with pytest.raises(WeightsError, match=r"8 tensors are sharded.*Gather the adapter first"):
        read(given, model)


def test_configurations_fit_for_json() -> None:
    odd = {"a": {"z", "b"}, "b": (1, 2), "c": {1: frozenset({2})}, "d": torch.float16, "e": None}
    plain = plain_config(odd)
    assert plain == {"a": ["b", "z"], "b": [1, 2], "c": {"1": [2]}, "d": "torch.float16", "e": None}


# What travels

TENSORS = Capabilities(update_session=True, checksum=True, cache_salt=True, adapter_tensors=True)


def test_each_rank_gets_copies_and_not_the_storage_behind(model_path: Path) -> None:
    adapter = read(peft_model(model_path, seed=1))
    big = torch.zeros(1000, 128)
    views = {**adapter.tensors, NAME: big[:8]}
    adapter = AdapterSource(config=adapter.config, tensors=views)
    infos = [worker(capabilities=TENSORS), worker(url="http://t", tp_size=2, capabilities=TENSORS)]
    with prepared(adapter, "policy@3", infos, None) as load:
        bodies = load.bodies
    content = base64.b64decode(bodies["http://s"]["serialized_named_tensors"][0])
    assert len(content) < load.num_bytes + 10_000 < big.nbytes
    with prepared(adapter, "policy@3", infos, torch.bfloat16) as load:
        assert load.order is ControlClient.load_adapter_tensors
        bodies = load.bodies
    assert load.num_bytes == 2 * sum(tensor.numel() for tensor in views.values())
    assert [len(bodies[i.url]["serialized_named_tensors"]) for i in infos] == [1, 2]
    content = base64.b64decode(bodies["http://s"]["serialized_named_tensors"][0])
    sent = pickle.loads(content)
    assert all(sent[name].equal(t.bfloat16()) for name, t in views.items())
    json.dumps(bodies)


def test_a_folder_where_servers_take_no_tensors(model_path: Path) -> None:
    adapter = read(peft_model(model_path, seed=1))
    with prepared(adapter, "policy@3", [worker(url="http://127.0.0.1:1")], None) as load:
        folder = Path(load.bodies["http://127.0.0.1:1"]["lora_path"])
        assert load.order is ControlClient.load_adapter
        assert read(folder).folder == str(folder)
    assert not folder.exists()
    with (
        pytest.raises(UnsupportedOptionError, match=r"http://far is on another.*save_pretrained"),
        prepared(adapter, "policy@3", [worker(url="http://far")], None),
    ):
        pass


def test_a_folder_that_is_there(model_path: Path, tmp_path: Path) -> None:
    folder = random_adapter(tmp_path / "a", base_model(model_path), seed=1)
    with prepared(read(folder), "policy@3", [worker()], None) as load:
        assert load.bodies["http://s"] == {
            "lora_name": "policy@3",
            "lora_path": str(folder),
            "pinned": False,
        }
    assert load.num_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert folder.exists()


@pytest.mark.parametrize(
    ("server", "kind", "says"),
    [
        ({"features": Features()}, UnsupportedOptionError, "without LoRA: .*enable_lora=True"),
        ({"dp_size": 2}, TopologyError, "dp_size=2.*use num_replicas"),
        (
            {"features": Features(lora=True, max_adapters=1)},
            UnsupportedOptionError,
            "max_loaded_loras=1: .*Start it with 2 or more",
        ),
    ],
    ids=str,
)
def test_servers_that_can_not_take_part(server: dict[str, Any], kind: type, says: str) -> None:
    good = {"features": Features(lora=True, max_adapters=2)}
    check_servers([worker(**good)])
    with pytest.raises(kind, match=f"http://bad runs .*{says}" if "dp" in says else says):
        check_servers([worker(**good), worker(**{"url": "http://bad", **good, **server})])
