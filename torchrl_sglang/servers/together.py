"""Orders to every server of a service at once, over connections that stay open."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

from ..errors import (
    ConnectError,
    PushError,
    PushTimeoutError,
    RequestRefusedError,
    ServerFailedError,
    ServiceError,
    SGLangError,
)
from .control import ControlClient
from .health import waits_for_gpu
from .info import WorkerInfo

Call = Callable[[ControlClient], Any]

# How long a session that somebody else opened is waited for, before it is taken for a dead one's.
TAKE_OVER_S = 1.0
TAKE_OVER_POLL_S = 0.05


class Courier:
    """Makes calls to one server in a thread of its own, one after another and in order.

    A connection belongs to a thread, so this one's stays open between calls. Nothing waits for the
    thread at the interpreter's exit; it ends with the courier, after the call that it is in.
    """

    def __init__(self, worker: ControlClient) -> None:
        self.url = worker.url
        self._orders: queue.SimpleQueue[tuple[Call, Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(
            target=_carry_out,
            args=(worker, self._orders),
            name="torchrl_sglang-courier",
            daemon=True,
        ).start()
        self._end = weakref.finalize(self, self._orders.put, None)

    def send(self, call: Call) -> Future[Any]:
        """Queues a call."""
        future: Future[Any] = Future()
        self._orders.put((call, future))
        return future

    def close(self) -> None:
        """Ends the thread once its calls are over; harmless twice."""
        self._end()


def _carry_out(
    worker: ControlClient, orders: queue.SimpleQueue[tuple[Call, Future[Any]] | None]
) -> None:
    while (order := orders.get()) is not None:
        call, future = order
        try:
            future.set_result(call(worker))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        del order, call, future


def _begin(timeout_s: float, worker: ControlClient) -> None:
    deadline, waited = time.monotonic() + TAKE_OVER_S, False
    while not _opens(timeout_s, worker):
        waited = True
        if time.monotonic() > deadline:
            worker.end(timeout_s)
            worker.begin(timeout_s)
            return
        time.sleep(TAKE_OVER_POLL_S)
    if waited:
        # Its trainer goes on with the version and lets the server go, in the middle of this push.
        worker.end(timeout_s)
        raise ServiceError(
            "another process was pushing to this server: one trainer at a time can, and its push "
            "and this one may both be incomplete. Push again once the other has stopped."
        )


def _opens(timeout_s: float, worker: ControlClient) -> bool:
    try:
        worker.begin(timeout_s)
    except RequestRefusedError:
        return False
    return True


class Engines:
    """The servers that a push goes to.

    Args:
        workers: a client per server.
        infos: what each says of itself, in the same order.
        timeout_s: bound on one order.
        step_s: bound on one of those that take milliseconds; the same by default.
    """

    def __init__(
        self,
        workers: Sequence[ControlClient],
        infos: Sequence[WorkerInfo],
        timeout_s: float,
        step_s: float | None = None,
    ) -> None:
        self.workers = tuple(workers)
        self.infos = tuple(infos)
        self.timeout_s = timeout_s
        self.step_s = min(timeout_s, step_s or timeout_s)
        self._couriers: list[Courier] = []

    @property
    def has_session(self) -> bool:
        """Whether updates go between begin and end."""
        return all(info.capabilities.update_session for info in self.infos)

    @property
    def has_salts(self) -> bool:
        """Whether requests can be kept from prefixes of other weights."""
        return all(info.capabilities.cache_salt for info in self.infos)

    def ask(self, call: Call) -> dict[Future[Any], str | None]:
        """Makes a call to every server; the answers, and whose each is."""
        if not self._couriers:
            self._couriers = [Courier(worker) for worker in self.workers]
        return {courier.send(call): courier.url for courier in self._couriers}

    def do(self, step: str, call: Call, timeout_s: float | None = None) -> None:
        """Makes a call to every server and waits for all.

        Raises:
            PushError: the first that failed; names the step and the engine.
        """
        watch(self.ask(call), step=step, timeout_s=timeout_s or self.timeout_s)

    def collect(self, step: str, call: Call, timeout_s: float | None = None) -> list[Any]:
        """What every server answers to a call, in the servers' order; errors as in `do`."""
        asked = self.ask(call)
        watch(asked, step=step, timeout_s=timeout_s or self.timeout_s)
        return [answer.result() for answer in asked]

    def pause(self, step: str, mode: str) -> None:
        """Pauses every server; errors as in `do`, under the name of a step."""
        self.do(step, lambda worker: worker.pause(mode, self.step_s), self.step_s)

    def resume(self) -> None:
        """Has every server go on; errors as in `do`."""
        self.do("continue", lambda worker: worker.resume(self.step_s), self.step_s)

    def check_allowed(self, method: str) -> None:
        """Finds out whether servers let this process carry weights so, see `ControlClient`.

        Raises:
            PushError: a server refuses the key, or has no such route.
        """
        self.do("connect", lambda w: w.check_allowed(method, self.step_s), self.step_s)

    def begin(self) -> None:
        """Opens an update session where servers have them; errors as in `do`.

        One that a trainer left open when it died is taken over. It looks like that of a trainer
        which pushes in this moment, but that one ends its session soon.

        Raises:
            PushError: also where another process has pushed meanwhile.
        """
        if self.has_session:
            self.do("begin", partial(_begin, self.step_s), self.step_s + TAKE_OVER_S)

    def end(self, timeout_s: float | None = None) -> None:
        """Closes the update session; errors as in `do`."""
        within_s = timeout_s or self.timeout_s
        if self.has_session:
            self.do("end", lambda worker: worker.end(within_s), within_s)

    def flush(self) -> bool:
        """Empties the prefix caches of paused servers; whether all are empty now.

        Servers before 0.5.23 refuse it while retracted requests wait, which they do until the push
        is over. The salts then keep requests of the new version away from old prefixes.

        Raises:
            PushError: a server failed, or refused where it should not.
        """
        may_refuse = self.has_salts and not self.has_session
        refused: list[str] = []

        def flush(worker: ControlClient) -> None:
            try:
                worker.flush(self.step_s)
            except RequestRefusedError:
                if not may_refuse:
                    raise
                refused.append(worker.url)

        self.do("flush", flush, self.step_s)
        return not refused

    def wait_for_gpus(self, step: str) -> None:
        """Returns once every GPU is done with what it was given, where servers tell.

        One that is stuck in a broadcast takes part in new groups, and does nothing of what comes
        after: it is found out here, or by whatever waits for it next.

        Raises:
            PushError: a server failed, or did not get done in time.
        """
        if not all(info.capabilities.checksum for info in self.infos):
            return
        try:
            self.do(step, lambda worker: waits_for_gpu(worker, self.timeout_s))
        except PushTimeoutError as error:
            raise PushTimeoutError(
                f"its GPU did not get done within {self.timeout_s:g} s with what it was given "
                "before. If it is stuck, as in the broadcast of a trainer that died, it has to be "
                "started again: connecting and repairing do so, where this process started it.",
                step=step,
                engine=error.engine,
            ) from error

    def set_version(self, version: int) -> None:
        """Tells every server the number of its weights; errors as in `do`."""
        number, step_s = str(version), self.step_s
        self.do("version", lambda worker: worker.set_version(number, step_s), step_s)

    def close(self) -> None:
        """Lets go of the threads; one that hangs in a call is left behind. Harmless twice."""
        couriers, self._couriers = self._couriers, []
        for courier in couriers:
            courier.close()


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
