"""Waiting for several ends of one step at once: the first failure ends the wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from ..errors import ConnectError, PushError, PushTimeoutError, ServerFailedError, SGLangError

# How long an engine's answer may lag behind the broken broadcast that it explains.
ENGINE_LAG_S = 0.05


def watch(
    futures: Mapping[Future[Any], str | None],
    *,
    step: str,
    timeout_s: float,
    bucket: int | None = None,
    beside: Future[Any] | None = None,
    bucket_beside: Callable[[], int] | None = None,
) -> None:
    """Returns when all futures are done; raises at the first that failed, or in time.

    Args:
        futures: what to wait for, and the engine behind each (None is the trainer).
        step: name for the error.
        timeout_s: bound on all of them together.
        bucket: index for the error.
        beside: something of the trainer's whose failure counts, but whose end is not waited for.
        bucket_beside: where that one is, for the error.

    Raises:
        PushError: one failed; an engine's failure is preferred to the trainer's, which follows it.
        PushTimeoutError: not all were done in time.
    """
    deadline = time.monotonic() + timeout_s
    pending = set(futures)
    watched = pending | ({beside} if beside is not None else set())
    while pending:
        done, watched = wait(watched, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        pending -= done
        failed = [future for future in done if future.exception() is not None]
        if failed and all(futures.get(future) is None for future in failed):
            # The trainer's end often breaks because an engine's did: its answer says why.
            late, _ = wait(pending, ENGINE_LAG_S)
            failed = [future for future in late if future.exception() is not None] or failed
        if failed:
            first = min(failed, key=lambda future: futures.get(future) is None)
            if first is beside and bucket_beside is not None:
                bucket = bucket_beside()
            raise push_error(first.exception(), step, futures.get(first), bucket)
        if not done:
            late_engine = next(filter(None, map(futures.get, pending)), None)
            raise PushTimeoutError(
                f"no answer within {timeout_s:g} s", step=step, engine=late_engine, bucket=bucket
            )


def push_error(
    error: BaseException | None, step: str, engine: str | None, bucket: int | None = None
) -> PushError:
    """What a failure means for a push."""
    kind = PushTimeoutError if isinstance(error, TimeoutError) else PushError
    said = str(error) if isinstance(error, SGLangError) else f"{type(error).__name__}: {error}"
    made = kind(said, step=step, engine=engine, bucket=bucket)
    made.__cause__ = error
    return made


def broke_connection(error: BaseException | None) -> bool:
    """Whether an engine did not answer at all, as one does that has died."""
    cause = error.__cause__ if isinstance(error, PushError) else error
    no_status = isinstance(cause, ServerFailedError) and cause.status is None
    return isinstance(cause, ConnectError | PushTimeoutError) or no_status
