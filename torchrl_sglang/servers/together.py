"""Asks something of many servers at once; each function is one rule for those that fail.

- `ask_all`: a server that fails, or is late, keeps no other's answer back.
- `order_all`: every server has the order, and then the first failure is raised.
- `tell_all`: nobody waits for an answer.
- `watch`: the first failure ends the wait at once; `Courier`s carry such orders.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ..errors import (
    ConnectError,
    HTTPAnswerError,
    PushError,
    PushTimeoutError,
    RequestTimeoutError,
    ServerFailedError,
    ServiceError,
    SGLangError,
)
from .control import ControlClient
from .threads import in_thread

T = TypeVar("T")
Order = Callable[[ControlClient], T]


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What servers answered, in the order in which they were named.

    Attributes:
        given: the answers.
        failures: the errors of those that gave none.
    """

    given: Mapping[ControlClient, T]
    failures: Mapping[ControlClient, ServiceError]

    def all(self) -> list[T]:
        """Every answer.

        Raises:
            ServiceError: the first that failed; names the others that did.
        """
        if not self.failures:
            return [*self.given.values()]
        error, *_ = self.failures.values()
        _, *others = (server.url for server in self.failures)
        if not others:
            raise error
        raise retold(error, f"{error}; {', '.join(others)} failed too") from error


E = TypeVar("E", bound=ServiceError)


def retold(error: E, message: str) -> E:
    """The same error in other words."""
    if isinstance(error, HTTPAnswerError):
        return type(error)(message, status=error.status, body=error.body)
    return type(error)(message)


def ask_all(
    servers: Sequence[ControlClient], order: Order[T], *, within_s: float | None = None
) -> Answers[T]:
    """Asks all servers at once and waits for every one of them.

    Args:
        servers: who is asked.
        order: asks one; a `ServiceError` is its failure, anything else is raised.
        within_s: bound on waiting for all; None where each answer has one. Who is late has failed.
    """
    asked = {s: in_thread(partial(order, s), "torchrl_sglang-ask") for s in servers}
    wait(asked.values(), within_s)
    given: dict[ControlClient, T] = {}
    failures: dict[ControlClient, ServiceError] = {}
    for server, answer in asked.items():
        if not answer.done():
            failures[server] = RequestTimeoutError(f"no answer within {within_s:g} s")
            continue
        try:
            given[server] = answer.result()
        except ServiceError as error:
            failures[server] = error
    return Answers(given, failures)


def order_all(servers: Sequence[ControlClient], order: Order[T]) -> list[T]:
    """Gives all servers an order at once; what each answers.

    Raises:
        ServiceError: the first that failed; the others have the order all the same.
    """
    return ask_all(servers, order).all()


def tell_all(servers: Sequence[ControlClient], order: Order[Any]) -> None:
    """Gives all servers an order whose answers nothing waits for."""
    for server in servers:
        in_thread(partial(order, server), "torchrl_sglang-tell")


class Courier:
    """Makes calls to one server in a thread of its own, one after another and in order.

    A connection belongs to a thread, so this one's stays open between calls. Nothing waits for the
    thread at the interpreter's exit; it ends with the courier, after the call that it is in.
    """

    def __init__(self, server: ControlClient) -> None:
        self.url = server.url
        self._orders: queue.SimpleQueue[tuple[Order[Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(
            target=_carry_out,
            args=(server, self._orders),
            name="torchrl_sglang-courier",
            daemon=True,
        ).start()
        self._end = weakref.finalize(self, self._orders.put, None)

    def send(self, call: Order[Any]) -> Future[Any]:
        """Queues a call."""
        future: Future[Any] = Future()
        self._orders.put((call, future))
        return future

    def close(self) -> None:
        """Ends the thread once its calls are over; harmless twice."""
        self._end()


def _carry_out(
    server: ControlClient, orders: queue.SimpleQueue[tuple[Order[Any], Future[Any]] | None]
) -> None:
    while (order := orders.get()) is not None:
        call, future = order
        try:
            future.set_result(call(server))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        del order, call, future


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
