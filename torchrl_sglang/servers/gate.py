"""Keeps the state of a service's weights, and holds new requests back while they change.

What requests come to that servers have already is `WeightSyncConfig.pause_mode`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..errors import (
    AlreadyConnectedError,
    RequestTimeoutError,
    ServiceBrokenError,
    ServiceClosedError,
    warn,
)

# How long a push waits for requests whose bodies are being written when it begins. They are not
# held up by anything but a connection that takes no more bytes, and then they are on the wire.
POSTING_S = 5.0


def told(error: BaseException | None) -> str:
    """What an error says, or what it is: Ctrl-C says nothing."""
    return str(error) or type(error).__name__


class ServiceState(enum.Enum):
    """What a service's servers run.

    ``SYNCED``: whole weights of one version. ``UPDATING``: a push is on its way; new requests wait
    on our side. ``BROKEN``: a push failed; the servers stay paused and nothing generates until a
    full push succeeds. ``CLOSED``: shut down.
    """

    SYNCED = "synced"
    UPDATING = "updating"
    BROKEN = "broken"
    CLOSED = "closed"


class UpdateGate:
    """Holds callers back during an update. Safe to use from several threads and event loops.

    A caller enters (`wait_until_open`, `entered`) and is given the epoch, learns what the servers
    run, and says when it posts (`start_posting`): that is refused if a push has begun since.

    Attributes:
        state: the present state.
        failure: the error that broke the service, if it is broken.
        epoch: how many pushes have begun.
    """

    def __init__(self) -> None:
        self.state = ServiceState.SYNCED
        self.failure: BaseException | None = None
        self.epoch = 0
        self._changed = threading.Condition()
        self._num_posting = 0
        self._wakers: list[Callable[[], object]] = []
        self._in_flight: set[Callable[[ServiceBrokenError], None]] = set()
        self._pusher: weakref.ref[Any] | None = None

    def claim(self, pusher: Any) -> None:
        """Makes ``pusher`` the only one that may change the weights, until it lets go or is gone.

        Raises:
            AlreadyConnectedError: another one is.
        """
        with self._changed:
            first = self._pusher() if self._pusher is not None else None
            if first is not None and first is not pusher:
                raise AlreadyConnectedError(
                    f"{first!r} is in the middle of a push to this service, and two would "
                    "overwrite each other's weights: use that one, or wait until it is done."
                )
            self._pusher = weakref.ref(pusher)

    def take(self, pusher: Any) -> None:
        """Same as `claim`, in the place of one that lets itself be closed for it, with a warning.

        As of a notebook's cell that is run again.

        Args:
            pusher: who pushes from now on.
        """
        first = self.pusher
        if first is not None and first is not pusher and first.give_way(pusher):
            warn(
                f"{pusher!r} takes the place of {first!r}, which is closed: one weight sync pushes "
                "to a service at a time. close() the first one to avoid this warning."
            )
        self.claim(pusher)

    @property
    def pusher(self) -> Any:
        """Who may change the weights; None if nobody has claimed them, or is there any more."""
        with self._changed:
            return self._pusher() if self._pusher is not None else None

    def release(self, pusher: Any) -> None:
        """Lets the next one claim the weights; harmless for one that has no claim."""
        with self._changed:
            if self._pusher is not None and self._pusher() is pusher:
                self._pusher = None

    # Entering

    def wait_until_open(self, timeout_s: float) -> int:
        """Returns the epoch, once the service is synced.

        Raises:
            ServiceBrokenError: the last push failed.
            ServiceClosedError: the service was shut down.
            RequestTimeoutError: a push took longer than ``timeout_s``.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self.state is not ServiceState.UPDATING, timeout=timeout_s
            )
            if not done:
                raise RequestTimeoutError(
                    f"a weight push was still under way after {timeout_s:g} s; nothing was sent."
                )
            return self._epoch_if_open()

    async def entered(self) -> int:
        """Same as `wait_until_open`, awaited; whoever awaits it bounds it."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self.state is not ServiceState.UPDATING:
                    return self._epoch_if_open()
                changed = asyncio.Event()
                self._wakers.append(partial(loop.call_soon_threadsafe, changed.set))
            await changed.wait()

    def _epoch_if_open(self) -> int:
        if self.state is ServiceState.BROKEN:
            raise self._broken("the last weight push failed")
        if self.state is ServiceState.CLOSED:
            raise ServiceClosedError("the service was shut down.")
        return self.epoch

    def _broken(self, what: str) -> ServiceBrokenError:
        error = ServiceBrokenError(
            f"{what}, so the servers may hold a mixture of weights and stay paused; push the whole "
            f"model again to repair them. It failed with: {told(self.failure)}"
        )
        error.__cause__ = self.failure
        return error

    # Posting

    def is_open(self, epoch: int) -> bool:
        """Whether the service is synced, and no push has begun since ``epoch``."""
        return self.state is ServiceState.SYNCED and self.epoch == epoch

    def start_posting(self, epoch: int) -> bool:
        """Whether a request that was made in ``epoch`` may still be written to a connection.

        A push that begins afterwards waits for `end_posting` before it touches a server.
        """
        with self._changed:
            if not self.is_open(epoch):
                return False
            self._num_posting += 1
            return True

    def end_posting(self) -> None:
        """The request is written, or was given up."""
        with self._changed:
            self._num_posting -= 1
            if not self._num_posting:
                self._changed.notify_all()

    @contextlib.contextmanager
    def in_flight(self, broken: Callable[[ServiceBrokenError], None]) -> Iterator[None]:
        """Calls ``broken``, from the thread that pushes, for every push that fails meanwhile."""
        with self._changed:
            self._in_flight.add(broken)
        try:
            yield
        finally:
            with self._changed:
                self._in_flight.discard(broken)

    # Pushing

    def begin(self) -> None:
        """A push starts; returns once no request of the weights before can be posted any more.

        Raises:
            ServiceClosedError: the service was shut down.
        """
        with self._changed:
            if self.state is ServiceState.CLOSED:
                raise ServiceClosedError("the service was shut down: there is nothing to push to.")
            self._set(ServiceState.UPDATING, None)
            self.epoch += 1
            self._changed.wait_for(lambda: not self._num_posting, timeout=POSTING_S)

    def commit(self) -> None:
        """The push succeeded on every server."""
        with self._changed:
            self._set(ServiceState.SYNCED, None)

    def fail(self, error: BaseException) -> None:
        """The push failed. Calls in flight end: nobody knows what their servers hold."""
        with self._changed:
            self._set(ServiceState.BROKEN, error)
            if self.state is ServiceState.BROKEN:
                for broken in self._in_flight:
                    broken(self._broken("a weight push failed while this call was in flight"))

    def close(self) -> None:
        """The service was shut down."""
        with self._changed:
            self.state = ServiceState.CLOSED
            self._wake()

    def _set(self, state: ServiceState, failure: BaseException | None) -> None:
        if self.state is not ServiceState.CLOSED:
            self.state, self.failure = state, failure
        self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, []
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there
                wake()
