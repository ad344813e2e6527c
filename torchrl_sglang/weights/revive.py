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
LAG_S = 1.5  # of a time-out that counts from the connection


def to_revive(service: Any, suspects: Collection[str] = ()) -> tuple[str, ...]:
    """URLs of the managed servers that don't answer; servers of others are left as they are.

    Args:
        service: the servers; anything with ``managed_urls`` and ``cluster``.
        suspects: URLs of those that are taken for stuck whatever they answer.
    """
    managed = service.managed_urls
    workers = [worker for worker in service.cluster.workers if worker.url in managed]
    asked = [worker for worker in workers if worker.url not in suspects]
    silent = silent_at("/server_info", asked, ALIVE_S)  # which asks every scheduler
    return tuple(w.url for w in workers if w.url in suspects or w.url in silent)


def stuck_engine(error: BaseException, service: Any) -> str | None:
    """URL of an engine that may answer and is stuck all the same: it joins no new NCCL group.

    Its broadcasts are queued on the GPU behind one that never ends.
    """
    if service.info.device == "cpu" or not isinstance(error, PushTimeoutError):
        return None
    return error.engine if error.step == "init" else None


def silent_at(path: str, workers: Sequence[ControlClient], timeout_s: float) -> list[str]:
    """URLs of the servers that answer nothing to a GET within ``timeout_s``, not even an error."""
    asked = {
        in_thread(lambda w=worker: _answers(w, path, timeout_s), "torchrl_sglang-ask"): worker.url
        for worker in workers
    }
    wait(asked, timeout_s + LAG_S)
    return [url for answer, url in asked.items() if not (answer.done() and answer.result())]


def _answers(worker: ControlClient, path: str, timeout_s: float) -> bool:
    try:
        worker.get(path, timeout_s=timeout_s)
    except HTTPAnswerError as error:
        return error.status is not None
    except ServiceError:
        return False
    return True
