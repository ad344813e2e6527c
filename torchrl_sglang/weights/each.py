"""Orders that every server gets at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..client import ControlClient
from ..errors import RequestRefusedError
from ..info import WorkerInfo
from .watch import watch


def on_each(
    workers: Sequence[ControlClient],
    step: str,
    call: Callable[[ControlClient], Any],
    timeout_s: float,
) -> None:
    """Runs ``call`` for every server at once.

    Raises:
        PushError: the first that failed; names the step and the engine.
    """
    with ThreadPoolExecutor(len(workers)) as pool:
        futures = {pool.submit(call, worker): worker.url for worker in workers}
        watch(futures, step=step, timeout_s=timeout_s)


def flush_caches(
    workers: Sequence[ControlClient], infos: Sequence[WorkerInfo], timeout_s: float
) -> bool:
    """Empties the prefix caches of paused servers; whether all are empty now.

    Servers before 0.5.23 refuse it while retracted requests wait, which they do until the push is
    over. The salts then keep requests of the new version away from old prefixes.

    Raises:
        PushError: a server failed, or refused where it should not.
    """
    salted = all(info.capabilities.cache_salt for info in infos)
    may_refuse = salted and not all(info.capabilities.update_session for info in infos)
    refused: list[str] = []

    def flush(worker: ControlClient) -> None:
        try:
            worker.post("/flush_cache")
        except RequestRefusedError:
            if not may_refuse:
                raise
            refused.append(worker.url)

    on_each(workers, "flush", flush, timeout_s)
    return not refused
