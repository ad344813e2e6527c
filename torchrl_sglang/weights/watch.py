"""Waiting for several ends of one step at once: the first failure ends the wait."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from ..errors import PushError, PushTimeoutError, SGLangError

# How long an engine's answer may lag behind the broken broadcast that it explains.
ENGINE_LAG_S = 0.05


def watch(
    futures: Mapping[Future[Any], str | None],
    *,
    step: str,
    timeout_s: float,
    bucket: int | None = None,
) -> None:
    """Returns when all futures are done; raises at the first that failed, or in time.

    Args:
        futures: what to wait for, and the engine behind each (None is the trainer).
        step: name for the error.
        timeout_s: bound on all of them together.
        bucket: index for the error.

    Raises:
        PushError: one failed; an engine's failure is preferred to the trainer's, which follows it.
        PushTimeoutError: not all were done in time.
    """
    deadline = time.monotonic() + timeout_s
    pending = set(futures)
    while pending:
        done, pending = wait(pending, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        failed = [future for future in done if future.exception() is not None]
        if failed and all(futures[future] is None for future in failed):
            # The trainer's end often breaks because an engine's did: its answer says why.
            late, pending = wait(pending, ENGINE_LAG_S)
            failed = [future for future in late if future.exception() is not None] or failed
        if failed:
            first = min(failed, key=lambda future: futures[future] is None)
            raise _push_error(first.exception(), step, futures[first], bucket)
        if not done:
            late_engine = next(futures[future] for future in pending)
            raise PushTimeoutError(
                f"no answer within {timeout_s:g} s", step=step, engine=late_engine, bucket=bucket
            )


def _push_error(
    error: BaseException | None, step: str, engine: str | None, bucket: int | None
) -> PushError:
    kind = PushTimeoutError if isinstance(error, TimeoutError) else PushError
    said = str(error) if isinstance(error, SGLangError) else f"{type(error).__name__}: {error}"
    made = kind(said, step=step, engine=engine, bucket=bucket)
    made.__cause__ = error
    return made
