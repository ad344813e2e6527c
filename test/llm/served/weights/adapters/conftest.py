"""A server with LoRA that holds no adapter before or after a test, and what pushes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.adapters import attach
from helpers.fault_proxy import FaultProxy
from helpers.peft_models import base_model, peft_model
from helpers.processes import until
from helpers.servers import asked, connected_schemes
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.servers import lora as adapters
from torchrl_sglang.weights.lora import loaded as adapter_room

Push = Callable[..., SGLangWeightSyncScheme]


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old versions go as soon as nobody uses them, and lists are asked for anew each time."""
    monkeypatch.setattr(adapter_room, "KEPT_S", 0.0)
    monkeypatch.setattr(adapters, "LIST_VALID_S", 0.0)


@pytest.fixture
def service(special_service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    """The server with LoRA; no adapter is loaded before or after."""
    yield special_service
    until(
        lambda: not asked(special_service.workers[0], "/v1/loads")["loads"][0]["num_running_reqs"]
    )
    while names := special_service.lora.names():
        for name in names:
            try:
                special_service.lora.unload(name)
            except ConfigError:  # an unload of a push was faster
                continue


@pytest.fixture
def connected(service: AsyncSGLang) -> Iterator[Push]:
    """Makes schemes that push adapters, and closes them."""
    with connected_schemes(service) as connect:
        yield lambda to=None, **config: connect(
            to, config=WeightSyncConfig(method="lora", **config)
        )


@pytest.fixture
def front(service: AsyncSGLang) -> Iterator[FaultProxy]:
    """A proxy in front of the server, which passes everything on until told otherwise."""
    with FaultProxy(service.workers[0].url) as running:
        yield running


@pytest.fixture
def proxied(front: FaultProxy, service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    """A service that reaches the server through the proxy, and waits 3 s at most for a load."""
    with attach(front.url, service, transfer_s=3.0, control_s=3.0) as external:
        front.seen.clear()
        yield external


@pytest.fixture
def model(model_path: Path) -> Any:
    return peft_model(model_path, seed=1)


@pytest.fixture(scope="module")
def base(model_path: Path) -> Any:
    return base_model(model_path)
