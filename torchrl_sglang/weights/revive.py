"""Starting managed servers again that died, or that nothing else gets out of a broadcast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait
from typing import Any

from ..client import ControlClient
from ..errors import HTTPAnswerError, PushTimeoutError, RequestRefusedError, ServiceError
from ..threads import in_thread

# What is asked is answered in milliseconds by a server whose scheduler lives, paused or not. One
# that computes a long prompt takes longer; one that is stuck in NCCL never answers.
ALIVE_S = 10.0
Ask = Callable[[ControlClient, float], None]
LAG_S = 1.5  # of a time-out that counts from the connection


def to_revive(service: Any, suspects: Collection[str] = ()) -> tuple[str, ...]:
    """URLs of the managed servers that don't answer; servers of others are left as they are.

    A scheduler whose GPU is stuck in a broadcast answers until it waits for that GPU. So it is told
    to, and then never answers again: what does not is started again.

    Args:
        service: the servers; anything with ``managed_urls``, ``cluster`` and ``timeouts``.
        suspects: URLs of those that are taken for stuck whatever they answer.
    """
    managed, gone = service.managed_urls, set(suspects)
    workers = [worker for worker in service.cluster.workers if worker.url in managed]
    asked = [worker for worker in workers if worker.url not in gone]
    gone |= {*silent_at(_asks_schedulers, asked, ALIVE_S)}
    on_gpu = {i.url for i in service.cluster.infos if i.device != "cpu" and i.capabilities.checksum}
    asked = [worker for worker in asked if worker.url in on_gpu - gone]
    gone |= {*silent_at(waits_for_gpu, asked, service.timeouts.control_s)}
    return tuple(worker.url for worker in workers if worker.url in gone)


def stuck_engine(error: BaseException, service: Any) -> str | None:
    """URL of an engine that may answer and is stuck all the same: it joins no new NCCL group.

    Its broadcasts are queued on the GPU behind one that never ends.
    """
    if service.info.device == "cpu" or not isinstance(error, PushTimeoutError):
        return None
    return error.engine if error.step == "init" else None


def silent_at(ask: Ask, workers: Sequence[ControlClient], timeout_s: float) -> list[str]:
    """URLs of the servers that answer nothing within ``timeout_s``, not even an error."""
    asked = {
        in_thread(lambda w=worker: _answers(w, ask, timeout_s), "torchrl_sglang-ask"): worker.url
        for worker in workers
    }
    wait(asked, timeout_s + LAG_S)
    return [url for answer, url in asked.items() if not (answer.done() and answer.result())]


def needs_no_scheduler(worker: ControlClient, timeout_s: float) -> None:
    """Asks what a server answers by itself."""
    worker.get("/model_info", timeout_s=timeout_s)


def _asks_schedulers(worker: ControlClient, timeout_s: float) -> None:
    worker.get("/server_info", timeout_s=timeout_s)


def waits_for_gpu(worker: ControlClient, timeout_s: float) -> None:
    """Asks what every rank answers once its GPU is done with all that it was given.

    Raises:
        ServiceError: as of `ControlClient.post`. A refusal is an answer too.
    """
    with contextlib.suppress(RequestRefusedError):
        worker.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)


def _answers(worker: ControlClient, ask: Ask, timeout_s: float) -> bool:
    try:
        ask(worker, timeout_s)
    except HTTPAnswerError as error:
        return error.status is not None
    except ServiceError:
        return False
    return True
