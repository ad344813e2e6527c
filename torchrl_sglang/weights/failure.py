"""What follows a push that failed: all servers stay paused, and it is known who is gone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from ..client import ControlClient
from ..errors import EngineLostError, PushError
from .collective import in_thread
from .watch import broke_connection

DYING_CHECKS = 5
DYING_S = 0.1
LIVENESS_S = 2.0  # how long a server has to say that it lives, and to pause again


def after_failure(error: BaseException, workers: Sequence[ControlClient]) -> BaseException:
    """Pauses all servers again, and finds out whether the one that failed is gone.

    A server may have gone on already, when another failed to. Takes `LIVENESS_S` at most.

    Returns:
        The error, or an `EngineLostError` where nothing listens at the engine's address any more.
    """

    def pause(worker: ControlClient) -> None:
        worker.post("/pause_generation", {"mode": "retract"}, timeout_s=LIVENESS_S)

    pauses = [in_thread(lambda w=w: pause(w), "torchrl_sglang-pause") for w in workers]
    error = with_its_cause(error, workers)
    for paused in pauses:
        with contextlib.suppress(Exception):
            paused.result(LIVENESS_S)
    return error


def with_its_cause(error: BaseException, workers: Sequence[ControlClient]) -> BaseException:
    """The error, or an `EngineLostError` where nothing listens at the engine's address any more."""
    failed = [worker for worker in workers if worker.url == getattr(error, "engine", None)]
    if isinstance(error, PushError) and _is_gone(error, failed):
        return EngineLostError.of(error)
    return error


def _is_gone(error: PushError, failed: Sequence[ControlClient]) -> bool:
    if not failed or not broke_connection(error):
        return False
    for _ in range(DYING_CHECKS):  # a process that dies closes its listener last
        if not failed[0].listens(LIVENESS_S):
            return True
        time.sleep(DYING_S)
    return False
