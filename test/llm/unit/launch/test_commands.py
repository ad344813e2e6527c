"""Command lines and environments of servers and routers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.plans import server
from torchrl_sglang import RouterConfig, ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.launch.commands import (
    CPU_SERVE,
    CPU_TOTAL_TOKENS,
    NO_BALANCE_CHECK,
    OWN_OPTIONS,
    SERVE_ROUTER,
    check_extra_args,
    exempt_from_proxies,
    flags,
    gpu_placement,
    router_argv,
    server_argv,
    server_env,
)
from torchrl_sglang.launch.process import redacted

UNBALANCED = dict([NO_BALANCE_CHECK])


def options(argv: list[str]) -> dict[str, str | list[str]]:
    """``["--a", "1", "--b"]`` to ``{"--a": ["1"], "--b": []}``; no flag comes twice."""
    found: dict[str, Any] = {}
    for word in argv:
        if word.startswith("--"):
            assert word not in found
            values = found[word] = []
        elif found:
            values.append(word)
    return found


def argv_of(config: ServerConfig) -> list[str]:
    return server_argv(config, python="/py", port=3000, nccl_port=4000)


def test_data_parallel_replicas_find_ports_of_their_own() -> None:
    """They would all listen on one that is given, and all but one would end."""
    single = ServerConfig(model_path="m", device="cuda")
    several = ServerConfig(model_path="m", device="cuda", dp_size=2)
    assert "--nccl-port" in argv_of(single)
    assert "--nccl-port" not in argv_of(several)


# Words of a command line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"tp_size": 2}, ["--tp-size", "2"]),
        ({"sleep_on_idle": True}, ["--sleep-on-idle"]),
        ({"sleep_on_idle": False, "api_key": None}, []),
        ({"mem_fraction_static": 0.5}, ["--mem-fraction-static", "0.5"]),
        ({"worker_urls": ["a", "b"]}, ["--worker-urls", "a", "b"]),
        ({"cuda_graph_bs": (1, 2)}, ["--cuda-graph-bs", "1", "2"]),
        ({"seed": 0}, ["--seed", "0"]),
        ({"a": "", "b": "x y"}, ["--a", "", "--b", "x y"]),
        # As a word of its own, argparse would take it for an option.
        ({"api_key": "-x"}, ["--api-key=-x"]),
        ({"priority": -1}, ["--priority", "-1"]),
    ],
    ids=str,
)
def test_flags(given: dict[str, Any], expected: list[str]) -> None:
    assert flags(given) == expected


def test_a_mapping_is_sent_as_json() -> None:
    flag, value = flags({"json_model_override_args": {"a": [1], "b": None}})
    assert flag == "--json-model-override-args"
    assert json.loads(value) == {"a": [1], "b": None}


# Servers


def test_the_command_of_a_gpu_server() -> None:
    argv = argv_of(
        server(
            tp_size=2,
            cuda_devices=(2, 3),
            api_key="k",
            admin_api_key="a",
            extra_args={"mem_fraction_static": 0.5},
        )
    )
    assert argv[:3] == ["/py", "-m", "sglang.launch_server"]
    assert options(argv) == {
        "--model-path": ["/m"],
        "--device": ["cuda"],
        "--host": ["127.0.0.1"],
        "--port": ["3000"],
        "--nccl-port": ["4000"],
        "--tp-size": ["2"],
        "--dp-size": ["1"],
        "--pp-size": ["1"],
        "--ep-size": ["1"],
        "--api-key": ["k"],
        "--admin-api-key": ["a"],
        "--base-gpu-id": ["2"],
        "--gpu-id-step": ["1"],
        "--mem-fraction-static": ["0.5"],
    }


def test_the_command_of_a_cpu_server() -> None:
    argv = argv_of(server(device="cpu"))
    assert argv[:3] == ["/py", "-P", str(CPU_SERVE)]
    assert CPU_SERVE.is_file()
    given = options(argv)
    assert given["--attention-backend"] == ["torch_native"]
    assert given["--disable-overlap-schedule"] == given["--sleep-on-idle"] == []
    assert not {"--api-key", "--admin-api-key", "--base-gpu-id", "--lora-backend"} & set(given)


@pytest.mark.parametrize(
    ("device", "extra", "expected"),
    [
        ("cpu", {"enable_lora": True, "lora_target_modules": ["q_proj"]}, ["torch_native"]),
        ("cpu", {"lora_paths": ["a=/a"]}, ["torch_native"]),
        ("cpu", {"enable_lora": True, "lora_backend": "mine"}, ["mine"]),
        ("cpu", {"enable_lora": False, "max_lora_rank": 8}, None),
        ("cuda", {"enable_lora": True}, None),
    ],
    ids=str,
)
def test_the_lora_backend(device: str, extra: dict[str, Any], expected: list[str] | None) -> None:
    given = options(argv_of(server(device=device, extra_args=extra)))
    assert given.get("--lora-backend") == expected


@pytest.mark.parametrize(
    ("extra", "flag", "expected"),
    [
        ({"mem_fraction_static": 0.3}, "--mem-fraction-static", ["0.3"]),
        ({"attention_backend": "intel_amx"}, "--attention-backend", ["intel_amx"]),
        ({"sleep_on_idle": False}, "--sleep-on-idle", None),
        ({"lora_paths": ["a=/a", "b=/b"]}, "--lora-paths", ["a=/a", "b=/b"]),
    ],
)
def test_the_users_options_win_over_our_defaults(
    extra: dict[str, Any], flag: str, expected: list[str] | None
) -> None:
    assert options(argv_of(server(device="cpu", extra_args=extra))).get(flag) == expected


@pytest.mark.parametrize(
    ("extra", "tokens", "fraction"),
    [
        ({}, CPU_TOTAL_TOKENS, 0.9),
        ({"mem_fraction_static": 0.95}, CPU_TOTAL_TOKENS, 0.95),
        ({"max_total_tokens": 4096}, 4096, 0.9),
        ({"context_length": 2 * CPU_TOTAL_TOKENS}, 2 * CPU_TOTAL_TOKENS, 0.9),
        ({"context_length": 2048}, CPU_TOTAL_TOKENS, 0.9),
        ({"context_length": None}, CPU_TOTAL_TOKENS, 0.9),
    ],
    ids=str,
)
def test_the_cache_of_a_cpu_server_is_bounded_in_tokens(
    extra: dict[str, Any], tokens: int, fraction: float
) -> None:
    """A share of the machine would be what others take meanwhile, or all of its memory."""
    given = options(argv_of(server(device="cpu", extra_args=extra)))
    assert given["--max-total-tokens"] == [str(tokens)]
    assert given["--mem-fraction-static"] == [str(fraction)]
    assert not {"--max-total-tokens", "--mem-fraction-static"} & set(options(argv_of(server())))


@pytest.mark.parametrize("name", [*OWN_OPTIONS])
def test_options_with_an_argument_of_their_own(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' has an argument of its own"):
        check_extra_args({"mem_fraction_static": 0.5, name: 1})


def test_other_options_pass() -> None:
    check_extra_args({"mem_fraction_static": 0.5, "random_seed": 0})


def test_keys_are_not_shown() -> None:
    argv = argv_of(server(api_key="secret", admin_api_key="hidden"))
    shown = redacted(argv)
    assert len(shown) == len(argv)
    assert not {"secret", "hidden"} & set(shown)
    assert [a for a, b in zip(argv, shown, strict=True) if a != b] == ["secret", "hidden"]


def test_a_key_that_looks_like_an_option_is_not_shown_either() -> None:
    shown = redacted(argv_of(server(api_key="-secret", admin_api_key="--hidden")))
    assert "--api-key=***" in shown
    assert "--admin-api-key=***" in shown
    assert not [word for word in shown if "secret" in word or "hidden" in word]


# GPUs


@pytest.mark.parametrize(
    ("devices", "placement", "visible"),
    [
        (None, {}, None),
        ((0,), {"base_gpu_id": 0, "gpu_id_step": 1}, None),
        ((5,), {"base_gpu_id": 5, "gpu_id_step": 1}, None),
        ((2, 3), {"base_gpu_id": 2, "gpu_id_step": 1}, None),
        ((1, 3, 5), {"base_gpu_id": 1, "gpu_id_step": 2}, None),
        ((0, 1, 3), {}, "0,1,3"),
        ((3, 2), {}, "3,2"),
        ((1, 1), {}, "1,1"),
    ],
    ids=str,
)
def test_placement_on_gpus(
    devices: tuple[int, ...] | None, placement: dict[str, int], visible: str | None
) -> None:
    assert gpu_placement(devices) == placement
    config = server(tp_size=len(devices or (0,)), cuda_devices=devices)
    assert server_env(config, {}).get("CUDA_VISIBLE_DEVICES") == visible


def test_uneven_gpus_are_numbered_as_this_process_sees_them() -> None:
    config = server(tp_size=3, cuda_devices=(0, 1, 3))
    env = server_env(config, {"CUDA_VISIBLE_DEVICES": "4,5,6,GPU-uuid"})
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5,GPU-uuid"
    with pytest.raises(ConfigError, match="shows only 2 GPUs"):
        server_env(config, {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_even_gpus_leave_the_view_alone() -> None:
    env = server_env(server(cuda_devices=(1,)), {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize(
    ("device", "base", "expected"),
    [
        ("cpu", {"A": "1"}, {"A": "1", "SGLANG_USE_CPU_ENGINE": "1", **UNBALANCED}),
        ("cuda", {"A": "1"}, {"A": "1", "NCCL_CUMEM_ENABLE": "1"}),
        ("cuda", {"NCCL_CUMEM_ENABLE": "0"}, {"NCCL_CUMEM_ENABLE": "0"}),
    ],
)
def test_environment(device: str, base: dict[str, str], expected: dict[str, str]) -> None:
    before = dict(base)
    kept = {"SGLANG_TIMEOUT_KEEP_ALIVE": "3600"}
    assert server_env(server(device=device), base) == {**kept, **expected}
    assert base == before


@pytest.mark.parametrize(
    ("changes", "base", "expected"),
    [
        ({"device": "cuda"}, {}, None),
        ({"device": "cuda", "tp_size": 2}, {}, "0"),
        ({"device": "cpu"}, {}, "0"),
        ({"device": "cuda", "tp_size": 2}, {NO_BALANCE_CHECK[0]: "1"}, "1"),
    ],
    ids=str,
)
def test_memory_that_is_taken_unevenly_is_no_reason_to_fail(
    changes: dict[str, Any], base: dict[str, str], expected: str | None
) -> None:
    """As where a trainer shares some of the GPUs, or ranks measure one after the other."""
    assert server_env(server(**changes), base).get(NO_BALANCE_CHECK[0]) == expected


@pytest.mark.parametrize(
    ("changes", "base", "expected"),
    [
        ({"cpu_threads": 3}, {}, "3"),
        ({"cpu_threads": 3}, {"OMP_NUM_THREADS": "5"}, "5"),
        ({"cpu_threads": 3, "env": {"OMP_NUM_THREADS": "7"}}, {"OMP_NUM_THREADS": "5"}, "7"),
        ({"cpu_threads": None}, {}, None),
        ({"cpu_threads": 3, "device": "cuda"}, {}, None),
    ],
    ids=str,
)
def test_threads_of_a_cpu_server(
    changes: dict[str, Any], base: dict[str, str], expected: str | None
) -> None:
    config = server(**{"device": "cpu", **changes})
    assert server_env(config, base).get("OMP_NUM_THREADS") == expected


def test_the_users_variables_win() -> None:
    mine = {"NCCL_CUMEM_ENABLE": "0", "MINE": "1", "SGLANG_TIMEOUT_KEEP_ALIVE": "9"}
    config = server(env=mine)
    env = server_env(config, {"NCCL_CUMEM_ENABLE": "1", "OTHER": "2"})
    assert env == {**mine, "OTHER": "2"}


PROXY = "http://proxy:3128"

ALWAYS_EXEMPT = "localhost,127.0.0.1,::1,0.0.0.0,10.0.0.5"


@pytest.mark.parametrize(
    ("given", "exempt"),
    [
        ({}, None),
        ({"HTTP_PROXY": ""}, None),
        ({"NO_PROXY": ""}, None),
        ({"HTTP_PROXY": PROXY}, ALWAYS_EXEMPT),
        ({"http_proxy": PROXY}, ALWAYS_EXEMPT),
        ({"https_proxy": PROXY}, ALWAYS_EXEMPT),
        ({"All_Proxy": PROXY}, ALWAYS_EXEMPT),
        ({"all_proxy": PROXY, "no_proxy": "a.b, .c"}, f"a.b,.c,{ALWAYS_EXEMPT}"),
        ({"all_proxy": PROXY, "NO_PROXY": "a.b,localhost"}, f"a.b,{ALWAYS_EXEMPT}"),
        ({"all_proxy": PROXY, "NO_PROXY": "A", "no_proxy": "b"}, f"b,A,{ALWAYS_EXEMPT}"),
        ({"all_proxy": PROXY, "no_proxy": "*"}, f"*,{ALWAYS_EXEMPT}"),
    ],
    ids=str,
)
def test_proxies_are_for_downloads(given: dict[str, str], exempt: str | None) -> None:
    """They stay, and don't stand between the servers, the router and this process."""
    for env in (
        exempt_from_proxies(given, "10.0.0.5"),
        server_env(server(host="10.0.0.5"), given),
        server_env(server(host="10.0.0.5", env=given), {}),
    ):
        assert {name: env[name] for name in given if name.lower() != "no_proxy"} == {
            name: value for name, value in given.items() if name.lower() != "no_proxy"
        }
        if exempt is not None:
            assert [env["NO_PROXY"], env["no_proxy"]] == [exempt] * 2
        else:
            assert {name for name in env if name.lower() == "no_proxy"} <= {*given}


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"cpu_cores": ((0, 1), (2, 3))}, {}, "0,1|2,3"),
        ({"cpu_cores": ((0,), (1,))}, {"SGLANG_CPU_OMP_THREADS_BIND": "4|5"}, "4|5"),
        ({}, {}, None),
        ({"cpu_cores": ((0,), (1,)), "device": "cuda"}, {}, None),
    ],
)
def test_ranks_are_bound_to_their_cores(
    changes: dict[str, Any], given: dict[str, str], expected: str | None
) -> None:
    config = server(**{"device": "cpu", **changes})
    assert server_env(config, given).get("SGLANG_CPU_OMP_THREADS_BIND") == expected
    mine = server(**{"device": "cpu", **changes, "env": {"SGLANG_CPU_OMP_THREADS_BIND": "6"}})
    assert server_env(mine, given)["SGLANG_CPU_OMP_THREADS_BIND"] == "6"


