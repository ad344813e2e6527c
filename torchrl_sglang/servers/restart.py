"""Starts dead or stuck servers of this process again, and lets them rejoin once they are synced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from ..errors import EngineLostError, LaunchError, PushError, ServiceError
from ..launch.fleet import Fleet
from .attach import client_of, read_info
from .control import ControlClient
from .gate import ServiceState
from .members import Servers
from .router import add_to_router, remove_from_router
from .threads import in_thread
from .together import order_all

RESTART = "restart"  # the step that errors name


def restart(servers: Servers, urls: Sequence[str]) -> None:  # noqa: D417  # a method, to users
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
    servers.fleet_of(urls)
    gate, changing = servers.gate, servers.changing
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
            restart_in_push(servers, urls)
            failed = failed or _left_behind(servers)
            if failed is None:
                _go_on(servers)
        except BaseException as error:
            gate.fail(error)
            raise
        if failed is None:
            gate.commit()
        else:
            gate.fail(failed)
    finally:
        changing.release()


def restart_in_push(servers: Servers, urls: Iterable[str]) -> None:
    """Same as `restart`, for the weight sync, which gives them their weights next.

    They are paused, and out of the router until `rejoin`: a request that was lost elsewhere
    would be sent to them at once, and answered by the model's own weights.
    """
    urls = tuple(dict.fromkeys(urls))
    fleet = servers.fleet_of(urls)
    with servers.changing:
        servers.note_versions()  # so that it is known what is about to be gone
        servers.unrouted.update(urls)
        for url in urls:
            remove_from_router(servers.front, url)
        given_up = threading.Event()
        starts = {
            url: in_thread(
                lambda url=url: _restarted(servers, fleet, url, given_up), "torchrl_sglang-restart"
            )
            for url in urls
        }
        try:
            failures = [_failure(servers, url, start) for url, start in starts.items()]
        except BaseException:
            given_up.set()
            for url in urls:
                with contextlib.suppress(LaunchError):
                    fleet.kill(url)
            raise
    for failure in filter(None, failures):
        raise failure from failure.__cause__


def _failure(servers: Servers, url: str, start: Future[ControlClient]) -> EngineLostError | None:
    """Why a server did not start; one that did is taken back."""
    try:
        server = start.result()  # bounded by what it waits for itself
        known = {info.url: info for info in servers.cluster.infos}
        info = known.get(url) or read_info(server)
    except (LaunchError, ServiceError) as error:
        failed = EngineLostError(f"it did not start again: {error}", step=RESTART, engine=url)
        failed.__cause__ = error
        return failed
    servers.take_back(server, info)
    return None


def _restarted(
    servers: Servers, fleet: Fleet, url: str, given_up: threading.Event
) -> ControlClient:
    fleet.restart(url, given_up)
    server = client_of(url, servers.keys, servers.timeouts)
    server.pause("retract")
    return server


def rejoin(servers: Servers) -> None:
    """Has the router send to those again that were started again, now that they may answer.

    And no more to those that did not answer when it was asked for its servers.

    Raises:
        PushError: the router does not take one.
    """
    held = servers.unrouted & {server.url for server in servers.cluster.workers}
    for url in held:
        try:
            if servers.lost:
                servers.recover()
            add_to_router(servers.front, url, servers.keys.api_key, servers.timeouts.control_s)
        except ServiceError as error:
            raise PushError(str(error), step=RESTART, engine=url) from error
        servers.unrouted.discard(url)
    for url in servers.cluster.silent:
        remove_from_router(servers.front, url)  # it would come back with other weights
    servers.rejoined()


def _go_on(servers: Servers) -> None:
    joining = [server for server in servers.cluster.workers if server.url in servers.unrouted]
    order_all(joining, ControlClient.resume)
    if not servers.versions.adapters_only:  # else the next push brings the adapter
        rejoin(servers)


def _left_behind(servers: Servers) -> EngineLostError | None:
    """Why a server that was started again must not generate yet; None if it may."""
    if servers.versions.adapters_only:
        return None  # the base weights are the model's own everywhere
    versions = servers.note_versions()
    newest = servers.versions.seen
    for url, version in versions.items():
        if url in servers.unrouted and newest and version != str(newest):
            return EngineLostError(
                "it was started again, with the model's own files", step=RESTART, engine=url
            )
    return None
