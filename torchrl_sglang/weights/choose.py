"""Which way weights take to the servers, and why: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import SyncMethod, Timeouts
from ..hosts import is_here
from ..info import WorkerInfo
from .broadcast import Broadcast
from .carrier import Carrier
from .disk import DiskCarrier
from .engines import Engines
from .payload import Layout
from .tensor import TensorCarrier

FullMethod = Literal["broadcast", "tensor", "disk"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way, and why it was taken.

    Attributes:
        method: its name.
        reason: in words.
    """

    method: FullMethod
    reason: str


def choose_method(method: SyncMethod, infos: Sequence[WorkerInfo], device: torch.device) -> Choice:
    """The way to these servers.

    Args:
        method: what is asked for.
        infos: the servers.
        device: the trainer's, from `sending_device`.
    """
    if method in ("broadcast", "tensor", "disk"):
        return Choice(method=method, reason="it was asked for")
    parallel = [info.url for info in infos if info.pp_size > 1 or info.num_copies > 1]
    if parallel:
        return Choice(
            method="disk",
            reason=f"{parallel[0]} has data- or pipeline-parallel ranks, which only files reach",
        )
    if infos[0].device == "cpu":
        return Choice(method="broadcast", reason="servers on CPUs take broadcasts over gloo")
    if device.type != "cuda":
        return Choice(
            method="disk", reason="the trainer has no GPU, which NCCL and CUDA handles both need"
        )
    sharing = [info.url for info in infos if is_here(info.url) and device.index in info.gpus]
    if sharing:
        return Choice(
            method="tensor",
            reason=f"{sharing[0]} runs on the trainer's GPU, where NCCL takes one rank only",
        )
    return Choice(method="broadcast", reason="trainer and servers have GPUs of their own")


def make_carrier(
    choice: Choice,
    engines: Engines,
    *,
    device: torch.device,
    address: str,
    port: int | None,
    layout: Layout,
    folder: str | None,
    model_path: str,
    timeouts: Timeouts,
    owner: Any,
) -> Carrier:
    """The carrier of a choice; arguments and errors are those of its class."""
    match choice.method:
        case "broadcast":
            return Broadcast(
                engines, address=address, port=port, device=device, layout=layout, timeouts=timeouts
            )
        case "tensor":
            return TensorCarrier(engines, device=device, timeouts=timeouts)
        case "disk":
            return DiskCarrier(
                engines, folder=folder, model_path=model_path, timeouts=timeouts, owner=owner
            )
