"""Writes the command lines and environments of a server and of the router: pure functions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import RouterConfig, ServerConfig
from ..errors import ConfigError
from .cores import binding

NO_PROXY = ("no_proxy", "NO_PROXY")
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")

CPU_SERVE = Path(__file__).with_name("cpu") / "serve.py"

KEEP_ALIVE_S = "3600"
# Of the memory that is free for each rank: a server refuses to start where it differs by a tenth.
NO_BALANCE_CHECK = ("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")

# SGLang serves a dense text model on CPU with these; ``sleep_on_idle`` gives the core back.
# A server measures what is free before and after it loads, and fails where less is left than the
# fraction allows. On a CPU others take of the same memory meanwhile: so the fraction leaves room
# for them, and what bounds the cache is a number of tokens, not a share of the machine.
CPU_DEFAULTS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "mem_fraction_static": 0.9,
    "sleep_on_idle": True,
}
CPU_TOTAL_TOKENS = 1 << 16  # of the cache: 0.8 GB for Qwen2.5-0.5B, 3.8 GB for its 7B

# The one LoRA backend that computes with torch alone.
CPU_LORA_DEFAULTS: dict[str, Any] = {"lora_backend": "torch_native"}

# Options that have an argument of their own; a second value through extra_args would be ambiguous.
OWN_OPTIONS = {
    "model_path": "model_name",
    "model": "model_name",
    "device": "device",
    "tp_size": "tp_size",
    "dp_size": "dp_size",
    "pp_size": "pp_size",
    "ep_size": "ep_size",
    "host": "host",
    "port": "server_ports",
    "api_key": "api_key",
    "admin_api_key": "admin_api_key",
}


def server_argv(config: ServerConfig, *, python: str, port: int, nccl_port: int) -> list[str]:
    """The command that starts one server.

    Args:
        config: what to start.
        python: interpreter that has SGLang.
        port: HTTP port.
        nccl_port: port of the rendezvous between the server's own ranks.
    """
    on_cpu = config.device == "cpu"
    entry = ["-P", str(CPU_SERVE)] if on_cpu else ["-m", "sglang.launch_server"]
    options: dict[str, Any] = {
        "model_path": config.model_path,
        "device": config.device,
        "host": config.host,
        "port": port,
        # Data-parallel replicas would all listen on a port that is given: each finds its own then.
        "nccl_port": nccl_port if config.dp_size == 1 else None,
        "tp_size": config.tp_size,
        "dp_size": config.dp_size,
        "pp_size": config.pp_size,
        "ep_size": config.ep_size,
        "api_key": config.api_key,
        "admin_api_key": config.admin_api_key,
        **(_cpu_defaults(config) if on_cpu else gpu_placement(config.cuda_devices)),
        **config.extra_args,
    }
    return [python, *entry, *flags(options)]


def _cpu_defaults(config: ServerConfig) -> dict[str, Any]:
    given = config.extra_args
    with_lora = given.get("enable_lora") or given.get("lora_paths")
    # A prompt that does not fit into the cache is refused, however long the context is.
    tokens = max(CPU_TOTAL_TOKENS, int(given.get("context_length") or 0))
    lora = CPU_LORA_DEFAULTS if with_lora else {}
    return {**CPU_DEFAULTS, "max_total_tokens": tokens, **lora}


def gpu_placement(devices: tuple[int, ...] | None) -> dict[str, Any]:
    """Options that put a server on evenly spaced GPUs while it still sees all of them.

    Server and trainer should see the same GPUs, or NCCL may not find the link between them; only
    unevenly spaced GPUs are set apart by ``CUDA_VISIBLE_DEVICES`` (`server_env`).
    """
    step = _even_step(devices)
    if devices is None or step is None:
        return {}
    return {"base_gpu_id": devices[0], "gpu_id_step": step}


def _even_step(devices: tuple[int, ...] | None) -> int | None:
    if not devices:
        return None
    steps = {b - a for a, b in itertools.pairwise(devices)} or {1}
    return steps.pop() if len(steps) == 1 and min(steps) > 0 else None


def flags(options: Mapping[str, Any]) -> list[str]:
    """``{"tp_size": 2, "sleep_on_idle": True}`` to ``["--tp-size", "2", "--sleep-on-idle"]``."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif str(value).startswith("-") and isinstance(value, str):
            words.append(f"{flag}={value}")  # argparse would take it for an option
        else:
            words += [flag, str(value)]
    return words


