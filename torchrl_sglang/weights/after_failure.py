"""Pauses all servers after a push that failed, and finds out who is gone."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from functools import partial

from ..errors import EngineLostError, PushError
from ..servers.control import ControlClient
from ..servers.health import silent_at
from ..servers.threads import in_thread
from ..servers.together import Answers, ask_all, broke_connection
from .carry.group import WireError

DYING_S = 0.5  # a process that dies closes its listener last
DYING_POLL_S = 0.1
# A server whose scheduler died notices within a second. From then on it answers nothing, but goes
# on listening for five seconds more.
NOTICE_S = 1.2
ANSWER_S = 1.5
LIVENESS_S = 1.5  # how long a server has to say that it lives, and to pause again
STUCK = (
    "gave no answer afterwards either. If it is stuck, in a broadcast that ended without it for "
    "instance, it has to be started again: the next push does so, where this process started it"
)


def after_failure(
    error: BaseException, workers: Sequence[ControlClient], *, in_session: bool = False
) -> BaseException:
    """Pauses all servers again, and finds out whether the one that failed is gone.

    A server may have gone on already, when another failed to. Takes `LIVENESS_S` at most, and where
    a broadcast broke `NOTICE_S` more.

    Args:
        error: what failed.
        workers: all servers.
        in_session: an update session may be open, which is closed.

    Returns:
        The error, or an `EngineLostError` where nothing answers at an engine's address any more. It
        says so if an engine that lives does not answer the pause.
    """

    def pause(server: ControlClient) -> None:
        server.pause("retract", LIVENESS_S)
        if in_session:
            server.end(LIVENESS_S)

    ask = partial(ask_all, workers, pause, within_s=LIVENESS_S)
    pauses = in_thread(ask, "torchrl_sglang-pause")
    error = with_its_cause(error, workers)
    answers = pauses.result()
    if isinstance(error, PushError):
        _add_stuck(error, answers)
    return error


def forget_frames(error: BaseException | None) -> None:
    """Lets go of the variables that an error's tracebacks keep, buckets among them.

    The error itself may be kept for long, by the service that it has broken.
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def with_its_cause(error: BaseException, workers: Sequence[ControlClient]) -> BaseException:
    """The error, or an `EngineLostError` where nothing answers at an engine's address any more.

    Where a broadcast broke, or an engine refused it, another engine's death may be behind it.
    """
    if not isinstance(error, PushError):
        return error
    failed = [server for server in workers if server.url == error.engine]
    others = [server for server in workers if server.url != error.engine]
    lost = None
    if failed and broke_connection(error):
        lost = _first_gone([*failed, *others], DYING_S)
    elif error.step == "transfer" and _may_be_anothers(error):
        lost = _first_silent(others)
    return error if lost is None else EngineLostError.of(error, lost)


def _may_be_anothers(error: PushError) -> bool:
    return error.engine is not None or isinstance(error.__cause__, WireError)


def _first_gone(workers: Sequence[ControlClient], within_s: float) -> str | None:
    """URL of the first at which nothing listens any more."""
    deadline = time.monotonic() + within_s
    while workers and time.monotonic() < deadline:
        for server in workers:
            if not server.listens(LIVENESS_S):
                return server.url
        time.sleep(DYING_POLL_S)
    return None


def _first_silent(workers: Sequence[ControlClient]) -> str | None:
    """URL of the one that answers nothing once it has noticed that a part of it died.

    What is asked needs no scheduler: one that is stuck in a broadcast answers it. Where several are
    silent, which one it is isn't known, unless nothing listens at its address.
    """
    begun = time.monotonic()
    while workers:
        if lost := next((w.url for w in workers if not w.listens(LIVENESS_S)), None):
            return lost
        asked_last = time.monotonic() - begun > NOTICE_S
        silent = silent_at(ControlClient.model_info, workers, ANSWER_S)
        if silent:
            return silent[0] if len(silent) == 1 else None
        if asked_last:
            return None
        time.sleep(DYING_POLL_S)
    return None


def _add_stuck(error: PushError, pauses: Answers[None]) -> None:
    """Has the message name the engines that live and don't answer."""
    lost = error.engine if isinstance(error, EngineLostError) else None
    late = [server for server, each in pauses.failures.items() if isinstance(each, TimeoutError)]
    silent = [server.url for server in late if server.url != lost]
    if silent:
        error.args = (f"{error.args[0]} ({', '.join(silent)} {STUCK}.)",)
