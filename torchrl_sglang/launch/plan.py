"""Plans what is started from a user's arguments: one `ServerConfig` per replica."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ServerConfig, is_count
from ..errors import ConfigError
from .commands import check_extra_args
from .cores import divide_cores, usable_cores

SIZES = ("tp_size", "dp_size", "pp_size", "ep_size")
# What `start_managed` takes that is no option of a server.
START_OPTIONS = (
    "num_replicas",
    "device",
    "cuda_devices",
    "server_python",
    "router",
    "server_ports",
    "log_dir",
    "server_env",
)

# How the names of files begin or end that tokenizers are made of.
TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken")
VOCABULARIES = (".model", ".tiktoken", ".bpe", ".gguf")

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
    check_tokenizer(server.model_path, server.extra_args)
    check_extra_args(server.extra_args)
    if not is_count(num_replicas):
        raise ConfigError(f"num_replicas must be an integer >= 1, got {num_replicas!r}.")
    if ports is not None and (len(ports), len(set(ports))) != (num_replicas, num_replicas):
        raise ConfigError(f"server_ports needs {num_replicas} different ports, got {list(ports)}.")
    cores = divide_cores(usable_cores(os.sched_getaffinity(0)), num_replicas, server.num_ranks)
    gpus = divide_gpus(cuda_devices, num_replicas, server.num_gpus, server.device)
    return tuple(
        replace(
            server,
            cuda_devices=gpus[index],
            cpu_threads=len(cores[index][0]),
            cpu_cores=cores[index] if num_replicas * server.num_ranks > 1 else None,
            port=ports[index] if ports is not None else None,
        )
        for index in range(num_replicas)
    )


def expanded(name: Any) -> Any:
    """A folder's name without its ``~``, which servers would not know; anything else as it is."""
    return os.path.expanduser(name) if isinstance(name, str) else name


def check_model(model_name: str) -> None:
    """Raises `ConfigError` where a name is a folder that is no model."""
    folder = Path(model_name).expanduser()
    written_as_path = model_name.startswith((".", "/", "~")) or model_name.count("/") > 1
    if written_as_path and not folder.is_dir():
        raise ConfigError(f"there is no folder {model_name!r} to load a model from.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"the folder {model_name!r} has no config.json: it is no model.")


def check_tokenizer(model_name: str, extra_args: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the folder that the tokenizer is loaded from has none."""
    name = extra_args.get("tokenizer_path") or model_name
    folder = Path(str(name)).expanduser()
    if extra_args.get("skip_tokenizer_init") or not folder.is_dir():
        return
    files = [path.name.lower() for path in folder.iterdir()]
    if not any(each.startswith(TOKENIZER_FILES) or each.endswith(VOCABULARIES) for each in files):
        raise ConfigError(
            f"the folder {str(name)!r} has no tokenizer files: save the tokenizer there too "
            "(tokenizer.save_pretrained), name another folder with tokenizer_path=, or serve token "
            "ids alone with skip_tokenizer_init=True."
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


def check_way(server_url: str | None, model_path: str | None, start: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless a service is either attached to something or started."""
    if "timeout" in start:
        raise ConfigError("timeout= is no option: pass timeouts=Timeouts(request_s=seconds).")
    if (server_url is None) == (model_path is None):
        given = "both are" if model_path is not None else "none is"
        raise ConfigError(
            "AsyncSGLang attaches to what runs at server_url=, or starts servers for model_path=; "
            f"{given} given."
        )
    if server_url is not None and start:
        raise ConfigError(
            f"{', '.join(sorted(start))}: these are for servers that are started here, with "
            f"model_path=; what runs at {server_url} has its own."
        )
