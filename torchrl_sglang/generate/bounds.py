"""Bounds the calls under way on an event loop, and ends them where nobody would answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Protocol

from ..config import Timeouts
from ..errors import RequestTimeoutError, ServiceBrokenError, ServiceError
from ..servers.control import ControlClient
from ..servers.gate import ServiceState, UpdateGate
from ..servers.health import REFUSAL_S, Looks, looks_of
from ..servers.together import ask_all

CHECK_S = 5.0  # between two looks at the servers while calls are under way
SOON_S = 0.1

End = Callable[[ServiceError], None]


class Recovery(Protocol):
    """Sees to it that there is somebody to answer."""

    @property
    def lost(self) -> bool:
        """Whether nobody answers; must be quick."""

    def recover(self) -> None:
        """Mends that, which may take a while.

        Raises:
            ServiceError: it can't.
        """


class CallBounds:
    """Bounds the calls under way on one event loop.

    A server that is paused keeps every request, and says nothing, for as long as it is paused. So
    calls end when a push of this process fails, and when servers stay paused for
    ``Timeouts.paused_s`` by another one's. So does every server, for ``Timeouts.retry_s``, that has
    lost a process; where others answer, a router sends its requests to them.

    Args:
        gate: tells of this process's pushes.
        workers: the servers.
        timeouts: bounds on waiting.
        recovery: what to do about servers or a router of this process that died.
    """

    def __init__(
        self,
        gate: UpdateGate,
        workers: Callable[[], Sequence[ControlClient]],
        timeouts: Timeouts,
        recovery: Recovery,
    ) -> None:
        self._recovery = recovery
        self._gate = gate
        self._workers = workers
        self._timeouts = timeouts
        self._ends: set[End] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def bounded(self, within_s: float) -> AsyncIterator[None]:
        """Bounds what is done inside.

        Raises:
            TimeoutError: it took longer than ``within_s``.
            ServiceBrokenError: a push failed meanwhile.
            RequestTimeoutError: servers stay paused, or none answers anything.
            ConnectError: the router, or every server, of this process died and stays dead.
        """
        loop, reasons = asyncio.get_running_loop(), list[ServiceError]()

        def end(reason: ServiceError) -> None:
            if end in self._ends and not scope.expired():
                reasons.append(reason)
                scope.reschedule(loop.time())

        def broken(reason: ServiceBrokenError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the call with it
                loop.call_soon_threadsafe(end, reason)

        try:
            async with asyncio.timeout(within_s) as scope:
                await self.recovered()
                with self._gate.in_flight(broken), self._watched(end):
                    yield
        except TimeoutError:
            if reasons:
                raise reasons[0] from reasons[0].__cause__
            raise

    @contextlib.contextmanager
    def _watched(self, end: End) -> Iterator[None]:
        self._ends.add(end)
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self._ends.discard(end)
            if not self._ends:
                self._watcher.cancel()
                self._watcher = None

    async def recovered(self) -> bool:
        """Whether nobody was there to answer, as far as this process sees, and now somebody is.

        Raises:
            ConnectError: nobody is; says who died, and how.
        """
        # What a push finds dead it may be about to start again, and it says how that ends.
        if self._gate.state is not ServiceState.SYNCED or not self._recovery.lost:
            return False
        if self._recovering is None or self._recovering.done():
            recovery = asyncio.to_thread(self._recovery.recover)
            self._recovering = asyncio.create_task(recovery)
        await asyncio.shield(self._recovering)
        return True

    async def _watch(self) -> None:
        """Ends all calls once a server has been paused for too long, or all have been silent."""
        clock = asyncio.get_running_loop().time
        paused = _Lasting(Looks.PAUSED, self._timeouts.paused_s)
        silent = _Lasting(Looks.SILENT, self._timeouts.retry_s)
        wait_s = often_s = min(CHECK_S, paused.limit_s / 4, silent.limit_s / 4)
        while True:
            await asyncio.sleep(wait_s)
            asked_at = clock()  # what keeps an answer does so from then on
            looks = await self._looks()
            for lasting in (paused, silent):
                lasting.note(looks, asked_at)
            if stuck := paused.too_long(clock()):
                self._end(_stuck_error(stuck, paused.limit_s))
            gone = silent.too_long(clock())
            if gone and len(gone) == len(looks):
                self._end(_silent_error(gone, silent.limit_s))
            due_s = min(lasting.due_s(clock()) for lasting in (paused, silent))
            wait_s = max(min(often_s, due_s - REFUSAL_S), SOON_S)

    def _end(self, reason: ServiceError) -> None:
        for end in tuple(self._ends):
            end(reason)

    async def _looks(self) -> dict[str, Looks]:
        """What servers look like; nothing during a push of this process, which is bounded."""
        workers, ours = self._workers(), ServiceState.UPDATING
        if self._gate.state is ours:
            return {}
        looks = (await asyncio.to_thread(ask_all, workers, looks_of)).given
        if self._gate.state is ours:
            return {}
        return {server.url: each for server, each in looks.items()}


class _Lasting:
    """Which servers have looked alike at every look, and since when.

    Args:
        like: how.
        limit_s: for how long they may.
    """

    def __init__(self, like: Looks, limit_s: float) -> None:
        self._like, self.limit_s = like, limit_s
        self._since: dict[str, float] = {}

    def note(self, looks: Mapping[str, Looks], now: float) -> None:
        """Takes note of a look at ``now``."""
        alike = [url for url, each in looks.items() if each is self._like]
        self._since = {url: self._since.get(url, now) for url in alike}

    def too_long(self, now: float) -> dict[str, float]:
        """Servers that have looked so for the limit, with the seconds."""
        return {url: now - at for url, at in self._since.items() if now - at >= self.limit_s}

    def due_s(self, now: float) -> float:
        """Seconds until the first of them has done so for the limit."""
        return min(self._since.values(), default=math.inf) + self.limit_s - now


def _silent_error(gone_s: Mapping[str, float], limit_s: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"no server has answered anything for {max(gone_s.values()):.1f} s (Timeouts.retry_s is "
        f"{limit_s:g} s): {', '.join(gone_s)}. SGLang is like that after one of its processes "
        "has crashed: look into the servers' logs, and start them again."
    )


def _stuck_error(stuck_s: Mapping[str, float], limit_s: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"servers have been paused for {max(stuck_s.values()):.1f} s and answer nothing: "
        f"{', '.join(stuck_s)}. Another process pushes weights to them, or its push failed, or it "
        "is gone. A push of the whole model lets them go on; for pushes that take longer, raise "
        f"Timeouts.paused_s ({limit_s:g} s)."
    )
