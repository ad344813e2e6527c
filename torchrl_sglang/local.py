"""What a service holds in one process alone: threads, sockets and child processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import replace

from .adapter_versions import AdapterVersions
from .adapters import Adapters
from .attach import Cluster, Credentials, attach
from .background import BackgroundLoop
from .calls import Calls, is_paused
from .client import ControlClient
from .config import Timeouts
from .data_client import DataClient
from .errors import ConnectError, LaunchError, NoWorkersError, ServiceClosedError
from .gate import UpdateGate
from .launch.fleet import Fleet, told
from .sessions import Sessions


class LocalResources:
    """Everything of a service that must not travel to another process.

    Attributes:
        gate: holds requests while weights change.
        lock: guards what is made on first use.
        fleet: the children, if this process started them.
        pushed_version: the version that this process pushed last.
        others_push: whether the servers were seen with a higher version since.
        cluster: what answers at the URL, once it was asked.
        sessions: that this process opened.
        unrouted: URLs of servers that were started again and are not behind the router yet.
        stale: whether the cluster is to be asked again, on the next use.
        refresh_later: whether the cluster is to be asked again once all are.
        changing: held by what starts servers again, or gives them weights.
        seen_version: the highest version that a server was seen with, or was given.
        version_labels: names that pushes of this process gave their numbers.
        adapters_only: whether what this process pushed were adapters alone.
    """

    def __init__(self) -> None:
        self.gate = UpdateGate()
        self.lock = threading.RLock()
        self.fleet: Fleet | None = None
        self.pushed_version: int | None = None
        self.others_push = False
        self.cluster: Cluster | None = None
        self.sessions = Sessions()
        self.unrouted: set[str] = set()
        self.stale = False
        self.refresh_later = False
        self.changing = threading.RLock()
        self.seen_version = 0
        self.version_labels: dict[int, str] = {}
        self.adapters_only = False
        self._versions = AdapterVersions()
        self._adapters: tuple[tuple[ControlClient, ...], Adapters] | None = None
        self._pid = os.getpid()
        self._loop: BackgroundLoop | None = None
        self._data: DataClient | None = None
        self._closed = False

    @property
    def foreign(self) -> bool:
        """Whether this is a forked copy of another process's resources."""
        return os.getpid() != self._pid

    def saw(self, versions: Iterable[str]) -> None:
        """Takes note of versions that servers run; names count for nothing."""
        numbers = (int(each) for each in versions if each.isdecimal())
        self.seen_version = max([self.seen_version, *numbers])

    def attached(self, url: str, keys: Credentials, timeouts: Timeouts) -> Cluster:
        """The cluster behind ``url``, asked for once, and anew where it is stale.

        Servers that this process started stay members when they are dead: they can be restarted.
        """
        with self.lock:
            known = self.cluster.infos if self.cluster and self.fleet else ()
            if self.cluster is None or (self.stale and not self._all_dead):
                if self.lost:
                    self.recover()
                self.cluster = attach(url, keys, timeouts, known)
            self.stale = False
            return self.cluster

    @property
    def _all_dead(self) -> bool:
        return self.fleet is not None and not self.fleet.living_urls

    def still_paused(self) -> bool:
        """Whether servers that were paused when they were attached to still are: asks them."""
        cluster = self.cluster
        if cluster is None or not cluster.paused or self.pushed_version is not None:
            return False
        if any(is_paused(worker) for worker in cluster.workers):
            return True
        with self.lock:
            if self.cluster is cluster:
                self.cluster = replace(cluster, paused=False)
        return False

    @property
    def lost(self) -> bool:
        """Whether nobody can be served, as far as this process can see: asks its children only."""
        fleet = self.fleet
        return fleet is not None and fleet.has_ended

    def recover(self) -> None:
        """Starts the router again if it died.

        Raises:
            ConnectError: it does not start, or no server lives; says what died, and how.
        """
        fleet = self.fleet
        if fleet is None:
            return
        living = fleet.living_urls
        if not living:
            said = told(fleet.ended())
            raise NoWorkersError(
                f"no server lives any more: {said or 'they were ended here.'} "
                "restart_workers(service.managed_urls), or a push of the whole model, starts them."
            )
        members = {worker.url for worker in self._known_workers()} - self.unrouted
        try:
            fleet.revive_router([url for url in living if url in members])
        except LaunchError as error:
            raise ConnectError(f"nothing answers at the service's URL: {error}") from error

    def living(self, workers: tuple[ControlClient, ...]) -> tuple[ControlClient, ...]:
        """Those of the workers that are not known to be dead; all of them if every one is."""
        fleet = self.fleet
        dead = () if fleet is None else {*fleet.server_urls} - {*fleet.living_urls}
        return tuple(worker for worker in workers if worker.url not in dead) or workers

    def adapters(self, workers: tuple[ControlClient, ...]) -> Adapters:
        """The adapters of these servers; what it was told lately is kept between calls."""
        with self.lock:
            if self._adapters is None or self._adapters[0] != workers:
                self._adapters = (workers, Adapters(workers, self._versions))
            return self._adapters[1]

    def data_plane(
        self, url: str, api_key: str | None, timeouts: Timeouts
    ) -> tuple[BackgroundLoop, DataClient]:
        """The event loop and the connection pool on it, which the first call makes."""
        with self.lock:
            if self._closed:
                raise ServiceClosedError("the service was shut down.")
            if self._loop is None or self._data is None:
                self._loop = BackgroundLoop("torchrl_sglang")
                calls = Calls(self.gate, self._known_workers, timeouts, self)
                self._data = DataClient(url, api_key=api_key, timeouts=timeouts, calls=calls)
            return self._loop, self._data

    def _known_workers(self) -> tuple[ControlClient, ...]:
        cluster = self.cluster
        return () if cluster is None else cluster.workers

    def close(self) -> None:
        """Ends threads and children; harmless twice and in a forked copy."""
        if self.foreign:
            return
        self.gate.close()
        self.sessions.close()
        with self.lock:
            loop, data, fleet = self._loop, self._data, self.fleet
            self._loop = self._data = self.fleet = None
            self._closed = True
        if loop is not None and data is not None:
            # In this order: a request that is cancelled says so; one whose pool is gone does not.
            loop.close(data.close)
        if fleet is not None:
            fleet.stop()
