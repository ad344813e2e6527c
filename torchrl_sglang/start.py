"""From a user's arguments to a running fleet: plan, then act."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .attach import Credentials, client_of
from .client import ControlClient
from .config import Device, ServerConfig, is_count
from .errors import ConfigError, ServiceError
from .info import parse_worker_urls
from .launch.fleet import Fleet, FleetPlan
from .launch.server import check_extra_args

GPUS_HELP = "AsyncSGLang divides cuda_devices among the replicas in order."


def plan_fleet(
    server: ServerConfig,
    *,
    num_replicas: int,
    cuda_devices: Sequence[int] | None,
    ports: Sequence[int] | None,
) -> tuple[ServerConfig, ...]:
    """One configuration per replica.

    Args:
        server: what all replicas have in common.
        num_replicas: how many.
        cuda_devices: GPUs to divide among them in order.
        ports: a port for each, or None for free ones.

    Raises:
        ConfigError: an argument is wrong, or the model's folder is.
    """
    check_model(server.model_path)
    check_extra_args(server.extra_args)
    if not is_count(num_replicas):
        raise ConfigError(f"num_replicas must be an integer >= 1, got {num_replicas!r}.")
    if ports is not None and (len(ports), len(set(ports))) != (num_replicas, num_replicas):
        raise ConfigError(f"server_ports needs {num_replicas} different ports, got {list(ports)}.")
    gpus = divide_gpus(cuda_devices, num_replicas, server.num_gpus, server.device)
    return tuple(
        replace(
            server,
            cuda_devices=gpus[index],
            cpu_threads=cpu_threads(len(os.sched_getaffinity(0)), num_replicas),
            port=ports[index] if ports is not None else None,
        )
        for index in range(num_replicas)
    )


def cpu_threads(num_cores: int, num_replicas: int) -> int:
    """Threads that each CPU server computes with.

    Threads of one computation wait for each other at every step. Where there are more of them than
    cores, one always waits for its turn and all others spin: a 2-core machine with two servers of
    two threads generates ten times slower than with one thread each. One core is left to the
    router, the HTTP servers and the trainer.
    """
    return max(1, (num_cores - 1) // num_replicas)


def check_model(model_name: str) -> None:
    """Raises `ConfigError` where a name is a folder that is no model."""
    folder = Path(model_name).expanduser()
    written_as_path = model_name.startswith((".", "/", "~")) or model_name.count("/") > 1
    if written_as_path and not folder.is_dir():
        raise ConfigError(f"there is no folder {model_name!r} to load a model from.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"the folder {model_name!r} has no config.json: it is no model.")


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


def divide_gpus(
    cuda_devices: Sequence[int] | None, num_replicas: int, per_replica: int, device: str
) -> list[tuple[int, ...] | None]:
    """GPUs of each replica, in order; None leaves the choice to the server."""
    if device == "cpu":
        if cuda_devices is not None:
            raise ConfigError("cuda_devices is given with device='cpu': leave one out.")
        return [None] * num_replicas
    if cuda_devices is None:
        if num_replicas == 1:
            return [None]
        cuda_devices = range(num_replicas * per_replica)
    if len(cuda_devices) != num_replicas * per_replica:
        raise ConfigError(
            f"{num_replicas} replicas of {per_replica} GPUs need {num_replicas * per_replica} "
            f"cuda_devices, got {len(cuda_devices)}: {list(cuda_devices)}. {GPUS_HELP}"
        )
    devices = tuple(cuda_devices)
    if len(set(devices)) != len(devices):
        raise ConfigError(f"cuda_devices names a GPU twice: {list(devices)}.")
    return [devices[i * per_replica : (i + 1) * per_replica] for i in range(num_replicas)]


def start_fleet(plan: FleetPlan, keys: Credentials) -> Fleet:
    """Starts servers and router and waits until every server takes requests through the router."""

    def client(url: str) -> ControlClient:
        return client_of(url, keys, plan.timeouts)

    def router_ready(url: str, num_workers: int) -> bool:
        try:
            workers = parse_worker_urls(client(url).get("/workers"))
        except ServiceError:
            return False
        return workers is not None and len(workers) == num_workers

    return Fleet(
        plan, server_ready=lambda url: client(url).answers("/health"), router_ready=router_ready
    )