# The router


def router(config: RouterConfig, api_key: str | None = "k") -> list[str]:
    return router_argv(
        config,
        python="/py",
        port=3000,
        prometheus_port=4000,
        worker_urls=["http://a", "http://b"],
        api_key=api_key,
    )


def test_the_command_of_a_router() -> None:
    argv = router(RouterConfig(health_check_interval_s=7, extra_args={"log_level": "warn"}))
    assert argv[:2] == ["/py", str(SERVE_ROUTER)]
    given = options(argv)
    assert given["--worker-urls"] == ["http://a", "http://b"]
    assert (given["--host"], given["--port"]) == (["127.0.0.1"], ["3000"])
    assert given["--prometheus-port"] == ["4000"]
    assert given["--policy"] == ["round_robin"]
    assert given["--api-key"] == ["k"]
    assert given["--health-check-interval-secs"] == ["7"]
    assert given["--log-level"] == ["warn"]
    assert "--api-key" not in options(router(RouterConfig(), api_key=None))


@pytest.mark.parametrize(
    "extra", [{"port": 30000}, {"host": "::"}, {"worker_urls": ["http://c"]}, {"api_key": "x"}]
)
def test_what_is_decided_for_the_router(extra: dict[str, Any]) -> None:
    # Another value would start a router at which nobody waits: StartTimeoutError after minutes.
    with pytest.raises(ConfigError):
        router(RouterConfig(extra_args=extra))
