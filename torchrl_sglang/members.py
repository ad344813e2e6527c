"""Which servers a service has: they are asked anew, left out, or started again."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

from .attach import Cluster, Credentials, add_to_router, client_of, read_info, remove_from_router
from .client import ControlClient
from .config import Timeouts
from .errors import ConfigError, EngineLostError, LaunchError, PushError, ServiceError
from .gate import ServiceState
from .launch.fleet import Fleet
from .local import LocalResources
from .running import answered, ask_versions
from .threads import in_thread

RESTART = "restart"  # the step that errors name


class Members(abc.ABC):
    """The part of a service that changes which servers it has."""

    timeouts: Timeouts
    _keys: Credentials

    @property
    @abc.abstractmethod
    def _local(self) -> LocalResources:
        """This process's resources."""

    @property
    @abc.abstractmethod
    def cluster(self) -> Cluster:
        """What answers at the URL."""

    @property
    def managed(self) -> bool:
        """Whether this object, in this process, started the servers."""
        return self._local.fleet is not None

    @property
    def managed_urls(self) -> tuple[str, ...]:
        """URLs of the servers that this object started, also of those that are left out."""
        fleet = self._local.fleet
        return () if fleet is None else tuple(fleet.server_urls)

    @property
    def known_version(self) -> int:
        """The version that was pushed last, or the highest that was seen; 0 if there is none."""
        local = self._local
        if local.pushed_version is None or local.others_push:
            return local.seen_version
        return local.pushed_version

    @property
    def changing(self) -> AbstractContextManager[Any]:
        """Held by what starts servers again, or gives them weights: it does so alone."""
        return self._local.changing

    @property
    def _front(self) -> ControlClient:
        return client_of(self.cluster.url, self._keys, self.timeouts)

    def refresh(self) -> None:
        """Asks the router and the servers again, on the next use: after workers joined or left.

        A server that does not answer then is left out, with a warning, unless this object started
        it: it can start it again.
        Where servers were started again that are not behind the router yet, this is done after the
        push that lets them join it.
        """
        with self._local.lock:
            self._local.refresh_later = bool(self._local.unrouted)
            self._local.stale = not self._local.unrouted

    def drop_worker(self, url: str) -> None:
        """Goes on without one of several servers: the router no longer sends to it either.

        Args:
            url: the server's URL, as in ``workers``.
        """
        with self._local.lock:
            cluster = self.cluster
            self._local.cluster = cluster.without(url)
            self._local.unrouted.discard(url)
        if cluster.behind_router:
            remove_from_router(self._front, url)

    def restart_workers(self, urls: Sequence[str]) -> None:
        """Starts managed servers again at their addresses, whether they live or not.

        They come up with the model's own files. If weights were pushed before, the service is
        ``BROKEN`` afterwards and they are paused, until the next push; one of another process is
        noticed by ``restart_workers([])``. LoRA adapters have to be loaded again. A push starts by
        itself what it finds dead or stuck, see ``WeightSyncConfig(lost_engines=...)``. Takes as
        long as a first start.

        Args:
            urls: the servers' URLs; also of those that `drop_worker` left out.

        Raises:
            ConfigError: this object did not start them.
            ServiceError: a push, or another restart, is under way.
            EngineLostError: one did not start; names it, and says why.
        """
        self._fleet_of(urls)
        gate, changing = self._local.gate, self._local.changing
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
                failed = failed or self._stale()
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
        """Same as `restart_workers`, for the weight sync, which gives them their weights next.

        They are paused, and out of the router until `rejoin`: a request that was lost elsewhere
        would be sent to them at once, and answered by the model's own weights.
        """
        urls = tuple(dict.fromkeys(urls))
        fleet = self._fleet_of(urls)
        with self._local.changing:
            self._versions()  # so that it is known what is about to be gone
            self._local.unrouted.update(urls)
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
            worker = start.result()  # bounded by what it waits for itself
            known = {info.url: info for info in self.cluster.infos}
            info = known.get(url) or read_info(worker)
        except (LaunchError, ServiceError) as error:
            failed = EngineLostError(f"it did not start again: {error}", step=RESTART, engine=url)
            failed.__cause__ = error
            return failed
        with self._local.lock:
            self._local.cluster = self.cluster.having(worker, info)
        return None

    def _restarted(self, fleet: Fleet, url: str, given_up: threading.Event) -> ControlClient:
        fleet.restart(url, given_up)
        worker = client_of(url, self._keys, self.timeouts)
        worker.post("/pause_generation", {"mode": "retract"})
        return worker

    def _fleet_of(self, urls: Iterable[str]) -> Fleet:
        fleet = self._local.fleet
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
        held = self._local.unrouted & {worker.url for worker in self.cluster.workers}
        for url in held:
            try:
                if self._local.lost:
                    self._local.recover()
                add_to_router(self._front, url, self._keys.api_key, self.timeouts.control_s)
            except ServiceError as error:
                raise PushError(str(error), step=RESTART, engine=url) from error
            self._local.unrouted.discard(url)
        for url in self.cluster.silent:
            remove_from_router(self._front, url)  # it would come back with other weights
        if self._local.refresh_later:
            self.refresh()

    def _go_on(self) -> None:
        for worker in self.cluster.workers:
            if worker.url in self._local.unrouted:
                worker.post("/continue_generation")
        if not self._local.adapters_only:  # else the next push brings the adapter
            self.rejoin()

    def _versions(self) -> dict[str, str]:
        """Version of every server that answers, by URL; they are taken note of."""
        versions = answered(ask_versions(self.cluster.workers))
        self._local.saw(versions.values())
        return versions

    def _stale(self) -> EngineLostError | None:
        """Why a server that was started again must not generate yet; None if it may."""
        if self._local.adapters_only:
            return None  # the base weights are the model's own everywhere
        versions = self._versions()
        newest = self._local.seen_version
        for url, version in versions.items():
            if url in self._local.unrouted and newest and version != str(newest):
                return EngineLostError(
                    "it was started again, with the model's own files", step=RESTART, engine=url
                )
        return None
