"""`UpdateGate`: requests wait while weights change, and no longer."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from helpers.servers import wait_until
from torchrl_sglang import ServiceState
from torchrl_sglang.errors import RequestTimeoutError, ServiceBrokenError, ServiceClosedError
from torchrl_sglang.servers import gate as gate_module
from torchrl_sglang.servers.gate import UpdateGate


@pytest.fixture
def gate() -> UpdateGate:
    return UpdateGate()


def waiting(gate: UpdateGate) -> queue.Queue[Any]:
    """Starts a caller; what became of it arrives in the queue."""
    results: queue.Queue[Any] = queue.Queue()

    def call() -> None:
        try:
            results.put(gate.wait_until_open(30.0))
        except Exception as error:  # noqa: BLE001
            results.put(error)

    threading.Thread(target=call, daemon=True).start()
    return results


def test_open_at_first(gate: UpdateGate) -> None:
    assert gate.state is ServiceState.SYNCED
    gate.wait_until_open(0.0)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda gate: gate.commit(), int),
        (lambda gate: gate.fail(OSError("cable")), ServiceBrokenError),
        (lambda gate: gate.close(), ServiceClosedError),
    ],
    ids=["commit", "fail", "close"],
)
def test_callers_wait_for_the_end_of_an_update(
    gate: UpdateGate, end: Callable[[UpdateGate], None], kind: type
) -> None:
    gate.begin()
    callers = [waiting(gate) for _ in range(3)]
    with pytest.raises(queue.Empty):
        callers[0].get(timeout=0.1)
    end(gate)
    assert all(isinstance(caller.get(timeout=5.0), kind) for caller in callers)


def test_an_update_that_takes_too_long(gate: UpdateGate) -> None:
    gate.begin()
    start = time.monotonic()
    with pytest.raises(RequestTimeoutError, match=r"still under way after 0\.1 s"):
        gate.wait_until_open(0.1)
    assert time.monotonic() - start < 2.0
    assert gate.state is ServiceState.UPDATING


def test_broken_until_a_push_succeeds(gate: UpdateGate) -> None:
    cause = OSError("cable")
    gate.begin()
    gate.fail(cause)
    assert gate.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError, match=r"push the whole model again.*cable") as caught:
        gate.wait_until_open(1.0)
    assert caught.value.__cause__ is gate.failure is cause
    gate.begin()
    assert gate.failure is None
    gate.commit()
    gate.wait_until_open(0.0)
    assert gate.state is ServiceState.SYNCED


def test_closed_for_good(gate: UpdateGate) -> None:
    gate.close()
    gate.close()
    for call in (gate.begin, lambda: gate.wait_until_open(1.0)):
        with pytest.raises(ServiceClosedError):
            call()
    gate.commit()
    gate.fail(OSError())
    assert gate.state is ServiceState.CLOSED
    assert gate.failure is None


def test_a_push_that_ends_after_the_shutdown_does_not_reopen(gate: UpdateGate) -> None:
    gate.begin()
    gate.close()
    gate.commit()
    with pytest.raises(ServiceClosedError):
        gate.wait_until_open(1.0)


# Awaited


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda gate: gate.commit(), int),
        (lambda gate: gate.fail(OSError("cable")), ServiceBrokenError),
        (lambda gate: gate.close(), ServiceClosedError),
    ],
    ids=["commit", "fail", "close"],
)
def test_awaiting_the_end_of_an_update(
    gate: UpdateGate, end: Callable[[UpdateGate], None], kind: type
) -> None:
    async def main() -> list[Any]:
        gate.begin()
        callers = [asyncio.create_task(gate.entered()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(caller.done() for caller in callers)
        await asyncio.to_thread(end, gate)
        return await asyncio.gather(*callers, return_exceptions=True)

    assert all(isinstance(result, kind) for result in asyncio.run(main()))


def test_a_loop_that_is_gone_does_not_disturb_a_push(gate: UpdateGate) -> None:
    gate.begin()
    loop = asyncio.new_event_loop()
    task = loop.create_task(gate.entered())
    loop.run_until_complete(asyncio.sleep(0.01))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    gate.commit()
    assert gate.state is ServiceState.SYNCED


# Posting


def test_what_was_learnt_before_a_push_is_not_posted_after_it(gate: UpdateGate) -> None:
    before = gate.wait_until_open(0.0)
    assert gate.start_posting(before)
    gate.end_posting()
    gate.begin()
    assert not gate.start_posting(before)
    assert not gate.start_posting(gate.epoch)
    gate.commit()
    assert not gate.is_open(before)
    assert not gate.start_posting(before)
    assert gate.start_posting(gate.wait_until_open(0.0))


def test_a_push_waits_for_requests_that_are_being_posted(gate: UpdateGate) -> None:
    epoch = gate.wait_until_open(0.0)
    assert gate.start_posting(epoch)
    assert gate.start_posting(epoch)
    pusher = threading.Thread(target=gate.begin)
    pusher.start()
    wait_until(lambda: gate.state is ServiceState.UPDATING)
    gate.end_posting()
    pusher.join(0.1)
    assert pusher.is_alive()
    assert not gate.start_posting(epoch)
    gate.end_posting()
    pusher.join(5.0)
    assert not pusher.is_alive()


def test_a_push_does_not_wait_for_them_without_end(
    gate: UpdateGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "POSTING_S", 0.1)
    assert gate.start_posting(gate.epoch)
    start = time.monotonic()
    gate.begin()
    assert 0.1 <= time.monotonic() - start < 2.0


# In flight


def test_calls_in_flight_hear_of_a_push_that_failed(gate: UpdateGate) -> None:
    cause, heard = OSError("cable"), []
    with gate.in_flight(heard.append):
        gate.begin()
        gate.commit()
        assert not heard
        gate.begin()
        gate.fail(cause)
    gate.begin()
    gate.fail(OSError("again"))
    assert [error.__cause__ for error in heard] == [cause]
    assert "while this call was in flight" in str(heard[0])


def test_a_shutdown_is_no_failed_push(gate: UpdateGate) -> None:
    heard: list[ServiceBrokenError] = []
    with gate.in_flight(heard.append):
        gate.begin()
        gate.close()
        gate.fail(OSError("cable"))
    assert not heard


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "failed with: KeyboardInterrupt"),
        (MemoryError(), "failed with: MemoryError"),
        (RuntimeError("no room"), "failed with: no room"),
    ],
    ids=repr,
)
def test_what_broke_it_is_named(error: BaseException, says: str) -> None:
    """Also where the error itself says nothing."""
    gate = UpdateGate()
    gate.begin()
    gate.fail(error)
    with pytest.raises(ServiceBrokenError, match=f"{says}$"):
        gate.wait_until_open(1.0)
