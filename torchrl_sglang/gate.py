"""The state of a service's weights, and the gate that holds requests while they change."""

from __future__ import annotations

import enum
import threading
import weakref
from typing import Any

from .errors import (
    AlreadyConnectedError,
    RequestTimeoutError,
    ServiceBrokenError,
    ServiceClosedError,
)


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
    """Holds callers back during an update. Safe to use from several threads.

    Attributes:
        state: the present state.
        failure: the error that broke the service, if it is broken.
    """

    def __init__(self) -> None:
        self.state = ServiceState.SYNCED
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
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
                    f"{first!r} is connected to this service already, and two would take turns in "
                    "overwriting each other's weights: use that one, or close() it first."
                )
            self._pusher = weakref.ref(pusher)

    def release(self, pusher: Any) -> None:
        """Lets the next one claim the weights; harmless for one that has no claim."""
        with self._changed:
            if self._pusher is not None and self._pusher() is pusher:
                self._pusher = None

    def wait_until_open(self, timeout_s: float) -> None:
        """Returns once the service is synced.

        Raises:
            ServiceBrokenError: the last push failed.
            ServiceClosedError: the service was shut down.
            RequestTimeoutError: a push took longer than ``timeout_s``.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self.state is not ServiceState.UPDATING, timeout=timeout_s
            )
            state, failure = self.state, self.failure
        if not done:
            raise RequestTimeoutError(
                f"a weight push was still under way after {timeout_s:g} s; nothing was sent."
            )
        if state is ServiceState.BROKEN:
            raise ServiceBrokenError(
                "the last weight push failed, so the servers may hold a mixture of weights and "
                f"stay paused; push the whole model again to repair them. It failed with: {failure}"
            ) from failure
        if state is ServiceState.CLOSED:
            raise ServiceClosedError("the service was shut down.")

    def begin(self) -> None:
        """A push starts.

        Raises:
            ServiceClosedError: the service was shut down.
        """
        with self._changed:
            if self.state is ServiceState.CLOSED:
                raise ServiceClosedError("the service was shut down: there is nothing to push to.")
            self._set(ServiceState.UPDATING, None)

    def commit(self) -> None:
        """The push succeeded on every server."""
        with self._changed:
            self._set(ServiceState.SYNCED, None)

    def fail(self, error: BaseException) -> None:
        """The push failed."""
        with self._changed:
            self._set(ServiceState.BROKEN, error)

    def close(self) -> None:
        """The service was shut down."""
        with self._changed:
            self.state = ServiceState.CLOSED
            self._changed.notify_all()

    def _set(self, state: ServiceState, failure: BaseException | None) -> None:
        if self.state is not ServiceState.CLOSED:
            self.state, self.failure = state, failure
        self._changed.notify_all()
