"""Keeps the servers of a service: who they are, whether they serve, which weights they run."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

from ..config import Timeouts
from ..errors import (
    ConfigError,
    ConnectError,
    LaunchError,
    NoWorkersError,
)
from ..launch.fleet import Fleet, told
from .attach import Cluster, Credentials, attach, client_of
from .control import ControlClient
from .gate import ServiceState, UpdateGate
from .health import is_paused, lifeless
from .hosts import local_address
from .info import WorkerInfo
from .known_versions import KnownVersions, ask_versions, version_of
from .lora import Adapters
from .lora_versions import AdapterVersions
from .router import remove_from_router
from .together import ask_all, order_all, push_error

RESTART = "restart"  # the step that errors name


class Servers:
    """The servers behind a URL, as one process knows them. Safe to use from several threads.

    Args:
        url: of a router or a server.
        keys: what they ask for.
        timeouts: bounds on waiting.
        fleet: the children, if this process started them.

    Attributes:
        url, keys, timeouts, fleet: as given.
        gate: holds requests while weights change.
        versions: which weights they run.
        changing: held by what starts servers again, or gives them weights: it does so alone.
        unrouted: URLs of those that were started again and are not behind the router yet.
    """

    def __init__(
        self, url: str, keys: Credentials, timeouts: Timeouts, fleet: Fleet | None = None
    ) -> None:
        self.url = url
        self.keys = keys
        self.timeouts = timeouts
        self.fleet = fleet
        self.gate = UpdateGate()
        self.versions = KnownVersions()
        self.changing = threading.RLock()
        self._lock = threading.RLock()
        self._cluster: Cluster | None = None
        self.unrouted: set[str] = set()  # started again, and not behind the router yet
        self._stale = False  # the cluster is asked again on the next use
        self._refresh_later = False  # or once all are behind the router
        self._adapter_versions = AdapterVersions()
        self._adapters: tuple[tuple[ControlClient, ...], Adapters] | None = None

    # Who they are

    @property
    def cluster(self) -> Cluster:
        """What answers at the URL, asked for once, and anew where servers joined or left.

        Servers that this process started stay members when they are dead: they can be restarted.
        """
        with self._lock:
            known = self._cluster.infos if self._cluster and self.fleet else ()
            if self._cluster is None or (self._stale and not self._all_dead):
                if self.lost:
                    self.recover()
                self._cluster = attach(self.url, self.keys, self.timeouts, known)
            self._stale = False
            return self._cluster

    def attach(self) -> Cluster:
        """Finds out who answers at the URL; later uses know."""
        return self.cluster

    @property
    def _all_dead(self) -> bool:
        return self.fleet is not None and not self.fleet.living_urls

    @property
    def known_workers(self) -> tuple[ControlClient, ...]:
        """A control client per server; none before anybody asked who they are."""
        cluster = self._cluster
        return () if cluster is None else cluster.workers

    @property
    def workers(self) -> tuple[ControlClient, ...]:
        """A control client per server that is not known to be dead; all if every one is."""
        workers, fleet = self.cluster.workers, self.fleet
        dead = () if fleet is None else {*fleet.server_urls} - {*fleet.living_urls}
        return tuple(server for server in workers if server.url not in dead) or workers

    @property
    def info(self) -> WorkerInfo:
        """What the first server says of itself."""
        return self.cluster.infos[0]

    @property
    def model_path(self) -> str:
        """Folder or hub name of the model, as the servers know it."""
        return self.info.model_path

    @property
    def managed(self) -> bool:
        """Whether this process started them."""
        return self.fleet is not None

    @property
    def managed_urls(self) -> tuple[str, ...]:
        """URLs of those that this process started, also of those that are left out."""
        return () if self.fleet is None else tuple(self.fleet.server_urls)

    @property
    def master_address(self) -> str:
        """Address at which they reach this process."""
        return local_address(self.cluster.url)

    @property
    def lora(self) -> Adapters:
        """The adapters of these servers; what it was told lately is kept between calls."""
        workers = self.workers
        with self._lock:
            if self._adapters is None or self._adapters[0] != workers:
                self._adapters = (workers, Adapters(workers, self._adapter_versions))
            return self._adapters[1]

    # Whether they serve

    @property
    def state(self) -> ServiceState:
        """Whether they run whole weights, and live.

        Where they were paused when this process attached to them, they are asked whether they
        still are, which takes seconds then.
        """
        state = self.gate.state
        if state is not ServiceState.SYNCED:
            return state
        if self.lost:
            return ServiceState.BROKEN
        return ServiceState.UPDATING if self._still_paused() else state

    def _still_paused(self) -> bool:
        cluster = self._cluster
        if cluster is None or not cluster.paused or self.versions.pushed is not None:
            return False
        if any(ask_all(cluster.workers, is_paused).given.values()):
            return True
        with self._lock:
            if self._cluster is cluster:
                self._cluster = replace(cluster, paused=False)
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
        members = {server.url for server in self.known_workers} - self.unrouted
        try:
            fleet.revive_router([url for url in living if url in members])
        except LaunchError as error:
            raise ConnectError(f"nothing answers at the service's URL: {error}") from error

    def lifeless(self) -> tuple[str, ...]:
        """URLs of those started here that don't answer, or never will again; see `lifeless`."""
        managed, cluster = self.managed_urls, self.cluster
        workers = [server for server in cluster.workers if server.url in managed]
        return lifeless(workers, cluster.infos, self.timeouts.control_s)

    def flush_cache(self) -> bool:
        """Empties the prefix cache of every server; returns True once all are empty.

        Raises:
            ServiceError: a server refused, as SGLang does while requests are in flight; the others
                were emptied.
        """
        order_all(self.workers, ControlClient.flush)
        return True

    # Which weights they run

    def weight_version(self) -> str:
        """The version of the weights; asks a server where this process did not push last."""
        if self.versions.pushed is not None and not self.versions.others_push:
            return str(self.versions.pushed)
        if self.lost:
            self.recover()
        version = version_of(self.workers[0])
        self.versions.saw([version])
        return version

    def highest_version(self) -> int:
        """The highest version that one of them runs, by asking them all, or has run.

        Weights that a server loaded itself, and those that somebody gave a name instead of a
        number, count as 0, but never for less than is known: a server may have been started again
        since. One that does not answer is passed over where another does: the push will tell.

        Raises:
            PushError: none answers, and this process did not start them.
        """
        answers = ask_versions(self.cluster.workers)
        if not answers.given and not self.managed:  # a push can start those again
            server, error = next(iter(answers.failures.items()))
            raise push_error(error, "ask", server.url)
        told = [int(version) for version in answers.given.values() if version.isdecimal()]
        return max([self.versions.known, *told])

    # Who joins and leaves

    @property
    def front(self) -> ControlClient:
        """A control client for the URL."""
        return client_of(self.cluster.url, self.keys, self.timeouts)

    def refresh(self) -> None:
        """Asks the router and the servers again, on the next use: after workers joined or left.

        A server that does not answer then is left out, with a warning, unless this object started
        it: it can start it again.
        Where servers were started again that are not behind the router yet, this is done after the
        push that lets them join it.
        """
        with self._lock:
            self._refresh_later = bool(self.unrouted)
            self._stale = not self.unrouted

    def drop(self, url: str) -> None:
        """Goes on without one of several servers: the router no longer sends to it either.

        Args:
            url: the server's URL, as in ``workers``.
        """
        with self._lock:
            cluster = self.cluster
            self._cluster = cluster.without(url)
            self.unrouted.discard(url)
        if cluster.behind_router:
            remove_from_router(self.front, url)

    def take_back(self, server: ControlClient, info: WorkerInfo) -> None:
        """One that was started again has its place again."""
        with self._lock:
            self._cluster = self.cluster.having(server, info)

    def fleet_of(self, urls: Iterable[str]) -> Fleet:
        """The children of this process, which the servers at ``urls`` are.

        Raises:
            ConfigError: they are not.
        """
        fleet = self.fleet
        if fleet is None:
            raise ConfigError(
                "this service did not start its servers (it attached to them, or is a copy in "
                "another process), so it can't start them again: whoever runs them has to."
            )
        unknown = [url for url in urls if url not in fleet.server_urls]
        if unknown:
            raise ConfigError(f"{unknown} are none of this service's servers: {fleet.server_urls}.")
        return fleet

    def note_versions(self) -> dict[str, str]:
        """Version of every server that answers, by URL; they are taken note of."""
        answers = ask_versions(self.cluster.workers).given
        self.versions.saw(answers.values())
        return {server.url: version for server, version in answers.items()}

    def rejoined(self) -> None:
        """Every server is behind the router again: what was put off is done."""
        if self._refresh_later:
            self.refresh()
