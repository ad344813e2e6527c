"""Starts threads that hold nobody up for long, at the interpreter's exit neither."""

from __future__ import annotations

import atexit
import os
import threading
from concurrent.futures import Future
from typing import Any

_waited_for: dict[threading.Thread, float] = {}


def in_thread(call: Any, name: str, *, exit_waits_s: float = 0.0) -> Future[Any]:
    """Runs a call in a daemon thread of its own.

    Args:
        call: what to run.
        name: the thread's name.
        exit_waits_s: how long the interpreter's exit waits for the thread. One that comes back from
            torch's C++ while the interpreter is taken apart ends the process by a signal, so
            whatever calls that needs a bound after which it is over.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        finally:
            _waited_for.pop(threading.current_thread(), None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    if exit_waits_s:
        _waited_for[thread] = exit_waits_s
    try:
        thread.start()
    except BaseException:
        _waited_for.pop(thread, None)
        raise
    return future


@atexit.register
def wait_for_threads() -> None:
    """Waits for what must not outlive the interpreter, in the order in which it was begun."""
    while threads := [*_waited_for]:
        threads[0].join(_waited_for.pop(threads[0], 0.0))


os.register_at_fork(after_in_child=_waited_for.clear)  # a fork has none of its parent's threads
