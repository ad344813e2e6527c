"""Keeps the servers of a service: asks them anew, leaves them out, starts them again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from ..config import Timeouts
from ..errors import (
    ConfigError,
    ConnectError,
    EngineLostError,
    LaunchError,
    NoWorkersError,
    PushError,
    ServiceError,
)
from ..launch.fleet import Fleet, told
from .attach import (
    Cluster,
    Credentials,
    attach,
    client_of,
    read_info,
)
from .control import ControlClient
from .gate import ServiceState, UpdateGate
from .health import is_paused, lifeless
from .hosts import local_address
from .info import WorkerInfo
from .lora import Adapters
from .lora_versions import AdapterVersions
from .router import add_to_router, remove_from_router
from .threads import in_thread
from .together import ask_all, order_all, push_error
from .versions import KnownVersions, ask_versions, version_of

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
        self._unrouted: set[str] = set()  # started again, and not behind the router yet
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
        members = {server.url for server in self.known_workers} - self._unrouted
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
    def _front(self) -> ControlClient:
        return client_of(self.cluster.url, self.keys, self.timeouts)

    def refresh(self) -> None:
        """Asks the router and the servers again, on the next use: after workers joined or left.

        A server that does not answer then is left out, with a warning, unless this object started
        it: it can start it again.
        Where servers were started again that are not behind the router yet, this is done after the
        push that lets them join it.
        """
        with self._lock:
            self._refresh_later = bool(self._unrouted)
            self._stale = not self._unrouted

    def drop(self, url: str) -> None:
        """Goes on without one of several servers: the router no longer sends to it either.

        Args:
            url: the server's URL, as in ``workers``.
        """
        with self._lock:
            cluster = self.cluster
            self._cluster = cluster.without(url)
            self._unrouted.discard(url)
        if cluster.behind_router:
            remove_from_router(self._front, url)

    def restart(self, urls: Sequence[str]) -> None:
        """Starts managed servers again at their addresses, whether they live or not.

        They come up with the model's own files. If weights were pushed before, the service is
        ``BROKEN`` afterwards and they are paused, until the next push; one of another process is
        noticed by ``restart_workers([])``. LoRA adapters have to be loaded again. A push starts by
        itself what it finds dead or stuck, see ``WeightSyncConfig(lost_engines=...)``. Takes as
        long as a first start.

        Args:
            urls: the servers' URLs; also of those that `AsyncSGLang.drop_worker` left out.

        Raises:
            ConfigError: this object did not start them.
            ServiceError: a push, or another restart, is under way.
            EngineLostError: one did not start; names it, and says why.
        """
        self._fleet_of(urls)
        gate, changing = self.gate, self.changing
        if not changing.acquire(blocking=False):
            raise ServiceError("a push or a restart is under way: wait for its end.")
        try:
            if gate.state is ServiceState.UPDATING:
                raise ServiceError("a weight push is under way: wait for its end.")
            failed = gate.failure
            if getattr(failed, "step", None) == RESTART:
                failed = None  # what the servers run now tells whether that is over
            gate.begin()
            try:
                self.restart_in_push(urls)
                failed = failed or self._left_behind()
                if failed is None:
                    self._go_on()
            except BaseException as error:
                gate.fail(error)
                raise
            if failed is None:
                gate.commit()
            else:
                gate.fail(failed)
        finally:
            changing.release()

    def restart_in_push(self, urls: Iterable[str]) -> None:
        """Same as `restart`, for the weight sync, which gives them their weights next.

        They are paused, and out of the router until `rejoin`: a request that was lost elsewhere
        would be sent to them at once, and answered by the model's own weights.
        """
        urls = tuple(dict.fromkeys(urls))
        fleet = self._fleet_of(urls)
        with self.changing:
            self._ask_versions()  # so that it is known what is about to be gone
            self._unrouted.update(urls)
            for url in urls:
                remove_from_router(self._front, url)
            given_up = threading.Event()
            starts = {
                url: in_thread(
                    lambda url=url: self._restarted(fleet, url, given_up), "torchrl_sglang-restart"
                )
                for url in urls
            }
            try:
                failures = [self._failure(url, start) for url, start in starts.items()]
            except BaseException:
                given_up.set()
                for url in urls:
                    with contextlib.suppress(LaunchError):
                        fleet.kill(url)
                raise
        for failure in filter(None, failures):
            raise failure from failure.__cause__

    def _failure(self, url: str, start: Future[ControlClient]) -> EngineLostError | None:
        """Why a server did not start; one that did is taken back."""
        try:
            server = start.result()  # bounded by what it waits for itself
            known = {info.url: info for info in self.cluster.infos}
            info = known.get(url) or read_info(server)
        except (LaunchError, ServiceError) as error:
            failed = EngineLostError(f"it did not start again: {error}", step=RESTART, engine=url)
            failed.__cause__ = error
            return failed
        with self._lock:
            self._cluster = self.cluster.having(server, info)
        return None

    def _restarted(self, fleet: Fleet, url: str, given_up: threading.Event) -> ControlClient:
        fleet.restart(url, given_up)
        server = client_of(url, self.keys, self.timeouts)
        server.pause("retract")
        return server

    def _fleet_of(self, urls: Iterable[str]) -> Fleet:
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

    def rejoin(self) -> None:
        """Has the router send to those again that were started again, now that they may answer.

        And no more to those that did not answer when it was asked for its servers.

        Raises:
            PushError: the router does not take one.
        """
        held = self._unrouted & {server.url for server in self.cluster.workers}
        for url in held:
            try:
                if self.lost:
                    self.recover()
                add_to_router(self._front, url, self.keys.api_key, self.timeouts.control_s)
            except ServiceError as error:
                raise PushError(str(error), step=RESTART, engine=url) from error
            self._unrouted.discard(url)
        for url in self.cluster.silent:
            remove_from_router(self._front, url)  # it would come back with other weights
        if self._refresh_later:
            self.refresh()

    def _go_on(self) -> None:
        joining = [server for server in self.cluster.workers if server.url in self._unrouted]
        order_all(joining, ControlClient.resume)
        if not self.versions.adapters_only:  # else the next push brings the adapter
            self.rejoin()

    def _ask_versions(self) -> dict[str, str]:
        """Version of every server that answers, by URL; they are taken note of."""
        answers = ask_versions(self.cluster.workers).given
        self.versions.saw(answers.values())
        return {server.url: version for server, version in answers.items()}

    def _left_behind(self) -> EngineLostError | None:
        """Why a server that was started again must not generate yet; None if it may."""
        if self.versions.adapters_only:
            return None  # the base weights are the model's own everywhere
        versions = self._ask_versions()
        newest = self.versions.seen
        for url, version in versions.items():
            if url in self._unrouted and newest and version != str(newest):
                return EngineLostError(
                    "it was started again, with the model's own files", step=RESTART, engine=url
                )
        return None
