"""Orders to every server of a service at once, over connections that stay open."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from ..client import ControlClient
from ..errors import RequestRefusedError
from ..info import WorkerInfo
from .watch import watch

Call = Callable[[ControlClient], Any]


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


class Engines:
    """The servers that a push goes to.

    Args:
        workers: a client per server.
        infos: what each says of itself, in the same order.
        timeout_s: bound on one order.
    """

    def __init__(
        self, workers: Sequence[ControlClient], infos: Sequence[WorkerInfo], timeout_s: float
    ) -> None:
        self.workers = tuple(workers)
        self.infos = tuple(infos)
        self.timeout_s = timeout_s
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

    def post(self, step: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Posts to every server; errors as in `do`."""
        self.do(step, lambda worker: worker.post(path, body, timeout_s=self.timeout_s))

    def begin(self) -> None:
        """Opens an update session where servers have them; errors as in `do`."""
        if not self.has_session:
            return

        def begin(worker: ControlClient) -> None:
            try:
                worker.post("/begin_weight_update")
            except RequestRefusedError:
                # A trainer that died left its session open.
                worker.post("/end_weight_update")
                worker.post("/begin_weight_update")

        self.do("begin", begin)

    def end(self) -> None:
        """Closes the update session; errors as in `do`."""
        if self.has_session:
            self.post("end", "/end_weight_update")

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
                worker.post("/flush_cache")
            except RequestRefusedError:
                if not may_refuse:
                    raise
                refused.append(worker.url)

        self.do("flush", flush)
        return not refused

    def set_version(self, version: int) -> None:
        """Tells every server the number of its weights; errors as in `do`."""
        body = {"new_version": str(version), "abort_all_requests": False}
        self.post("version", "/update_weight_version", body)

    def close(self) -> None:
        """Lets go of the threads; one that hangs in a call is left behind. Harmless twice."""
        couriers, self._couriers = self._couriers, []
        for courier in couriers:
            courier.close()
