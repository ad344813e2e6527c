"""The batcher: calls of many threads run together, and every wait can be ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from helpers.servers import wait_until
from helpers.threads import in_threads
from torchrl_sglang.errors import ServerFailedError, ServiceError
from torchrl_sglang.policy.batching import Batcher, BatchingConfig

Done = Callable[[int, int | BaseException], None]


def double(items: list[int], done: Done) -> None:
    for index, item in enumerate(items):
        done(index, 2 * item)


def test_every_item_runs_once_under_load() -> None:
    runs: list[list[int]] = []

    def run(items: list[int], done: Done) -> None:
        runs.append(items)
        time.sleep(0.001)
        double(items, done)

    batcher = Batcher(run, BatchingConfig(min_size=7, max_size=20, timeout_s=0.02))
    calls = [lambda i=i: batcher.call(i, 1 + i % 5) for i in range(300)]
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda call: call(), calls))
    assert results == [2 * i for i in range(300)]
    assert sorted(item for run_items in runs for item in run_items) == list(range(300))
    assert all(sum(1 + i % 5 for i in run_items) <= 20 for run_items in runs)
    assert batcher.counts()[0] == 0


def test_a_batch_that_forgets_somebody_leaves_nobody_waiting() -> None:
    batcher = Batcher(lambda items, done: done(0, 1), BatchingConfig(min_size=2, timeout_s=30.0))
    futures = in_threads([lambda i=i: batcher.call(i, 1) for i in range(2)])
    assert {type(future.exception()) for future in futures} <= {ServiceError, type(None)}
    assert any(isinstance(future.exception(), ServiceError) for future in futures)


def test_an_exception_in_the_thread_that_runs_reaches_everybody() -> None:
    def fail(items: list[int], done: Done) -> None:
        raise ServerFailedError("gone")

    batcher = Batcher(fail, BatchingConfig(min_size=3, timeout_s=30.0))
    for future in in_threads([lambda i=i: batcher.call(i, 1) for i in range(3)]):
        assert isinstance(future.exception(), ServerFailedError)


@pytest.fixture
def interruptible() -> Any:
    """SIGUSR1 in the main thread is what Ctrl-C is."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_while_running_does_not_look_like_ctrl_c_elsewhere(interruptible: None) -> None:
    def run(items: list[int], done: Done) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(10.0)
        double(items, done)

    batcher = Batcher(run, BatchingConfig(min_size=2, timeout_s=30.0))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(batcher.call, 1, 1)
        wait_until(lambda: batcher.counts()[0] == 1)
        with pytest.raises(KeyboardInterrupt):
            batcher.call(2, 1)
        with pytest.raises(ServiceError, match="call again"):
            other.result(5.0)


def test_ctrl_c_while_waiting_leaves_nothing_behind(interruptible: None) -> None:
    """Nobody runs what nobody waits for."""
    runs: list[list[int]] = []

    def run(items: list[int], done: Done) -> None:
        runs.append(items)
        double(items, done)

    batcher = Batcher(run, BatchingConfig(min_size=2, timeout_s=30.0))

    def interrupt() -> None:
        wait_until(lambda: batcher.counts()[0] == 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            batcher.call(1, 1)
    assert batcher.counts()[0] == 0
    for future in in_threads([lambda i=i: batcher.call(i, 1) for i in (2, 3)]):
        future.result(5.0)
    assert [sorted(items) for items in runs] == [[2, 3]]


def test_who_is_served_by_another_does_not_wait_for_his_own_time() -> None:
    batcher = Batcher(double, BatchingConfig(min_size=100, timeout_s=2.0))
    start, ends = time.monotonic(), {}

    def call(item: int, after_s: float) -> None:
        time.sleep(after_s)
        assert batcher.call(item, 1) == 2 * item
        ends[item] = time.monotonic() - start

    in_threads([lambda: call(1, 0.0), lambda: call(2, 1.0)])
    assert 2.0 <= ends[1] < 2.9
    assert 2.0 <= ends[2] < 2.9


def test_a_timeout_of_zero_waits_for_nobody() -> None:
    batcher = Batcher(double, BatchingConfig(min_size=100, timeout_s=0.0))
    start = time.monotonic()
    assert batcher.call(4, 1) == 8
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("run", [True, False])
def test_every_wait_can_be_ended(run: bool) -> None:
    """What waits is run now, or fails; what is being run goes on; later calls wait as ever."""
    may_end = threading.Event()

    def slowly(items: list[int], done: Done) -> None:
        if 0 in items:
            may_end.wait(10.0)
        double(items, done)

    batcher = Batcher(slowly, BatchingConfig(min_size=4, timeout_s=30.0))
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(batcher.call, 0, 4)
        wait_until(lambda: batcher.counts() == (0, 1))
        waiting = [pool.submit(batcher.call, item, 1) for item in (1, 2)]
        wait_until(lambda: batcher.counts() == (2, 3))
        batcher.release(run=run)
        for item, future in zip((1, 2), waiting, strict=True):
            if run:
                assert future.result(5.0) == 2 * item
            else:
                with pytest.raises(ServiceError, match="cleanup_batching"):
                    future.result(5.0)
        wait_until(lambda: batcher.counts() == (0, 1))
        assert not running.done()
        later = pool.submit(batcher.call, 3, 1)
        wait_until(lambda: batcher.counts() == (1, 2))
        may_end.set()
        assert running.result(5.0) == 0
        assert not later.done()
        batcher.release(run=True)
        assert later.result(5.0) == 6
    assert batcher.counts() == (0, 0)
