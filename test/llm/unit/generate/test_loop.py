"""`BackgroundLoop`: blocking calls into one event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from torchrl_sglang.config import Timeouts
from torchrl_sglang.errors import ServiceClosedError
from torchrl_sglang.generate.loop import BackgroundLoop
from torchrl_sglang.servers.attach import Credentials
from torchrl_sglang.servers.members import Servers
from torchrl_sglang.service.local import Local


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    made = BackgroundLoop("test-loop")
    yield made
    made.close()


async def value(result: Any) -> Any:
    await asyncio.sleep(0)
    return result


async def failing(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_results_and_errors_come_back(loop: BackgroundLoop) -> None:
    assert loop.run(value(3)) == 3
    with pytest.raises(KeyError, match="here"):
        loop.run(failing(KeyError("here")))
    assert loop.run(value(4)) == 4


def test_callers_of_many_threads_share_one_loop(loop: BackgroundLoop) -> None:
    barrier = asyncio.Barrier(8)

    async def meet(index: int) -> int:
        async with asyncio.timeout(10.0):
            await barrier.wait()  # passes only if all eight are in flight at once
        return index

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: loop.run(meet(i)), range(8))) == list(range(8))
    assert len(threads_named("test-loop")) == 1


def test_a_blocking_call_from_the_loop_itself_raises(loop: BackgroundLoop) -> None:
    async def nested() -> None:
        loop.run(value(1))

    with pytest.raises(RuntimeError, match="would never end"):
        loop.run(nested())


def test_ctrl_c_cancels_what_is_waited_for(loop: BackgroundLoop) -> None:
    cancelled = threading.Event()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    async def long() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(long())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cancelled.wait(5.0)
    assert loop.run(value(1)) == 1


def in_a_thread(call: Any) -> tuple[threading.Thread, list[BaseException]]:
    """Starts ``call``; its error lands in the list."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def test_closing_frees_callers_that_wait() -> None:
    loop, started = BackgroundLoop("closing"), threading.Event()

    async def long() -> None:
        started.set()
        await asyncio.sleep(60.0)

    thread, errors = in_a_thread(lambda: loop.run(long()))
    assert started.wait(5.0)
    loop.close()
    thread.join(5.0)
    assert [type(error) for error in errors] == [ServiceClosedError]
    assert threads_named("closing") == []


def test_what_others_use_is_closed_after_they_have_ended() -> None:
    loop = BackgroundLoop("test-shared")
    events: list[str] = []

    async def user() -> None:
        try:
            events.append("used")
            await asyncio.sleep(60)
        finally:
            events.append("ended")

    async def close_pool() -> None:
        events.append("closed")

    future = loop.submit(user())
    while not events:
        threading.Event().wait(0.001)
    loop.close(close_pool)
    assert future.cancelled()
    assert events == ["used", "ended", "closed"]


def test_closing_twice_leaves_no_thread() -> None:
    loop = BackgroundLoop("twice")
    loop.run(value(1))
    loop.close()
    loop.close()
    assert threads_named("twice") == []


def test_a_call_after_closing_is_refused() -> None:
    loop = BackgroundLoop("closed")
    loop.close()
    with pytest.raises(ServiceClosedError):
        loop.run(value(1))


def test_a_call_that_comes_while_closing_does_not_wait_for_ever() -> None:
    loop, cancelling, go_on = BackgroundLoop("late"), threading.Event(), threading.Event()
    started = threading.Event()

    async def slow_to_cancel() -> None:
        started.set()
        try:
            await asyncio.sleep(60.0)
        finally:
            cancelling.set()
            await asyncio.get_running_loop().run_in_executor(None, go_on.wait, 10.0)

    async def late() -> None:
        go_on.set()
        await asyncio.sleep(60.0)

    in_a_thread(lambda: loop.run(slow_to_cancel()))
    assert started.wait(5.0)
    closer, _ = in_a_thread(loop.close)
    assert cancelling.wait(5.0)
    caller, errors = in_a_thread(lambda: loop.run(late()))
    while caller.is_alive() and not go_on.is_set():  # until it is refused, or runs
        caller.join(0.01)
    go_on.set()
    closer.join(5.0)
    caller.join(5.0)
    assert [type(error) for error in errors] == [ServiceClosedError]


def test_nothing_is_made_after_the_resources_were_closed() -> None:
    before = threads_named("torchrl_sglang")  # of services that other tests share
    servers = Servers("http://127.0.0.1:9", Credentials(), Timeouts(request_s=1.0))
    local = Local(servers)
    local.close()
    with pytest.raises(ServiceClosedError):
        local.generator.data_plane()
    assert threads_named("torchrl_sglang") == before
