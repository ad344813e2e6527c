"""Starts the servers and the router of a plan, and waits until they serve."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import Device, RouterConfig, ServerConfig, Timeouts
from ..errors import ConfigError, ServiceError
from ..launch.fleet import Fleet, FleetPlan
from ..launch.plan import SIZES, START_OPTIONS, expanded, plan_fleet
from .attach import Credentials, client_of
from .control import ControlClient
from .info import parse_worker_urls


def choose_device(device: str | None) -> Device:
    """The device that was asked for, else CUDA where a GPU is visible, else CPU."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    match str(device):
        case "cpu":
            return "cpu"
        case "cuda" if torch.cuda.is_available():
            return "cuda"
        case "cuda":
            raise ConfigError("device='cuda', but no GPU is visible here; device='cpu' works.")
        case other:
            raise ConfigError(
                f"device must be 'cpu', 'cuda' or None, got {other!r}; choose GPUs with "
                "cuda_devices=."
            )


def start_managed(
    model_path: str, keys: Credentials, timeouts: Timeouts, options: Mapping[str, Any]
) -> Fleet:
    """Starts servers and their router; options and errors as `AsyncSGLang.from_pretrained` has."""
    given = {"num_replicas": 1, **options}
    own = {name: given.pop(name) for name in START_OPTIONS if name in given}
    sizes = {name: given.pop(name) for name in SIZES if name in given}
    if "tokenizer_path" in given:
        given["tokenizer_path"] = expanded(given["tokenizer_path"])
    server = ServerConfig(
        model_path=expanded(model_path),
        device=choose_device(own.get("device")),
        api_key=keys.api_key,
        admin_api_key=keys.admin_api_key,
        env=own.get("server_env") or {},
        extra_args=given,
        **sizes,
    )
    servers = plan_fleet(
        server,
        num_replicas=own["num_replicas"],
        cuda_devices=own.get("cuda_devices"),
        ports=own.get("server_ports"),
    )
    log_dir = own.get("log_dir")
    plan = FleetPlan(
        servers=servers,
        router=own.get("router") or RouterConfig(),
        python=own.get("server_python") or sys.executable,
        log_dir=Path(log_dir) if log_dir is not None else None,
        timeouts=timeouts,
    )
    return start_fleet(plan, keys)


def start_fleet(plan: FleetPlan, keys: Credentials) -> Fleet:
    """Starts servers and router and waits until every server takes requests through the router."""

    def client(url: str) -> ControlClient:
        return client_of(url, keys, plan.timeouts)

    def router_ready(url: str, num_workers: int) -> bool:
        try:
            workers = parse_worker_urls(client(url).workers())
        except ServiceError:
            return False
        return workers is not None and len(workers) == num_workers

    return Fleet(plan, server_ready=lambda url: client(url).is_up(), router_ready=router_ready)
