"""Every step of a push, and everything that can happen to it; the table is made by a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.prompts import PROMPTS
from helpers.servers import connect_like, needs, perturb
from helpers.steps import STEPS, repaired
from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
    SGLangWeightSyncScheme,
    Timeouts,
    WeightSyncConfig,
)
from torchrl_sglang.errors import PushError, PushTimeoutError, ServiceBrokenError
from torchrl_sglang.weights import after_failure as failure
from torchrl_sglang.weights.carry.payload import Payloads

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}

SHORT = Timeouts(control_s=3.0, step_s=3.0, transfer_s=2.0, group_s=3.0, request_s=60.0)

CONFIG = WeightSyncConfig(bucket_bytes=1 << 18)

WITHIN_S = 6.0

LAST = -1  # the last bucket


FAULTS: dict[str, tuple[dict[str, Any], type[PushError]]] = {
    "400": ({"status": 400}, PushError),
    "500": ({"status": 500}, PushError),
    "no answer": ({"delay_s": 60.0}, PushTimeoutError),
    "cut": ({"cut": True}, PushError),
    "answer lost": ({"lose": True}, PushError),
}

# What served/weights/test_refused.py runs each time is not run twice.
PLACES: list[tuple[str, int | None]] = [
    *((step, None) for step in STEPS if step != "transfer"),
    *(("transfer", bucket) for bucket in (0, 1, LAST)),
]

ALWAYS = [
    ("begin", None, "no answer"),
    ("transfer", 1, "no answer"),
    ("verify", None, "no answer"),
    ("version", None, "answer lost"),
    ("continue", None, "answer lost"),
]

ROWS = [
    pytest.param(step, bucket, fault, marks=[] if each in ALWAYS else [pytest.mark.faults])
    for step, bucket in PLACES
    for fault in FAULTS
    if (each := (step, bucket, fault))
]


@pytest.fixture
def impatient(
    proxy: FaultProxy, shared_service: AsyncSGLang, restore_weights: None
) -> Iterator[AsyncSGLang]:
    """A service that reaches the shared server through the proxy, and does not wait long."""
    with connect_like(shared_service, proxy.url, timeouts=SHORT) as external:
        yield external


@pytest.fixture
def scheme(impatient: AsyncSGLang) -> Iterator[SGLangWeightSyncScheme]:
    made = SGLangWeightSyncScheme(impatient, config=CONFIG)
    made.connect()
    yield made
    made.close()


@pytest.mark.parametrize(("step", "bucket", "fault"), ROWS)
def test_a_server_that_fails(
    impatient: AsyncSGLang,
    scheme: SGLangWeightSyncScheme,
    proxy: FaultProxy,
    model: Any,
    report: list[str],
    step: str,
    bucket: int | None,
    fault: str,
) -> None:
    if step in ("begin", "end", "flush"):
        needs(impatient, "update_session")
    if bucket == LAST:
        scheme.send(model)
        bucket = scheme.last_push.num_buckets - 1  # type: ignore[union-attr]
    if step == "init":  # joining is a step of a push only after a failure
        scheme.pusher.link.drop()
    given, expected = FAULTS[fault]
    proxy.faults[STEPS[step]] = Fault(**given, after=bucket or 0)
    perturb(model, seed=41)
    begun = time.monotonic()
    with pytest.raises(PushError) as caught:
        scheme.send(model)
    took = time.monotonic() - begun
    error = caught.value
    assert took < WITHIN_S
    assert type(error) is expected
    assert (error.engine, error.step, error.bucket) == (proxy.url, step, bucket)
    assert impatient.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError, match=step):
        impatient.generate(PROMPTS, SAMPLING)
    proxy.faults.clear()
    again = repaired(impatient, scheme, model)
    report.append(
        f"| {step} | {'' if bucket is None else bucket} | {fault} | {type(error).__name__} | "
        f"{took:.2f} s | broken | succeeds, {again:.2f} s |"
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", ["pause", "end", "verify"])
def test_a_silent_server_with_the_usual_bounds(
    proxy: FaultProxy, shared_service: AsyncSGLang, model: Any, restore_weights: None, step: str
) -> None:
    if step == "end":
        needs(shared_service, "update_session")
    with connect_like(shared_service, proxy.url) as service:
        scheme = SGLangWeightSyncScheme(service, config=CONFIG)
        scheme.connect()
        scheme.send(model)
        proxy.faults[STEPS[step]] = Fault(delay_s=60.0)
        begun = time.monotonic()
        with pytest.raises(PushTimeoutError) as caught:
            scheme.send(model)
        assert Timeouts().step_s + failure.LIVENESS_S < WITHIN_S
        assert time.monotonic() - begun < WITHIN_S + 1.0  # a push, on a machine that is busy
        assert (caught.value.engine, caught.value.step) == (proxy.url, step)
        # The pause that follows a failure is not answered either, or the end of the session.
        assert ("has to be started again" in str(caught.value)) == (step != "verify")
        proxy.faults.clear()
        repaired(service, scheme, perturb(model, seed=47))
        scheme.close()


@pytest.mark.parametrize("index", [0, 2])
def test_a_trainer_that_raises_in_mid_push(
    impatient: AsyncSGLang,
    scheme: SGLangWeightSyncScheme,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    report: list[str],
    index: int,
) -> None:
    flattened = Payloads._flattened

    def raise_at(payloads: Payloads, number: int, bucket: Any) -> Any:
        if number == index:
            raise MemoryError("no memory for the test")
        return flattened(payloads, number, bucket)

    begun = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(Payloads, "_flattened", raise_at)
        with pytest.raises(PushError, match="no memory for the test") as caught:
            scheme.send(perturb(model, seed=42))
    took = time.monotonic() - begun
    assert took < WITHIN_S
    assert (caught.value.engine, caught.value.step) == (None, "transfer")
    assert caught.value.bucket == index
    assert impatient.state is ServiceState.BROKEN
    again = repaired(impatient, scheme, model)
    report.append(
        f"| transfer | {index} | the trainer raises | PushError | {took:.2f} s | broken | "
        f"succeeds, {again:.2f} s |"
    )
