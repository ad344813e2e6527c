"""Calls of several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
    """Runs each in a thread of its own and waits for all."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [pool.submit(call) for call in calls]
