"""The connection of a trainer to a service's servers, made anew where it was lost."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import SyncMethod, Timeouts, WeightSyncConfig
from ..errors import ConfigError, EngineLostError, PushError
from ..servers.control import ControlClient
from ..servers.gate import ServiceState
from ..servers.hosts import is_here
from ..servers.info import WorkerInfo
from ..servers.members import Servers
from ..servers.together import Engines
from .carry.broadcast import Broadcast, sending_device
from .carry.carrier import Carrier
from .carry.disk import DiskCarrier
from .carry.memory import TensorCarrier
from .carry.payload import Layout


class Connection:
    """Joins the trainer and all servers of a service, in the way that the weights take.

    Args:
        servers: whom it pushes to.
        config: how to push.
        master_address: address at which the servers reach this process.
        master_port: port of the rendezvous; a free one by default.
        device: device that broadcasts; the current GPU for NCCL.
        model_path: where the served model's config is, if not where the servers have it.

    Attributes:
        config: how to push.

    Raises:
        ConfigError: servers are to be started again that this process did not start.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        config: WeightSyncConfig | None = None,
        master_address: str | None = None,
        master_port: int | None = None,
        device: torch.device | str | int | None = None,
        model_path: str | None = None,
    ) -> None:
        self._servers = servers
        self.config = config or WeightSyncConfig()
        if self.config.lost_engines == "restart" and not servers.managed:
            raise ConfigError(
                "lost_engines='restart', but this service did not start its servers, so it can't "
                "start them again: use 'raise' or 'drop'."
            )
        self._master_address = master_address
        self._master_port = master_port
        self._device = device
        self._model_path = model_path
        self._engines: Engines | None = None
        self._carrier: Carrier | None = None
        self._choice: Choice | None = None
        self._sending_device = torch.device("cpu")
        self._connected = False
        self._verified = False
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Joins the trainer and all ranks of all servers into one group.

        Raises:
            TopologyError: a server can't take part.
            PushError: a server refused or did not come.
        """
        with self._lock:
            # Found out in the caller's thread: another one's current GPU may be another.
            self._sending_device = sending_device(self._infos[0].device, self._device)
            if self._servers.state is ServiceState.BROKEN:
                self._restart_lifeless()
            try:
                self._connect()
            except PushError:
                if not self._restart_lifeless():
                    raise
                self._connect()
            self._connected = True

    def _restart_lifeless(self) -> bool:
        urls = self._servers.lifeless()
        if urls:
            self._servers.restart(urls)
        return bool(urls)

    def _connect(self) -> None:
        self._drop()
        timeouts, device = self._servers.timeouts, self._sending_device
        self._engines = Engines(self._workers, self._infos, timeouts.control_s, timeouts.step_s)
        self._choice = choose_method(self.config.method, self._infos, device)
        self._carrier = make_carrier(
            self._choice,
            self._engines,
            device=device,
            address=self._master_address or self._servers.master_address,
            port=self._master_port,
            layout=self.config.layout,
            folder=self.config.folder,
            model_path=self.model_path,
            timeouts=timeouts,
            owner=self._servers,
        )
        # A wrong key is known before anything is begun.
        self._engines.check_allowed(self._carrier.order)
        self._carrier.connect()

    def abandon(self) -> None:
        """Leaves the group without waiting for anybody, servers included."""
        self._connected = False
        self._drop()

    def _leave(self) -> None:
        carrier, engines = self._carrier, self._engines
        self._carrier = self._engines = None
        self._verified = False
        if carrier is not None:
            carrier.close()
        if engines is not None:
            engines.close()

    def _drop(self) -> None:
        """After a failure the group can't be trusted: the next push makes a new one."""
        carrier, engines = self._carrier, self._engines
        self._carrier = self._engines = None
        self._verified = False
        if carrier is not None:
            carrier.drop()
        if engines is not None:
            engines.close()

    def _goes_on_without(self, error: EngineLostError) -> bool:
        """Whether the user allows that the engine is left out, and others are left."""
        known = any(worker.url == error.engine for worker in self._workers)
        return self.config.lost_engines == "drop" and known and len(self._workers) > 1

    # What is pushed to

    @property
    def model_path(self) -> str:
        """Where the served model's config is."""
        return self._model_path or self._servers.model_path

    @property
    def _workers(self) -> Sequence[ControlClient]:
        workers: Sequence[ControlClient] = self._servers.cluster.workers
        return workers

    @property
    def _infos(self) -> Sequence[WorkerInfo]:
        infos: Sequence[WorkerInfo] = self._servers.cluster.infos
        return infos


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
