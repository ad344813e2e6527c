"""Gives orders to the servers that a push goes to: the steps that all of them take together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..errors import PushTimeoutError, RequestRefusedError, ServiceError
from ..servers.control import ControlClient
from ..servers.health import waits_for_gpu
from ..servers.info import WorkerInfo
from ..servers.together import Courier, Order, watch

# How long a session that somebody else opened is waited for, before it is taken for a dead one's.
TAKE_OVER_S = 1.0
TAKE_OVER_POLL_S = 0.05


def _begin(timeout_s: float, server: ControlClient) -> None:
    deadline, waited = time.monotonic() + TAKE_OVER_S, False
    while not _opens(timeout_s, server):
        waited = True
        if time.monotonic() > deadline:
            server.end(timeout_s)
            server.begin(timeout_s)
            return
        time.sleep(TAKE_OVER_POLL_S)
    if waited:
        # Its trainer goes on with the version and lets the server go, in the middle of this push.
        server.end(timeout_s)
        raise ServiceError(
            "another process was pushing to this server: one trainer at a time can, and its push "
            "and this one may both be incomplete. Push again once the other has stopped."
        )


def _opens(timeout_s: float, server: ControlClient) -> bool:
    try:
        server.begin(timeout_s)
    except RequestRefusedError:
        return False
    return True


class Targets:
    """The servers that a push goes to.

    Args:
        workers: a client per server.
        infos: what each says of itself, in the same order.
        timeout_s: bound on one order.
        step_s: bound on one of those that take milliseconds; the same by default.
    """

    def __init__(
        self,
        workers: Sequence[ControlClient],
        infos: Sequence[WorkerInfo],
        timeout_s: float,
        step_s: float | None = None,
    ) -> None:
        self.workers = tuple(workers)
        self.infos = tuple(infos)
        self.timeout_s = timeout_s
        self.step_s = min(timeout_s, step_s or timeout_s)
        self._couriers: list[Courier] = []

    @property
    def takes_begin_end(self) -> bool:
        """Whether updates go between begin and end."""
        return all(info.capabilities.update_session for info in self.infos)

    @property
    def has_salts(self) -> bool:
        """Whether requests can be kept from prefixes of other weights."""
        return all(info.capabilities.cache_salt for info in self.infos)

    def ask(self, call: Order[Any]) -> dict[Future[Any], str | None]:
        """Makes a call to every server; the answers, and whose each is."""
        if not self._couriers:
            self._couriers = [Courier(server) for server in self.workers]
        return {courier.send(call): courier.url for courier in self._couriers}

    def do(self, step: str, call: Order[Any], timeout_s: float | None = None) -> None:
        """Makes a call to every server and waits for all.

        Raises:
            PushError: the first that failed; names the step and the engine.
        """
        watch(self.ask(call), step=step, timeout_s=timeout_s or self.timeout_s)

    def collect(self, step: str, call: Order[Any], timeout_s: float | None = None) -> list[Any]:
        """What every server answers to a call, in the servers' order; errors as in `do`."""
        asked = self.ask(call)
        watch(asked, step=step, timeout_s=timeout_s or self.timeout_s)
        return [answer.result() for answer in asked]

    def pause(self, step: str, mode: str) -> None:
        """Pauses every server; errors as in `do`, under the name of a step."""
        self.do(step, lambda server: server.pause(mode, self.step_s), self.step_s)

    def resume(self) -> None:
        """Has every server go on; errors as in `do`."""
        self.do("continue", lambda server: server.resume(self.step_s), self.step_s)

    def check_allowed(self, method: str) -> None:
        """Finds out whether servers let this process carry weights so, see `ControlClient`.

        Raises:
            PushError: a server refuses the key, or has no such route.
        """
        self.do("connect", lambda w: w.check_allowed(method, self.step_s), self.step_s)

    def begin(self) -> None:
        """Opens an update session where servers have them; errors as in `do`.

        One that a trainer left open when it died is taken over. It looks like that of a trainer
        which pushes in this moment, but that one ends its session soon.

        Raises:
            PushError: also where another process has pushed meanwhile.
        """
        if self.takes_begin_end:
            self.do("begin", partial(_begin, self.step_s), self.step_s + TAKE_OVER_S)

    def end(self, timeout_s: float | None = None) -> None:
        """Closes the update session; errors as in `do`."""
        within_s = timeout_s or self.timeout_s
        if self.takes_begin_end:
            self.do("end", lambda server: server.end(within_s), within_s)

    def flush(self) -> bool:
        """Empties the prefix caches of paused servers; whether all are empty now.

        Servers before 0.5.23 refuse it while retracted requests wait, which they do until the push
        is over. The salts then keep requests of the new version away from old prefixes.

        Raises:
            PushError: a server failed, or refused where it should not.
        """
        may_refuse = self.has_salts and not self.takes_begin_end
        refused: list[str] = []

        def flush(server: ControlClient) -> None:
            try:
                server.flush(self.step_s)
            except RequestRefusedError:
                if not may_refuse:
                    raise
                refused.append(server.url)

        self.do("flush", flush, self.step_s)
        return not refused

    def wait_for_gpus(self, step: str) -> None:
        """Returns once every GPU is done with what it was given, where servers tell.

        One that is stuck in a broadcast takes part in new groups, and does nothing of what comes
        after: it is found out here, or by whatever waits for it next.

        Raises:
            PushError: a server failed, or did not get done in time.
        """
        if not all(info.capabilities.checksum for info in self.infos):
            return
        try:
            self.do(step, lambda server: waits_for_gpu(server, self.timeout_s))
        except PushTimeoutError as error:
            raise PushTimeoutError(
                f"its GPU did not get done within {self.timeout_s:g} s with what it was given "
                "before. If it is stuck, as in the broadcast of a trainer that died, it has to be "
                "started again: connecting and repairing do so, where this process started it.",
                step=step,
                engine=error.engine,
            ) from error

    def set_version(self, version: int) -> None:
        """Tells every server the number of its weights; errors as in `do`."""
        number, step_s = str(version), self.step_s
        self.do("version", lambda server: server.set_version(number, step_s), step_s)

    def close(self) -> None:
        """Lets go of the threads; one that hangs in a call is left behind. Harmless twice."""
        couriers, self._couriers = self._couriers, []
        for courier in couriers:
            courier.close()
