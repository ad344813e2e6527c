"""The connection of a trainer to a service's servers, made anew where it was lost."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from ..client import ControlClient
from ..config import WeightSyncConfig
from ..errors import ConfigError, EngineLostError, PushError
from ..gate import ServiceState
from ..info import WorkerInfo
from .broadcast import sending_device
from .carrier import Carrier
from .choose import Choice, choose_method, make_carrier
from .engines import Engines
from .revive import to_revive


class Connection:
    """Joins the trainer and all servers of a service, in the way that the weights take.

    Args:
        service: the servers; anything with ``cluster``, ``gate``, ``timeouts``,
            ``set_pushed_version``, ``drop_worker`` and what `Members` has.
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
        service: Any,
        *,
        config: WeightSyncConfig | None = None,
        master_address: str | None = None,
        master_port: int | None = None,
        device: torch.device | str | int | None = None,
        model_path: str | None = None,
    ) -> None:
        self._service = service
        self.config = config or WeightSyncConfig()
        if self.config.lost_engines == "restart" and not service.managed:
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
            if self._service.state is ServiceState.BROKEN:
                self._restart_lifeless()
            try:
                self._connect()
            except PushError:
                if not self._restart_lifeless():
                    raise
                self._connect()
            self._connected = True

    def _restart_lifeless(self) -> bool:
        urls = to_revive(self._service)
        if urls:
            self._service.restart_workers(urls)
        return bool(urls)

    def _connect(self) -> None:
        self._drop()
        timeouts, device = self._service.timeouts, self._sending_device
        self._engines = Engines(self._workers, self._infos, timeouts.control_s, timeouts.step_s)
        self._choice = choose_method(self.config.method, self._infos, device)
        self._carrier = make_carrier(
            self._choice,
            self._engines,
            device=device,
            address=self._master_address or self._service.get_master_address(),
            port=self._master_port,
            layout=self.config.layout,
            folder=self.config.folder,
            model_path=self.model_path,
            timeouts=timeouts,
            owner=self._service,
        )
        self._engines.ask_for(self._carrier.route)  # a wrong key is known before anything is begun
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
        return self._model_path or str(self._service.model_path)

    @property
    def _workers(self) -> Sequence[ControlClient]:
        workers: Sequence[ControlClient] = self._service.cluster.workers
        return workers

    @property
    def _infos(self) -> Sequence[WorkerInfo]:
        infos: Sequence[WorkerInfo] = self._service.cluster.infos
        return infos
