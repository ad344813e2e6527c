"""The calls under way on an event loop: bounded, and ended where nobody would answer them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Protocol

from .client import ControlClient
from .config import Timeouts
from .errors import (
    RequestRefusedError,
    RequestTimeoutError,
    ServerFailedError,
    ServiceBrokenError,
    ServiceError,
)
from .gate import ServiceState, UpdateGate
from .vocabulary import QUESTION

CHECK_S = 5.0  # between two looks at the servers while calls are under way
SOON_S = 0.1
ASK_S = 2.0  # how long a server that is not paused takes at most to refuse a request

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


class Calls:
    """The calls under way on one event loop.

    A server that is paused keeps every request, and says nothing, for as long as it is paused. So
    calls end when a push of this process fails, and when servers stay paused for
    ``Timeouts.paused_s`` by another one's.

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
            RequestTimeoutError: servers stay paused.
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
        """Ends all calls once a server has been paused for too long."""
        clock, limit_s = asyncio.get_running_loop().time, self._timeouts.paused_s
        wait_s = often_s = min(CHECK_S, limit_s / 4)
        since: dict[str, float] = {}
        while True:
            await asyncio.sleep(wait_s)
            asked_at = clock()  # who is paused keeps the answer from then on
            since = {url: since.get(url, asked_at) for url in await self._paused()}
            stuck = {url: clock() - at for url, at in since.items() if clock() - at >= limit_s}
            if stuck:
                for end in tuple(self._ends):
                    end(_stuck_error(stuck, limit_s))
            due_s = min(since.values(), default=clock()) + limit_s - clock()
            wait_s = max(min(often_s, due_s - ASK_S), SOON_S)

    async def _paused(self) -> list[str]:
        """The servers that are paused, but not by a push of this process, which is bounded."""
        workers, ours = self._workers(), ServiceState.UPDATING
        if self._gate.state is ours:
            return []
        asked = [asyncio.to_thread(is_paused, worker) for worker in workers]
        answers = await asyncio.gather(*asked)
        if self._gate.state is ours:
            return []
        return [worker.url for worker, paused in zip(workers, answers, strict=True) if paused]


def is_paused(worker: ControlClient) -> bool:
    """Whether a server is paused. Takes up to two times `ASK_S` if it is.

    SGLang says since 0.5.20 whether it is ready, which a server that works on a long prompt may not
    be either. So one that is not has to refuse a request, which takes no scheduler and no GPU, but
    waits for the end of a pause.
    """
    try:
        worker.get("/ready", timeout_s=ASK_S)
    except (RequestRefusedError, ServerFailedError):
        pass
    except ServiceError:
        return False  # it is gone, which its requests find out
    else:
        return False
    try:
        worker.post("/generate", QUESTION, timeout_s=ASK_S)
    except RequestTimeoutError:
        return True
    except ServiceError:
        return False
    return False


def _stuck_error(stuck_s: Mapping[str, float], limit_s: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"servers have been paused for {max(stuck_s.values()):.1f} s and answer nothing: "
        f"{', '.join(stuck_s)}. Another process pushes weights to them, or its push failed, or it "
        "is gone. A push of the whole model lets them go on; for pushes that take longer, raise "
        f"Timeouts.paused_s ({limit_s:g} s)."
    )
