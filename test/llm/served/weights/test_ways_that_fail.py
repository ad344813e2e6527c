"""Ways of pushing weights that have no room, or whose server fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from helpers.asserts import error_of
from helpers.fault_proxy import Fault, FaultProxy
from helpers.prompts import PROMPTS
from helpers.servers import Connect, connect_like, perturb
from helpers.ways import config
from torchrl_sglang import AsyncSGLang, ServiceState, Timeouts
from torchrl_sglang.errors import PushError, PushTimeoutError, ServiceBrokenError, WeightsError
from torchrl_sglang.weights.carry import shared_memory

pytestmark = pytest.mark.slow

SAMPLING = {"max_new_tokens": 24, "ignore_eos": True}

ROUTES = {
    "tensor": "/update_weights_from_tensor",
    "disk": "/update_weights_from_disk",
}


@pytest.fixture
def impatient(proxy: FaultProxy, shared_service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    with connect_like(
        shared_service,
        proxy.url,
        timeouts=Timeouts(transfer_s=2.0, control_s=20.0, request_s=60.0),
    ) as external:
        yield external


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(status=400, times=1), PushError),
        (Fault(status=500, times=1), PushError),
        (Fault(cut=True, times=1), PushError),
        (Fault(delay_s=30.0, times=1), PushTimeoutError),
    ],
    ids=["400", "500", "cut", "no answer"],
)
def test_a_server_that_fails(
    impatient: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    method: str,
    fault: Fault,
    expected: type[PushError],
) -> None:
    proxied = impatient
    scheme = connected(proxied, config=config(method))
    proxy.faults[ROUTES[method]] = replace(fault)  # each run counts its own
    begun = time.monotonic()
    with pytest.raises(expected) as caught:
        scheme.send(perturb(model, seed=81))
    assert time.monotonic() - begun < 5.0
    assert (caught.value.engine, caught.value.step) == (proxy.url, "transfer")
    assert caught.value.bucket == (0 if method == "tensor" else None)
    assert proxied.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError):
        proxied.generate(PROMPTS, SAMPLING)
    scheme.send(model)
    assert proxied.state is ServiceState.SYNCED
    assert error_of(proxied, model) < 0.02


def test_a_disk_without_room_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect, monkeypatch: Any
) -> None:
    scheme = connected(proxied, config=config("disk"))
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("torchrl_sglang.weights.carry.disk.shutil.disk_usage", lambda _: usage)
    proxy.seen.clear()
    with pytest.raises(WeightsError, match="does not fit"):
        scheme.send(model)
    assert "/pause_generation" not in [path for path, _ in proxy.seen]
    assert proxied.state is ServiceState.SYNCED


def test_shared_memory_without_room_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect, monkeypatch: Any
) -> None:
    scheme = connected(proxied, config=config("tensor"))
    monkeypatch.setattr(shared_memory, "free_shared_bytes", lambda: 1000)
    proxy.seen.clear()
    with pytest.raises(WeightsError, match="bucket_bytes"):
        scheme.send(model)
    assert "/pause_generation" not in [path for path, _ in proxy.seen]
    assert proxied.state is ServiceState.SYNCED
