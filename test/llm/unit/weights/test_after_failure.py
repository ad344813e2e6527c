"""Who is named when a push fails: with sockets that stop listening, as a dead server's do."""

from __future__ import annotations

import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from torchrl_sglang import Timeouts
from torchrl_sglang.errors import (
    EngineLostError,
    PushError,
    PushTimeoutError,
    RequestRefusedError,
    ServerFailedError,
)
from torchrl_sglang.servers.control import ControlClient
from torchrl_sglang.servers.together import push_error
from torchrl_sglang.weights.after_failure import after_failure, forget_frames, with_its_cause
from torchrl_sglang.weights.carry.group import WireError


class Address(ThreadingHTTPServer):
    """Something that answers, that takes connections and says nothing, or that is gone."""

    def __init__(self) -> None:
        self.silent = threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has left."""

    def end(self) -> None:
        self.shutdown()
        self.server_close()

    @property
    def client(self) -> ControlClient:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return ControlClient(url, api_key=None, admin_api_key=None, timeouts=Timeouts())


class Answer(BaseHTTPRequestHandler):
    server: Address

    def do_GET(self) -> None:
        if self.server.silent.is_set():
            time.sleep(3.0)
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def addresses() -> Iterator[list[Address]]:
    made = [Address() for _ in range(3)]
    yield made
    for address in made:
        address.end()


REFUSED = RequestRefusedError("400: failed to receive weights", status=400)

BROKEN = ServerFailedError("the connection broke")

WIRE = WireError("connection closed by peer")


# What failed, of which engine; which one stops what (None: nothing), and after how long.
CASES: dict[str, tuple[Exception, int | None, tuple[int, str, float] | None, bool]] = {
    "a broken wire, and a server that ends itself": (WIRE, None, (1, "end", 0.5), True),
    "a broken wire, and a server that says no more": (WIRE, None, (1, "say", 0.5), True),
    "a healthy one's refusal": (REFUSED, 0, (2, "end", 0.5), True),
    "a healthy one's refusal, and one that says no more": (REFUSED, 0, (2, "say", 0.5), True),
    "a broken connection": (BROKEN, 1, (1, "end", 0.05), True),
    "a broken connection to another": (BROKEN, 1, (2, "end", 0.0), True),
    "a broken connection to a server that lives": (BROKEN, 1, None, False),
    "a broken wire alone": (WIRE, None, None, False),
    "a refusal alone": (REFUSED, 0, None, False),
    "the trainer's own mistake": (MemoryError("none left"), None, (1, "end", 0.0), False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_engine_that_is_gone_is_named(addresses: list[Address], case: str) -> None:
    cause, failed, stops, named = CASES[case]
    workers = [address.client for address in addresses]
    engine = workers[failed].url if failed is not None else None
    error = push_error(cause, "transfer", engine, 3)
    if stops is not None:
        number, what, after_s = stops
        address = addresses[number]
        threading.Timer(after_s, address.end if what == "end" else address.silent.set).start()
        engine = workers[number].url if named else engine
    begun = time.monotonic()
    found = with_its_cause(error, workers)
    assert time.monotonic() - begun < 3.5
    assert isinstance(found, EngineLostError) == named
    assert isinstance(found, PushError)
    assert (found.engine, found.step, found.bucket) == (engine, "transfer", 3)


def test_where_several_say_nothing_none_is_blamed(addresses: list[Address]) -> None:
    for address in addresses[:2]:
        address.silent.set()
    error = push_error(WIRE, "transfer", None, 0)
    assert with_its_cause(error, [address.client for address in addresses]) is error


def test_the_only_engine_is_not_looked_for_when_it_has_refused(addresses: list[Address]) -> None:
    worker = addresses[0].client
    begun = time.monotonic()
    error = push_error(REFUSED, "transfer", worker.url, 0)
    assert with_its_cause(error, [worker]) is error
    assert time.monotonic() - begun < 0.5


def test_an_engine_that_is_stuck_is_named(addresses: list[Address]) -> None:
    """It takes connections and answers nothing; over NCCL nobody outside can free it."""
    workers = [address.client for address in addresses]
    addresses[0].silent.set()
    error = PushTimeoutError("no answer within 3 s", step="init", engine=workers[0].url)
    begun = time.monotonic()
    found = after_failure(error, workers)
    assert time.monotonic() - begun < 2.5
    assert type(found) is PushTimeoutError
    assert f"({workers[0].url} gave no answer afterwards either" in str(found)
    assert "has to be started again" in str(found)


class Large:
    """Something that a frame holds."""


def holding() -> None:
    held = Large()
    alive.append(weakref.ref(held))
    raise ValueError("the cause")


alive: list[weakref.ref[Large]] = []


def failing_push() -> None:
    held = Large()
    alive.append(weakref.ref(held))
    try:
        holding()
    except ValueError as error:
        raise PushError("failed", step="transfer") from error


def test_an_error_that_is_kept_holds_nothing_else() -> None:
    alive.clear()
    with pytest.raises(PushError) as caught:
        failing_push()
    assert all(reference() is not None for reference in alive)
    forget_frames(caught.value)
    assert [reference() for reference in alive] == [None, None]
    assert "holding" in "".join(traceback.format_exception(caught.value))
