"""Tells which servers answer nothing, wait for a stuck GPU, or are paused."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from ..errors import (
    HTTPAnswerError,
    RequestRefusedError,
    RequestTimeoutError,
    ServerFailedError,
    ServiceError,
)
from .attach import QUESTION
from .control import ControlClient
from .info import WorkerInfo
from .together import ask_all

Ask = Callable[[ControlClient, float], None]

# What is asked is answered in milliseconds by a server whose scheduler lives, paused or not. One
# that computes a long prompt takes longer; one that waits for a GPU that is stuck never answers.
ALIVE_S = 10.0
LAG_S = 1.5  # of a time-out that counts from the connection
REFUSAL_S = 2.0  # how long a server that is not paused takes at most to refuse a request


def lifeless(
    workers: Sequence[ControlClient], infos: Sequence[WorkerInfo], timeout_s: float
) -> tuple[str, ...]:
    """URLs of the servers that don't answer, or that wait for a GPU that is stuck.

    A scheduler whose GPU is stuck in a broadcast answers until it waits for that GPU. So it is told
    to, and then never answers again.

    Args:
        workers: the servers that are asked.
        infos: what servers said of themselves, these and others.
        timeout_s: bound on waiting for GPUs.
    """
    gone = {*silent_at(ControlClient.server_info, workers, ALIVE_S)}
    on_gpu = {info.url for info in infos if info.device != "cpu" and info.capabilities.checksum}
    asked = [server for server in workers if server.url in on_gpu - gone]
    gone |= {*silent_at(waits_for_gpu, asked, timeout_s)}
    return tuple(server.url for server in workers if server.url in gone)


def silent_at(ask: Ask, workers: Sequence[ControlClient], timeout_s: float) -> list[str]:
    """URLs of the servers that answer nothing within ``timeout_s``, not even an error."""
    answers = ask_all(
        workers, lambda server: _answers(server, ask, timeout_s), within_s=timeout_s + LAG_S
    )
    return [server.url for server in workers if not answers.given.get(server)]


def waits_for_gpu(server: ControlClient, timeout_s: float) -> None:
    """Asks what every rank answers once its GPU is done with all that it was given.

    Raises:
        ServiceError: there was no answer. That it can't is one.
    """
    try:
        server.checksums(timeout_s)
    except HTTPAnswerError as error:
        if error.status is None:
            raise


def _answers(server: ControlClient, ask: Ask, timeout_s: float) -> bool:
    try:
        ask(server, timeout_s)
    except HTTPAnswerError as error:
        return error.status is not None
    except ServiceError:
        return False
    return True


class Looks(enum.Enum):
    """What a server looks like from outside.

    ``SILENT``: it takes connections and answers nothing, as SGLang does for a minute or more after
    a process of its own has crashed.
    """

    ANSWERS = "answers"
    PAUSED = "paused"
    SILENT = "silent"


def is_paused(server: ControlClient) -> bool:
    """Whether a server is paused, see `looks_of`."""
    return looks_of(server) is Looks.PAUSED


def looks_of(server: ControlClient) -> Looks:
    """What a server looks like. Takes up to two times `REFUSAL_S` if it is paused.

    SGLang says since 0.5.20 whether it is ready, which a server that works on a long prompt may not
    be either. So one that is not has to refuse a request, which takes no scheduler and no GPU, but
    waits for the end of a pause.
    """
    try:
        server.ready(REFUSAL_S)
    except RequestTimeoutError:
        return Looks.SILENT
    except (RequestRefusedError, ServerFailedError):
        pass
    except ServiceError:
        return Looks.ANSWERS  # or it is gone, which its requests find out
    else:
        return Looks.ANSWERS
    try:
        server.score(QUESTION, REFUSAL_S)
    except RequestTimeoutError:
        return Looks.PAUSED
    except ServiceError:
        pass
    return Looks.ANSWERS
