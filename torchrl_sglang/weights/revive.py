"""Starting managed servers again that died, or that nothing else gets out of a broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

from ..client import ControlClient
from ..errors import HTTPAnswerError, ServiceError
from .threads import in_thread

# What is asked is answered in milliseconds by a server whose scheduler lives, paused or not. One
# that computes a long prompt takes longer; one that is stuck in NCCL never answers.
ALIVE_S = 10.0


def revive(service: Any) -> tuple[str, ...]:
    """Starts the managed servers again that don't answer; servers of others are left as they are.

    Args:
        service: the servers; anything with ``managed``, ``cluster`` and ``restart_in_push``.

    Returns:
        URLs of those that were started again. They hold the model's own files.

    Raises:
        EngineLostError: one did not start.
    """
    if not service.managed:
        return ()
    urls = lifeless(service.cluster.workers)
    service.restart_in_push(urls)
    return urls


def lifeless(workers: Sequence[ControlClient]) -> tuple[str, ...]:
    """URLs of the servers whose schedulers don't answer within `ALIVE_S`."""
    asked = {
        worker.url: in_thread(lambda w=worker: _lives(w), "torchrl_sglang-ask")
        for worker in workers
    }
    wait(asked.values(), ALIVE_S + 1.0)
    return tuple(url for url, answer in asked.items() if not (answer.done() and answer.result()))


def _lives(worker: ControlClient) -> bool:
    try:
        worker.get("/server_info", timeout_s=ALIVE_S)  # which asks every scheduler
    except HTTPAnswerError as error:
        return error.status is not None
    except ServiceError:
        return False
    return True
