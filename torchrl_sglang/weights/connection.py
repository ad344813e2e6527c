"""Links a trainer to the servers of a service, in one of three ways; anew where it was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import SyncLayout, SyncMethod, Timeouts, WeightSyncConfig
from ..errors import ConfigError, EngineLostError, NotConnectedError
from ..servers.control import ControlClient
from ..servers.hosts import is_here
from ..servers.info import WorkerInfo
from ..servers.members import Servers
from .carry.broadcast import Broadcast, sending_device
from .carry.carrier import Carrier
from .carry.disk import DiskCarrier
from .carry.memory import TensorCarrier
from .targets import Targets


class Link:
    """Joins the trainer and all servers of a service, in the way that weights take.

    Not safe to use from several threads; the pushers have a lock around it.

    Args:
        servers: whom weights go to.
        config: how to push.
        master_address: address at which the servers reach this process.
        master_port: port of the rendezvous; a free one by default.
        device: device that broadcasts; the current GPU for NCCL.
        model_path: where the served model's config is, if not where the servers have it.

    Attributes:
        servers, config: as given.
        targets: the servers, once orders go to them; None before, and after a failure.
        carrier: what takes weights there, likewise.
        choice: which way that is, and why.
        sending_device: the device that broadcasts.
        connected: whether pushes may go over it; it is made anew then where it was lost.
        verified: whether a push over this link was verified.

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
        self.servers = servers
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
        self.targets: Targets | None = None
        self.carrier: Carrier | None = None
        self.choice: Choice | None = None
        self.sending_device = torch.device("cpu")
        self.connected = False
        self.verified = False

    def check_connected(self) -> None:
        """Raises `NotConnectedError` before a pusher was connected, and after it was closed."""
        if not self.connected:
            raise NotConnectedError(
                "the weight sync is not connected: call connect() before pushing."
            )

    def find_device(self) -> None:
        """Finds out the sending device: in the caller's thread, whose current GPU is meant."""
        self.sending_device = sending_device(self.infos[0].device, self._device)

    def join(self) -> None:
        """Joins the trainer and all ranks of all servers into one group.

        Raises:
            TopologyError: a server can't take part.
            PushError: a server refused or did not come.
        """
        timeouts, device = self.servers.timeouts, self.sending_device
        targets = self.reach()
        self.choice = choose_method(self.config.method, self.infos, device)
        self.carrier = make_carrier(
            self.choice,
            targets,
            device=device,
            address=self._master_address or self.servers.master_address,
            port=self._master_port,
            layout=self.config.layout,
            folder=self.config.folder,
            model_path=self.model_path,
            timeouts=timeouts,
            owner=self.servers,
        )
        # A wrong key is known before anything is begun.
        targets.check_allowed(self.carrier.order)
        self.carrier.connect()

    def reach(self) -> Targets:
        """The servers, over new connections: for orders, without a group."""
        self.drop()
        timeouts = self.servers.timeouts
        self.targets = Targets(self.workers, self.infos, timeouts.control_s, timeouts.step_s)
        return self.targets

    @property
    def reaches_all(self) -> bool:
        """Whether it reaches the servers of now, and no others."""
        return self.targets is not None and self.targets.workers == self.workers

    def leave_if_changed(self) -> None:
        """Lets go where servers joined or left since."""
        if self.targets is None or self.reaches_all:
            return
        # One that is gone can't leave a group in order with the others.
        gone = not {*self.targets.workers} <= {*self.workers}
        self.drop() if gone else self.leave()

    def leave(self) -> None:
        """Leaves the group in order, on both sides; harmless without one."""
        self._let_go(lambda carrier: carrier.close())

    def drop(self) -> None:
        """Leaves without waiting for anybody: after a failure the group can't be trusted."""
        self._let_go(lambda carrier: carrier.drop())

    def _let_go(self, end: Callable[[Carrier], None]) -> None:
        carrier, targets = self.carrier, self.targets
        self.carrier = self.targets = None
        self.verified = False
        if carrier is not None:
            end(carrier)
        if targets is not None:
            targets.close()

    @property
    def verifies(self) -> bool:
        """Whether the next push over it is to be verified."""
        verify = self.config.verify
        return verify == "always" or (verify == "first" and not self.verified)

    def goes_on_without(self, error: EngineLostError) -> bool:
        """Whether the user allows that the engine is left out, and others are left."""
        known = any(server.url == error.engine for server in self.workers)
        return self.config.lost_engines == "drop" and known and len(self.workers) > 1

    # What is pushed to

    @property
    def model_path(self) -> str:
        """Where the served model's config is."""
        return self._model_path or self.servers.model_path

    @property
    def workers(self) -> tuple[ControlClient, ...]:
        """The servers of now."""
        return self.servers.cluster.workers

    @property
    def infos(self) -> tuple[WorkerInfo, ...]:
        """What they say of themselves."""
        return self.servers.cluster.infos


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
    targets: Targets,
    *,
    device: torch.device,
    address: str,
    port: int | None,
    layout: SyncLayout,
    folder: str | None,
    model_path: str,
    timeouts: Timeouts,
    owner: Any,
) -> Carrier:
    """The carrier of a choice; arguments and errors are those of its class."""
    match choice.method:
        case "broadcast":
            return Broadcast(
                targets, address=address, port=port, device=device, layout=layout, timeouts=timeouts
            )
        case "tensor":
            return TensorCarrier(targets, device=device, timeouts=timeouts)
        case "disk":
            return DiskCarrier(
                targets, folder=folder, model_path=model_path, timeouts=timeouts, owner=owner
            )
