"""The configuration dataclasses: frozen, keyword-only, checked when made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from torchrl_sglang import RouterConfig, ServerConfig, Timeouts, WeightSyncConfig
from torchrl_sglang.errors import ConfigError

SERVER: dict[str, Any] = {"model_path": "/m", "device": "cuda"}

REQUIRED: dict[type, dict[str, Any]] = {
    ServerConfig: SERVER,
    RouterConfig: {},
    Timeouts: {},
    WeightSyncConfig: {},
}


@pytest.mark.parametrize("config", REQUIRED)
def test_frozen_and_by_keyword(config: type) -> None:
    made = config(**REQUIRED[config])
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, None)
    with pytest.raises(TypeError):
        config("positional")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 1),
        ({"tp_size": 4}, 4),
        ({"tp_size": 2, "pp_size": 2}, 4),
        ({"tp_size": 2, "dp_size": 2}, 4),
        ({"tp_size": 4, "ep_size": 4}, 4),
        ({"tp_size": 4, "dp_size": 4, "extra_args": {"enable_dp_attention": True}}, 4),
    ],
    ids=str,
)
def test_gpus_of_one_server(sizes: dict[str, Any], expected: int) -> None:
    assert ServerConfig(**SERVER, **sizes).num_gpus == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model_path": ""}, "the model is a folder or a hub name"),
        ({"model_path": None}, "the model is a folder or a hub name.*None"),
        ({"tp_size": 0}, "tp_size must be an integer >= 1, got 0"),
        ({"dp_size": -1}, "dp_size must be"),
        ({"pp_size": 1.0}, "pp_size must be"),
        ({"ep_size": "2"}, "ep_size must be"),
        ({"tp_size": True}, "tp_size must be"),
        ({"cuda_devices": ()}, "needs 1 GPUs, cuda_devices names 0"),
        ({"tp_size": 2, "cuda_devices": (3,)}, r"needs 2 GPUs, cuda_devices names 1: \[3\]"),
    ],
    ids=str,
)
def test_wrong_server_configs(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**{**SERVER, **given})


@pytest.mark.parametrize("port", [70000, -1, "30000"])
@pytest.mark.parametrize("config", [ServerConfig, RouterConfig])
def test_a_port_that_can_not_be(config: type, port: Any) -> None:
    with pytest.raises(ConfigError, match="port"):
        config(**REQUIRED[config], port=port)


@pytest.mark.parametrize("given", [{"policy": "fastest"}, {"health_check_interval_s": 0}], ids=str)
def test_wrong_router_configs(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RouterConfig(**given)


@pytest.mark.parametrize("field", dataclasses.fields(Timeouts), ids=lambda f: f.name)
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_every_timeout_is_positive(field: Any, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"Timeouts\.{field.name} must be positive"):
        Timeouts(**{field.name: value})


@pytest.mark.parametrize("value", [None, "30"])
def test_every_timeout_is_a_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="request_s"):
        Timeouts(request_s=value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pause_mode": "stop"}, "pause_mode must be one of .*'in_place'.* got 'stop'"),
        ({"pause_mode": "in_place", "flush_cache": True}, "flush_cache=True with .*in_place"),
        ({"bucket_bytes": 0}, "bucket_bytes must be an integer >= 1, got 0"),
        ({"bucket_bytes": 1.5}, "bucket_bytes must be an integer >= 1, got 1.5"),
        ({"method": "fax"}, "method must be one of .* got 'fax'"),
        ({"method": "lora", "adapter_name": ""}, "adapter_name must be a string .* got ''"),
        ({"adapter_name": "a@1"}, "adapter_name must be a string .*no '@'.* got 'a@1'"),
        ({"adapter_name": None}, "adapter_name must be a string .* got None"),
        ({"method": "lora", "non_blocking": True}, "non_blocking=True with method='lora'"),
        ({"method": "lora", "verify_method": "checksum"}, "no checksums of adapters; use 'auto'"),
        ({"layout": "both"}, "layout must be one of .* got 'both'"),
        ({"verify": True}, "verify must be one of .* got True"),
        ({"lost_engines": "keep"}, "lost_engines must be one of .* got 'keep'"),
        ({"verify_method": "hope"}, "verify_method must be one of .* got 'hope'"),
        ({"probe_tolerance": -0.1}, "probe_tolerance"),
        ({"probe_tolerance": float("nan")}, "probe_tolerance"),
    ],
    ids=str,
)
def test_wrong_weight_sync_configs(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WeightSyncConfig(**given)


def test_defaults() -> None:
    config = WeightSyncConfig()
    assert (config.pause_mode, config.verify, config.verify_method) == ("retract", "always", "auto")
    assert config.flushes
    assert not WeightSyncConfig(pause_mode="in_place").flushes
    assert RouterConfig().policy == "round_robin"  # cache_aware sends all ids to one worker
    assert ServerConfig(**SERVER).host == RouterConfig().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("num_bytes", "device", "expected"),
    [(0, "cpu", 3.0), (10**9, "cpu", 13.0), (10**11, "cpu", 30.0), (0, "cuda", 30.0)],
)
def test_the_bound_on_a_step_that_reads_all_weights(
    num_bytes: int, device: str, expected: float
) -> None:
    assert Timeouts().whole_s(num_bytes, device) == expected


@pytest.mark.parametrize(
    ("config", "typo", "says"),
    [
        (
            WeightSyncConfig,
            "verfy",
            "WeightSyncConfig has no option 'verfy': did you mean 'verify'",
        ),
        (Timeouts, "step", "did you mean 'step_s'"),
        (ServerConfig, "tp", "ServerConfig has no option 'tp': it has model_path, device, "),
        (RouterConfig, "polcy", "did you mean 'policy'"),
    ],
)
def test_an_unknown_option_names_its_neighbour(config: Any, typo: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**{typo: 1})


def test_an_adapter_push_has_no_base_weights() -> None:
    with pytest.raises(ConfigError, match="no base weights"):
        WeightSyncConfig(method="lora", lost_engines="restart")
