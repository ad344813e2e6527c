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
from torchrl_sglang import AsyncSGLang
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError
from torchrl_sglang.launch.commands import CPU_SERVE, SERVE_ROUTER
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
