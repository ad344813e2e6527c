"""A service is attached or started, by whichever name an option has, or refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import descendants
from helpers.servers import SERVER_PYTHON
from torchrl_sglang import AsyncSGLang, RouterConfig, Timeouts
from torchrl_sglang.errors import ConfigError, LaunchError, PortTakenError, UnsupportedOptionError
from torchrl_sglang.launch.fleet import FleetPlan


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mem_fraction_statik": 0.5}, "server, as .*'mem_fraction_statik' .*mem_fraction_static"),
        ({"router": RouterConfig(extra_args={"polici": 1})}, "router, as .*'polici' .*policy"),
    ],
)
def test_nothing_starts_with_an_unknown_option(
    model_path: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    earlier = set(descendants(os.getpid()))
    with pytest.raises(UnsupportedOptionError, match=says):
        AsyncSGLang.from_pretrained(
            str(model_path),
            device="cpu",
            log_dir=tmp_path / "logs",
            server_python=SERVER_PYTHON,
            **options,
        )
    assert set(descendants(os.getpid())) <= earlier
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "none is given"),
        ({"server_url": "http://h:1", "model_path": "m"}, "both are given"),
        ({"server_url": "http://h:1", "tp_size": 2}, "tp_size: these are for servers"),
        ({"server_url": "http://h:1", "timeout": 3.0}, r"Timeouts\(request_s=seconds\)"),
        ({"model_path": "m", "timeout": 3.0}, r"Timeouts\(request_s=seconds\)"),
        ({"model_path": ""}, "folder or a hub name"),
        ({"model_path": "m", "tp_size": 0, "device": "cpu"}, "tp_size must be an integer"),
        ({"model_path": "m", "num_replicas": 0, "device": "cpu"}, "num_replicas must be"),
        ({"model_path": "m", "tp": 2, "tp_size": 2}, "two names of one option"),
        ({"model_path": "m", "device": "cpu", "model": "n"}, "pass model_name="),
    ],
    ids=str,
)
def test_a_service_is_attached_or_started(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AsyncSGLang(**given)


@pytest.mark.parametrize("way", [AsyncSGLang.from_pretrained, AsyncSGLang])
def test_what_is_started(model_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any) -> None:
    """The same by TorchRL's constructor, in vLLM's words and with every argument."""
    plans: list[FleetPlan] = []

    def start(plan: FleetPlan, keys: Any) -> Any:
        plans.append(plan)
        raise LaunchError("enough")

    monkeypatch.setattr("torchrl_sglang.servers.start.start_fleet", start)
    name = "model_path" if way is AsyncSGLang else "model_name"
    with pytest.raises(LaunchError, match="enough"):
        way(
            **{name: str(model_path)},
            tensor_parallel_size=2,
            dp_size=3,
            max_model_len=64,
            num_replicas=2,
            device="cpu",
            server_ports=[30001, 30002],
            server_python="/py",
            server_env={"A": "b"},
            router=RouterConfig(policy="random"),
            api_key="k",
            log_dir="/logs",
            timeouts=Timeouts(start_s=7.0),
        )
    [plan] = plans
    assert (plan.python, plan.log_dir, plan.timeouts.start_s) == ("/py", Path("/logs"), 7.0)
    assert plan.router.policy == "random"
    assert [server.port for server in plan.servers] == [30001, 30002]
    for server in plan.servers:
        assert (server.tp_size, server.dp_size, server.pp_size, server.ep_size) == (2, 3, 1, 1)
        assert dict(server.extra_args) == {"context_length": 64}
        assert (dict(server.env), server.api_key, server.device) == ({"A": "b"}, "k", "cpu")
        assert server.admin_api_key  # a random one


def test_gpus_by_the_name_that_torchrl_has_for_them(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ({"devices": [0]}, {"cuda_devices": [0]}):
        with pytest.raises(ConfigError, match="cuda_devices is given with device='cpu'"):
            AsyncSGLang.from_pretrained(str(model_path), device="cpu", **given)


def test_a_port_that_is_taken(model_path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=str(port)):
            AsyncSGLang.from_pretrained(
                str(model_path), device="cpu", server_ports=[port], log_dir=tmp_path
            )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "folder or a hub name"),
        (None, "folder or a hub name"),
        ("./no/such/folder", "no folder"),
        ("{tmp}", "config.json"),
    ],
)
def test_no_model(tmp_path: Path, name: Any, match: str) -> None:
    given = str(tmp_path) if name == "{tmp}" else name
    with pytest.raises(ConfigError, match=match):
        AsyncSGLang.from_pretrained(given, device="cpu")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_replicas": 0},
        {"tp_size": 0},
        {"device": "tpu"},
        {"cuda_devices": [0]},
        {"server_ports": [1, 2]},
        {"model_path": "x"},
    ],
)
def test_wrong_arguments(model_path: Path, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AsyncSGLang.from_pretrained(str(model_path), **{"device": "cpu", **kwargs})


@pytest.mark.parametrize("name", ["", 5, b"one", "a\ud83d"], ids=repr)
def test_what_is_no_name_of_a_run(name: Any) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        AsyncSGLang("http://127.0.0.1:1", run_name=name)
    with pytest.raises(ConfigError, match="run_name"):
        AsyncSGLang.from_pretrained("nowhere", run_name=name)
