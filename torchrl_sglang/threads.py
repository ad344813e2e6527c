"""Threads that nothing waits for at the interpreter's exit."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any


def in_thread(call: Any, name: str) -> Future[Any]:
    """Runs a call in a daemon thread of its own, which nothing waits for at exit."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
