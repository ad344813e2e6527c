"""`UpdateGate`: requests wait while weights change, and no longer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from torchrl_sglang import ServiceState
from torchrl_sglang.errors import RequestTimeoutError, ServiceBrokenError, ServiceClosedError
from torchrl_sglang.gate import UpdateGate


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
        (lambda gate: gate.commit(), type(None)),
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
