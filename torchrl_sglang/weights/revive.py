"""Starting managed servers again that died, or that nothing else gets out of a broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

from ..client import ControlClient
from ..errors import HTTPAnswerError, ServiceError
from ..threads import in_thread
from .checksum import ask_checksums

Ask = Callable[[ControlClient, float], None]

# What is asked is answered in milliseconds by a server whose scheduler lives, paused or not. One
# that computes a long prompt takes longer; one that waits for a GPU that is stuck never answers.
ALIVE_S = 10.0
LAG_S = 1.5  # of a time-out that counts from the connection


def to_revive(service: Any) -> tuple[str, ...]:
    """URLs of the managed servers that don't answer; servers of others are left as they are.

    A scheduler whose GPU is stuck in a broadcast answers until it waits for that GPU. So it is told
    to, and then never answers again: what does not is started again.

    Args:
        service: the servers; anything with ``managed_urls``, ``cluster`` and ``timeouts``.
    """
    managed = service.managed_urls
    workers = [worker for worker in service.cluster.workers if worker.url in managed]
    gone = {*silent_at(_asks_schedulers, workers, ALIVE_S)}
    on_gpu = {i.url for i in service.cluster.infos if i.device != "cpu" and i.capabilities.checksum}
    asked = [worker for worker in workers if worker.url in on_gpu - gone]
    gone |= {*silent_at(waits_for_gpu, asked, service.timeouts.control_s)}
    return tuple(worker.url for worker in workers if worker.url in gone)


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
        ServiceError: there was no answer. That it can't is one.
    """
    try:
        ask_checksums(worker, timeout_s)
    except HTTPAnswerError as error:
        if error.status is None:
            raise


def _answers(worker: ControlClient, ask: Ask, timeout_s: float) -> bool:
    try:
        ask(worker, timeout_s)
    except HTTPAnswerError as error:
        return error.status is not None
    except ServiceError:
        return False
    return True
