"""What tests of behaviour share beside the servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.fault_proxy import FaultProxy, WatchingProxy
from helpers.servers import connect_like, num_under_way, told, wait_until
from torchrl_sglang import AsyncSGLang, Timeouts


@pytest.fixture
def idle(service: AsyncSGLang) -> Iterator[None]:
    """Nothing of one test is left to the next."""
    yield
    told(service.workers[0], "/continue_generation")
    service.abort()
    wait_until(lambda: not num_under_way(service))


@pytest.fixture
def impatient(proxy: FaultProxy, service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    """A service that leaves requests with paused servers for one second."""
    bounds = Timeouts(request_s=60.0, paused_s=1.0)
    with connect_like(service, proxy.url, timeouts=bounds) as external:
        yield external


@pytest.fixture
def watching(service: AsyncSGLang) -> Iterator[WatchingProxy]:
    with WatchingProxy(service.workers[0].url) as proxy:
        proxy.left = []
        yield proxy


@pytest.fixture
def watched(service: AsyncSGLang, watching: WatchingProxy) -> Iterator[AsyncSGLang]:
    """A service whose connections are watched."""
    with connect_like(service, watching.url) as external:
        yield external