def check_extra_args(extra_args: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an option that has an argument of its own."""
    for name in extra_args:
        if name in OWN_OPTIONS:
            raise ConfigError(
                f"server option {name!r} has an argument of its own: pass {OWN_OPTIONS[name]}=."
            )


def server_env(config: ServerConfig, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of one server.

    Args:
        config: what to start.
        base: the environment to start from, usually this process's own.
    """
    env = dict(base)
    # SGLang closes idle connections after 5 s. A training step often takes that long, and then the
    # router sends the next batch into connections that are closing, and opens its circuit for 60 s.
    env.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", KEEP_ALIVE_S)
    if config.device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        # All ranks measure the same memory, one a moment after the other.
        env.setdefault(*NO_BALANCE_CHECK)
        if config.cpu_threads is not None:
            env.setdefault("OMP_NUM_THREADS", str(config.cpu_threads))
        if config.cpu_cores is not None:
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding(config.cpu_cores))
    else:
        if config.tp_size > 1:
            # A trainer that shares some of the GPUs leaves less on these.
            env.setdefault(*NO_BALANCE_CHECK)
        # The server would set 0 for itself, and a trainer that sets nothing would then fail in the
        # first broadcast; 1 is what torch gives the trainer.
        env.setdefault("NCCL_CUMEM_ENABLE", "1")
        if config.cuda_devices is not None and _even_step(config.cuda_devices) is None:
            env["CUDA_VISIBLE_DEVICES"] = _visible(config.cuda_devices, base)
    return exempt_from_proxies({**env, **config.env}, config.host)


def exempt_from_proxies(env: Mapping[str, str], host: str) -> dict[str, str]:
    """An environment whose proxies, if there are any, are for downloads alone.

    A server's first request is one to itself, and the router's are to servers.

    Args:
        env: the environment of a child.
        host: what it listens on, beside loopback addresses.
    """
    if not any(value and name.lower().endswith("_proxy") for name, value in env.items()):
        return dict(env)
    # Who knows both spellings reads one of them alone: both say what either of them said.
    given = [env.get(name, "").split(",") for name in NO_PROXY]
    hosts = dict.fromkeys(word.strip() for word in [*itertools.chain(*given), *LOOPBACK, host])
    return {**env, **dict.fromkeys(NO_PROXY, ",".join(filter(None, hosts)))}


def _visible(devices: tuple[int, ...], base: Mapping[str, str]) -> str:
    """Device numbers of this process as a child's ``CUDA_VISIBLE_DEVICES``."""
    seen = [word for word in base.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    if not seen:
        return ",".join(map(str, devices))
    if max(devices) >= len(seen):
        raise ConfigError(
            f"cuda_devices={list(devices)}, but CUDA_VISIBLE_DEVICES shows only {len(seen)} GPUs."
        )
    return ",".join(seen[d] for d in devices)


SERVE_ROUTER = Path(__file__).parent / "serve_router.py"


def router_argv(
    config: RouterConfig,
    *,
    python: str,
    port: int,
    prometheus_port: int,
    worker_urls: Sequence[str],
    api_key: str | None,
) -> list[str]:
    """The command that starts sglang-router in front of servers that are ready.

    Args:
        config: how it routes.
        python: interpreter that has sglang-router.
        port: HTTP port.
        prometheus_port: its metrics port, which otherwise is the same for every router.
        worker_urls: the servers.
        api_key: key that it asks of clients and shows to the servers.
    """
    options = {
        "host": config.host,
        "port": port,
        "worker_urls": list(worker_urls),
        "policy": config.policy,
        "api_key": api_key,
        "prometheus_host": "127.0.0.1",
        "prometheus_port": prometheus_port,
        "worker_startup_check_interval": 1,
        "health_check_interval_secs": config.health_check_interval_s,
        # Answered by schedulers that are paused too. SGLang's own /health generates a token, so a
        # pause of half a minute would have the router leave a server out, and for longer than that.
        "health_check_endpoint": "/server_info",
        "log_level": "info",
        **config.extra_args,
    }
    return [python, str(SERVE_ROUTER), *flags(options)]
