"""Who is named when a push fails: with sockets that stop listening, as a dead server's do."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from torchrl_sglang import Timeouts
from torchrl_sglang.client import ControlClient
from torchrl_sglang.errors import (
    EngineLostError,
    PushError,
    PushTimeoutError,
    RequestRefusedError,
    ServerFailedError,
)
from torchrl_sglang.weights.failure import after_failure, with_its_cause
from torchrl_sglang.weights.sending import WireError
from torchrl_sglang.weights.watch import push_error, watch

Listeners = list[socket.socket]


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    """Three addresses that take connections and never answer."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]


def client(listener: socket.socket) -> ControlClient:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    return ControlClient(url, api_key=None, admin_api_key=None, timeouts=Timeouts())


REFUSED = RequestRefusedError("400: failed to receive weights", status=400)
BROKEN = ServerFailedError("the connection broke")
WIRE = WireError("connection closed by peer")

# What failed, of which engine; which one is gone, and after how long; whether it is to be named.
CASES: dict[str, tuple[Exception, int | None, int | None, float, bool]] = {
    "a broken wire, and a server that ends itself later": (WIRE, None, 1, 1.2, True),
    "a healthy one's refusal": (REFUSED, 0, 2, 1.2, True),
    "a broken connection": (BROKEN, 1, 1, 0.2, True),
    "a broken connection to a server that lives": (BROKEN, 1, None, 0.0, False),
    "a broken wire alone": (WIRE, None, None, 0.0, False),
    "a refusal alone": (REFUSED, 0, None, 0.0, False),
    "the trainer's own mistake": (MemoryError("none left"), None, 1, 0.0, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_engine_that_is_gone_is_named(listeners: Listeners, case: str) -> None:
    cause, failed, gone, after_s, named = CASES[case]
    workers = [client(listener) for listener in listeners]
    engine = workers[failed].url if failed is not None else None
    error = push_error(cause, "transfer", engine, 3)
    if gone is not None:
        threading.Timer(after_s, listeners[gone].close).start()
    begun = time.monotonic()
    found = with_its_cause(error, workers)
    assert time.monotonic() - begun < 3.0
    assert isinstance(found, EngineLostError) == named
    assert isinstance(found, PushError)
    assert found.engine == (workers[gone].url if named and gone is not None else engine)
    assert (found.step, found.bucket) == ("transfer", 3)


def test_the_only_engine_is_not_looked_for_when_it_has_refused(listeners: Listeners) -> None:
    [worker] = [client(listener) for listener in listeners[:1]]
    begun = time.monotonic()
    error = push_error(REFUSED, "transfer", worker.url, 0)
    assert with_its_cause(error, [worker]) is error
    assert time.monotonic() - begun < 0.2


def test_an_engine_that_is_stuck_is_named(listeners: Listeners) -> None:
    """It takes connections and answers nothing; over NCCL nobody outside can free it."""
    workers = [client(listener) for listener in listeners]
    error = PushTimeoutError("no answer within 3 s", step="init", engine=workers[0].url)
    begun = time.monotonic()
    found = after_failure(error, workers)
    assert time.monotonic() - begun < 2.0
    assert type(found) is PushTimeoutError
    assert "has to be started again" in str(found)
    assert all(worker.url in str(found) for worker in workers)


# Several ends at once


def failing(after_s: float, error: Exception) -> Future[None]:
    future: Future[None] = Future()
    threading.Timer(after_s, future.set_exception, [error]).start()
    return future


def test_which_bucket_a_broken_wire_is_put_down_to() -> None:
    waiting: Future[None] = Future()
    wire = failing(0.1, WIRE)
    with pytest.raises(PushError, match="connection closed") as caught:
        watch(
            {waiting: "http://a"},
            step="transfer",
            timeout_s=5.0,
            bucket=4,
            beside=wire,
            bucket_beside=lambda: 1,
        )
    assert (caught.value.engine, caught.value.bucket) == (None, 1)


def test_an_answer_explains_the_wire_that_broke_before_it() -> None:
    answer, wire = failing(0.12, REFUSED), failing(0.1, WIRE)
    with pytest.raises(PushError) as caught:
        watch({answer: "http://a"}, step="transfer", timeout_s=5.0, bucket=4, beside=wire)
    assert (caught.value.engine, caught.value.bucket) == ("http://a", 4)
