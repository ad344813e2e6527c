"""What options are called, and how unknown ones are found before anything starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.servers import SERVER_PYTHON
from test_launch import descendants

from torchrl_sglang import AsyncSGLang, RouterConfig, Timeouts
from torchrl_sglang.errors import ConfigError, LaunchError, UnsupportedOptionError
from torchrl_sglang.launch.commands import CPU_SERVE, SERVE_ROUTER
from torchrl_sglang.launch.fleet import FleetPlan
from torchrl_sglang.launch.options import SYNONYMS, KnownOptions, in_our_words
from torchrl_sglang.launch.process import known_options

PYTHON = SERVER_PYTHON or sys.executable


@pytest.fixture(scope="module")
def known() -> dict[str, KnownOptions]:
    """The options of the installed SGLang and router."""
    return known_options(PYTHON)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_model_len": 2048}, {"context_length": 2048}),
        ({"gpu_memory_utilization": 0.5}, {"mem_fraction_static": 0.5}),
        ({"seed": 0, "max_num_seqs": 4}, {"random_seed": 0, "max_running_requests": 4}),
        ({"tensor_parallel_size": 2}, {"tp_size": 2}),
        ({"tp": 2, "dp": 3}, {"tp_size": 2, "dp_size": 3}),
        ({"enforce_eager": True}, {"disable_cuda_graph": True}),
        ({"enable_prefix_caching": False}, {"disable_radix_cache": True}),
        ({"enable_prefix_caching": True}, {"disable_radix_cache": False}),
        ({"enable_prefix_caching": None}, {"disable_radix_cache": None}),
        ({"dtype": "float32", "quantization": None}, {"dtype": "float32", "quantization": None}),
        ({"no_such": 1}, {"no_such": 1}),
    ],
    ids=str,
)
def test_names_of_others_are_understood(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert in_our_words(given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_model_len": 1, "context_length": 1}, "max_model_len= and context_length= are two"),
        ({"tp_size": 2, "tensor_parallel_size": 2}, "tp_size= and tensor_parallel_size= are two"),
        ({"tp": 2, "num_devices": 2}, "tp= and num_devices= are two names"),
        ({"enable_prefix_caching": True, "disable_radix_cache": False}, "are two names"),
        ({"enable_prefix_caching": "yes"}, "must be True or False, got 'yes'"),
    ],
    ids=str,
)
def test_one_option_is_given_once(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        in_our_words(given)
    if "tp_size" in given:
        given = {**given, "cuda_devices": [0]}
        with pytest.raises(ConfigError, match=says):
            AsyncSGLang.from_pretrained("m", **given)


def test_every_option_of_the_server_is_known(known: dict[str, KnownOptions]) -> None:
    """By its own help; one that was not found would be refused."""
    asked = subprocess.run(
        [PYTHON, str(CPU_SERVE), "--help"],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=240.0,
        check=True,
    )
    usage = asked.stdout.partition("\n\n")[0]
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9-]*)", usage)}
    assert {"mem_fraction_static", "lora_paths", "sampling_backend", "sleep_on_idle"} <= flags
    assert len(flags) > 200
    sglang = known["sglang"]
    assert sglang.checked(dict.fromkeys(flags, 1), "SGLang") == dict.fromkeys(flags, 1)
    negated = {flag[3:] for flag in flags if flag.startswith("no_") and flag[3:] in flags}
    assert negated == sglang.negatable & flags
    names = {name.rpartition(" ")[2] for name in SYNONYMS.values()} - {"cuda_devices"}
    assert names <= sglang.names  # what others' names are translated to


def run_router(*options: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, str(SERVE_ROUTER), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120.0, check=False)


@pytest.mark.slow
def test_the_mini_load_balancer_is_the_routers_own() -> None:
    """What is put in its place, until somebody asks for it, hands over to it."""
    asked = run_router("--mini-lb")
    assert asked.returncode != 0
    assert "MiniLB only supports PD disaggregation mode" in asked.stderr


def test_every_option_of_the_router_is_known(known: dict[str, KnownOptions]) -> None:
    asked = run_router("--help")
    asked.check_returncode()
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9-]+)", asked.stdout)}
    assert {"policy", "worker_urls", "log_level"} <= flags
    known["sglang_router"].checked(dict.fromkeys(flags - {"help"}, 1), "the router")


SOME = KnownOptions(
    names=frozenset({"mem_fraction_static", "context_length", "enable_x", "x"}),
    negatable=frozenset({"enable_x"}),
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"x": 1, "context_length": None}, {"x": 1, "context_length": None}),
        ({"x": False}, {"x": False}),
        ({"mem_fraction": 0.5}, {"mem_fraction": 0.5}),  # argparse knows what is meant
        ({"context-length": 5}, {"context-length": 5}),
        ({"enable_x": True}, {"enable_x": True}),
        # Without it the server's own default would stand, which may be True.
        ({"enable_x": False}, {"no_enable_x": True}),
        ({"no_enable_x": True}, {"no_enable_x": True}),
    ],
    ids=str,
)
def test_known_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert SOME.checked(given, "it") == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mem_fraction_statics", "has no option 'mem_fraction_statics' .*mean mem_fraction_static"),
        ("max_model_length", "mean max_model_len"),
        ("no_x", "has no option 'no_x'"),
        ("zzz", r"has no option 'zzz'\. "),
    ],
)
def test_unknown_options(name: str, says: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=says):
        SOME.checked({name: 1}, "it")
    assert KnownOptions().checked({name: 1}, "it") == {name: 1}  # nothing is known


@pytest.mark.parametrize("answer", ["exit 3", "echo 1.0", "echo '{\"sglang\": {}}'", "echo '[]'"])
def test_options_that_can_not_be_found_out(tmp_path: Path, answer: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    assert known_options(str(python)) == {}
    assert known_options(str(tmp_path / "nowhere")) == {}


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


# TorchRL's constructor


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


def test_its_sizes_are_attributes(service: AsyncSGLang) -> None:
    sizes = (service.tp_size, service.dp_size, service.pp_size, service.ep_size)
    assert sizes == (service.get_tp_size(), service.get_dp_size(), 1, 1) == (1, 1, 1, 1)


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
