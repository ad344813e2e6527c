"""Reserves ports, so that nobody takes one between being chosen and being bound."""

from __future__ import annotations

import socket
import time
from types import TracebackType

from ..errors import PortTakenError

POLL_S = 0.05


class PortReservation:
    """Holds a TCP port until the child that was given it has bound it.

    The socket is bound with ``SO_REUSEADDR`` but does not listen. Linux then gives the port to no
    other automatic choice and to no plain bind, while a server that sets ``SO_REUSEADDR`` itself
    (uvicorn, the router and torch's store do) can bind and listen on it.

    Attributes:
        port: the number.
    """

    def __init__(self, host: str = "127.0.0.1", port: int | None = None) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if port is not None:
                refuse_if_listening(host, port)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port or 0))
        except (OSError, OverflowError) as error:
            self._socket.close()
            if isinstance(error, PortTakenError):
                raise
            raise PortTakenError(
                f"port {port} on {host} can't be bound "
                f"({getattr(error, 'strerror', None) or error}): choose another, or "
                "pass port=None for a free one."
            ) from error
        self.port: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Lets go of the port; harmless twice."""
        self._socket.close()

    def __enter__(self) -> PortReservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def wait_until_free(host: str, port: int, timeout_s: float) -> None:
    """Returns once nothing answers on a port: what was killed closes its sockets a little later.

    Raises:
        PortTakenError: something still does after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return refuse_if_listening(host, port)
        except PortTakenError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def refuse_if_listening(host: str, port: int) -> None:
    """Raises `PortTakenError` if something already answers on the port."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except (OSError, OverflowError):
        return
    raise PortTakenError(
        f"port {port} on {host} is in use by another process: choose another, or pass port=None "
        "for a free one."
    )
