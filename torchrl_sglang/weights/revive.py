"""Starting managed servers again that died, or that nothing else gets out of a broadcast."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import wait
from typing import Any

from ..client import ControlClient
from ..errors import HTTPAnswerError, PushTimeoutError, ServiceError
from ..threads import in_thread

# What is asked is answered in milliseconds by a server whose scheduler lives, paused or not. One
# that computes a long prompt takes longer; one that is stuck in NCCL never answers.
ALIVE_S = 10.0


def to_revive(service: Any, suspects: Collection[str] = ()) -> tuple[str, ...]:
    """URLs of the managed servers that don't answer; servers of others are left as they are.

    Args:
        service: the servers; anything with ``managed_urls`` and ``cluster``.
        suspects: URLs of those that are taken for stuck whatever they answer.
    """
    managed = service.managed_urls
    workers = [worker for worker in service.cluster.workers if worker.url in managed]
    silent = lifeless([worker for worker in workers if worker.url not in suspects])
    return tuple(w.url for w in workers if w.url in suspects or w.url in silent)


def is_stuck(error: BaseException, service: Any) -> bool:
    """Whether an engine that answers is stuck all the same: it takes no part in a new NCCL group.

    Its broadcasts are queued on the GPU behind one that never ends.
    """
    late = isinstance(error, PushTimeoutError) and error.step == "init"
    return late and service.info.device != "cpu"


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
