"""Which servers a service has: they are asked anew, left out, or started again."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .attach import Cluster, Credentials, add_to_router, client_of, read_infos, remove_from_router
from .config import Timeouts
from .errors import ConfigError, EngineLostError, LaunchError, ServiceError
from .gate import ServiceState
from .launch.fleet import Fleet
from .local import LocalResources


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

    def refresh(self) -> None:
        """Asks the router and the servers again: after workers joined or left."""
        with self._local.lock:
            self._local.cluster = None

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
            remove_from_router(cluster, url, self._keys, self.timeouts)

    def restart_workers(self, urls: Sequence[str]) -> None:
        """Starts managed servers again at their addresses, whether they live or not.

        They come up with the model's own files. Where a push has changed the weights since, the
        service is ``BROKEN`` afterwards, until the next one. LoRA adapters have to be loaded again.
        A push starts by itself what it finds dead or stuck, see
        ``WeightSyncConfig(lost_engines=...)``. Takes as long as a first start.

        Args:
            urls: the servers' URLs; also of those that `drop_worker` left out.

        Raises:
            ConfigError: this object did not start them.
            ServiceError: a push is under way.
            EngineLostError: one did not start; names it, and says why.
        """
        gate = self._local.gate
        self._fleet_of(urls)
        if gate.state is ServiceState.UPDATING:
            raise ServiceError("a weight push is under way: wait for its end.")
        before = gate.failure
        gate.begin()
        try:
            self.restart_in_push(urls)
            stale = self._stale(urls)
            if before is None and stale is None:
                self.rejoin()
        except BaseException as error:
            gate.fail(error)
            raise
        failure = before or stale
        if failure is None:
            gate.commit()
        else:
            gate.fail(failure)

    def restart_in_push(self, urls: Sequence[str]) -> None:
        """Same as `restart_workers`, for the weight sync, which gives them their weights next.

        They are out of the router until `rejoin`: a request that was lost elsewhere would be sent
        to them at once, and answered by the model's own weights.
        """
        fleet = self._fleet_of(urls)
        if not urls:
            return
        self._local.unrouted.update(urls)
        for url in urls:
            remove_from_router(self.cluster, url, self._keys, self.timeouts)
        with ThreadPoolExecutor(len(urls)) as pool:
            starts = {url: pool.submit(fleet.restart, url) for url in urls}
            try:
                for url in urls:
                    starts[url].result()
            except LaunchError as error:
                raise EngineLostError(
                    f"it did not start again: {error}", step="restart", engine=url
                ) from error
            except BaseException:
                for url in urls:
                    fleet.kill(url)  # or the pool would wait until they are up
                raise
        for url in urls:
            try:
                self._take_back(url)
            except ServiceError as error:
                raise EngineLostError(
                    f"it was started again, but: {error}", step="restart", engine=url
                ) from error

    def _fleet_of(self, urls: Sequence[str]) -> Fleet:
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

    def _take_back(self, url: str) -> None:
        worker = client_of(url, self._keys, self.timeouts)
        [info] = read_infos([worker])
        with self._local.lock:
            self._local.cluster = self.cluster.having(worker, info)

    def rejoin(self) -> None:
        """Has the router send to those again that were started again, now that they may answer.

        Raises:
            EngineLostError: the router does not take one.
        """
        held = self._local.unrouted & {worker.url for worker in self.cluster.workers}
        for url in held:
            try:
                add_to_router(self.cluster, url, self._keys, self.timeouts)
            except ServiceError as error:
                raise EngineLostError(str(error), step="restart", engine=url) from error
            self._local.unrouted.discard(url)

    def _stale(self, urls: Sequence[str]) -> EngineLostError | None:
        """Why what was started again must not generate yet; None if all run the same weights."""
        versions = {
            str(worker.get("/model_info").get("weight_version")) for worker in self.cluster.workers
        }
        if not urls or (self._local.pushed_version is None and len(versions) == 1):
            return None
        return EngineLostError(
            "it was started again, with the model's own files", step="restart", engine=urls[0]
        )
