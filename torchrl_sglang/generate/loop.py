"""Runs one event loop on one daemon thread, for everything asynchronous that a service does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar

from ..errors import ServiceClosedError

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for callers of any thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine; the coroutine bounds its own time.

        An exception in the waiting thread (Ctrl-C) cancels the coroutine, whenever it comes.

        Raises:
            ServiceClosedError: the loop was closed, before the call or during it.
            RuntimeError: called from the loop's own thread, where it would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a blocking call from the event loop's own thread would never end.")
        call = _Call(coroutine)
        try:
            return self.submit(call.run()).result()
        except CancelledError:
            self._abandon(call)
            raise closed_meanwhile() from None
        except BaseException:
            self._abandon(call)
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine; cancelling the future cancels it.

        Raises:
            ServiceClosedError: the loop was closed.
        """
        with self._lock:
            if self._closing:
                coroutine.close()
                raise ServiceClosedError("the service was shut down.")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _abandon(self, call: _Call[Any]) -> None:
        with self._lock:
            if self._closing:
                call.abandon()
            else:
                self._loop.call_soon_threadsafe(call.abandon)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancels what still runs and ends the thread; harmless twice.

        Args:
            last: runs when nothing else does any more, to close what the others used.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(last), self._loop).result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()


class _Call(Generic[T]):
    """A coroutine that can be given up before, while and after it runs."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._task: asyncio.Task[Any] | None = None
        self._abandoned = False

    async def run(self) -> T:
        self._task = asyncio.current_task()
        if self._abandoned:
            self._coroutine.close()
            raise asyncio.CancelledError
        return await self._coroutine

    def abandon(self) -> None:
        self._abandoned = True
        if self._task is None:
            self._coroutine.close()
        elif not self._task.done():
            self._task.cancel()


def result_of(call: Future[T]) -> T:
    """What a call that was submitted comes to.

    Raises:
        ServiceClosedError: the loop was closed during it.
    """
    try:
        return call.result()
    except CancelledError:
        raise closed_meanwhile() from None


def closed_meanwhile() -> ServiceClosedError:
    """The error of a call that a shutdown ended."""
    return ServiceClosedError("the service was shut down while this call was waiting.")


async def _cancel_all(last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last is not None:
        await last()
