"""Orders servers to load an adapter: from the request itself, or from a folder that they see."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import HTTPAnswerError, UnsupportedOptionError
from ...servers.control import ControlClient
from ...servers.hosts import is_here
from ...servers.info import WorkerInfo
from ...servers.lora import said
from ...servers.lora_folder import CONFIG, WEIGHTS
from ...servers.together import retold
from .source import AdapterSource

Order = Callable[[ControlClient, Mapping[str, Any], float], None]


@dataclass(frozen=True, kw_only=True)
class Load:
    """The order to load an adapter.

    Attributes:
        order: how a server is told.
        bodies: what it takes, by the server's URL.
        num_bytes: bytes of the adapter's tensors; 0 where the servers fetch them from a hub.
    """

    order: Order
    bodies: Mapping[str, Mapping[str, Any]]
    num_bytes: int

    def post(self, server: ControlClient, timeout_s: float) -> None:
        """Gives the order to one server; an error says what SGLang said, not all of its answer."""
        try:
            self.order(server, self.bodies[server.url], timeout_s)
        except HTTPAnswerError as error:
            message = f"{server.url} answered {error.status}: {said(error)}"
            raise retold(error, message) from error


@contextlib.contextmanager
def prepared(
    adapter: AdapterSource, name: str, infos: Sequence[WorkerInfo], dtype: torch.dtype | None
) -> Iterator[Load]:
    """The order to load an adapter, valid within the block.

    Args:
        adapter: what to load.
        name: what the servers will call it.
        infos: the servers.
        dtype: dtype to send it in; None: its own.

    Raises:
        UnsupportedOptionError: a server only loads from folders, and is on another machine.
    """
    if adapter.folder is not None:
        yield _folder_load(adapter.folder, name, infos, _size(Path(adapter.folder)))
        return
    tensors = {
        # Copied: a view would bring its whole storage along.
        each: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for each, tensor in adapter.tensors.items()
    }
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if all(info.capabilities.adapter_tensors for info in infos):
        yield _tensor_load(tensors, adapter.config, name, infos, num_bytes)
        return
    far = [info.url for info in infos if not is_here(info.url)]
    if far:
        raise UnsupportedOptionError(
            f"not every server takes an adapter without a folder, and {', '.join(far)} is on "
            "another machine: write the adapter to a folder that the servers see, with "
            "save_pretrained, and push its path; or update SGLang."
        )
    with tempfile.TemporaryDirectory(prefix="torchrl_sglang-adapter-") as folder:
        _write(Path(folder), tensors, adapter.config)
        yield _folder_load(folder, name, infos, num_bytes)


def _folder_load(folder: str, name: str, infos: Sequence[WorkerInfo], num_bytes: int) -> Load:
    body = {"lora_name": name, "lora_path": folder, "pinned": False}
    return Load(
        order=ControlClient.load_adapter, bodies={i.url: body for i in infos}, num_bytes=num_bytes
    )


def _tensor_load(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    name: str,
    infos: Sequence[WorkerInfo],
    num_bytes: int,
) -> Load:
    # Plain pickle, which carries the bytes: torch's own pickler for processes passes handles to
    # shared memory, which end a server that can't open them. No checksums: where one differs,
    # SGLang 0.5.23 does not answer but ends.
    content = base64.b64encode(pickle.dumps(dict(tensors))).decode()
    bodies = {
        info.url: {
            "lora_name": name,
            "config_dict": dict(config),
            "serialized_named_tensors": [content] * info.tp_size,
            "pinned": False,
        }
        for info in infos
    }
    return Load(order=ControlClient.load_adapter_tensors, bodies=bodies, num_bytes=num_bytes)


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Writes an adapter's folder as PEFT does."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(json.dumps(config))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))
