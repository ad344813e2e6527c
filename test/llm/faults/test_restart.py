"""Starting servers again, where it needs no server to die; `test_dead_servers.py` has the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.fault_proxy import Fault, FaultProxy
from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
    SGLangWeightSyncScheme,
    Timeouts,
    WeightSyncConfig,
)
from torchrl_sglang.errors import ConfigError, LaunchError, PushTimeoutError, ServiceError
from torchrl_sglang.servers import health
from torchrl_sglang.servers.members import Servers
from torchrl_sglang.weights.carry.broadcast import Broadcast
from torchrl_sglang.weights.targets import Targets


def test_servers_of_others_are_not_started_again(attached: AsyncSGLang) -> None:
    [worker] = attached.workers
    with pytest.raises(ConfigError, match="did not start its servers"):
        attached.restart_workers([worker.url])
    with pytest.raises(ConfigError, match="use 'raise' or 'drop'"):
        SGLangWeightSyncScheme(attached, config=WeightSyncConfig(lost_engines="restart"))
    assert not attached.managed
    assert attached.state is ServiceState.SYNCED


def test_a_copy_starts_nothing_again(service: AsyncSGLang) -> None:
    assert service.managed
    with copy.copy(service) as copied:
        assert not copied.managed
        with pytest.raises(ConfigError, match="a copy in another process"):
            copied.restart_workers([])


def test_an_unknown_server(service: AsyncSGLang) -> None:
    with pytest.raises(ConfigError, match="none of this service's servers") as caught:
        service.restart_workers(["http://127.0.0.1:1"])
    assert service.workers[0].url in str(caught.value)
    assert service.state is ServiceState.SYNCED


def test_not_in_the_middle_of_a_push(service: AsyncSGLang) -> None:
    service.gate.begin()
    try:
        with pytest.raises(ServiceError, match="wait for its end"):
            service.restart_workers([service.workers[0].url])
    finally:
        service.gate.commit()


# A GPU that is stuck: its scheduler answers until it is told to wait for the GPU. Over gloo nothing
# gets stuck so, and a proxy keeps the answer back. benchmarks/check_gpu_faults.py has real ones.


@pytest.fixture
def targets(proxied: AsyncSGLang) -> Iterator[Targets]:
    made = Targets(proxied.workers, proxied.cluster.infos, timeout_s=2.0)
    yield made
    made.close()


def test_a_gpu_that_is_done_with_everything(targets: Targets, proxy: FaultProxy) -> None:
    targets.wait_for_gpus("init")
    assert [path for path, _ in proxy.seen] == ["/weights_checker"]
    for status in (400, 500):
        proxy.faults["/weights_checker"] = Fault(status=status)
        targets.wait_for_gpus("init")  # it says no, but it says something


def test_a_gpu_that_is_stuck(targets: Targets, proxy: FaultProxy) -> None:
    proxy.faults["/weights_checker"] = Fault(delay_s=30.0)
    with pytest.raises(PushTimeoutError, match="has to be started again") as caught:
        targets.wait_for_gpus("init")
    assert (caught.value.engine, caught.value.step) == (proxy.url, "init")


def test_an_engine_that_is_stuck_is_not_invited(targets: Targets, proxy: FaultProxy) -> None:
    """Others would wait for it in the group's first broadcast, and be stuck as well."""
    proxy.faults["/weights_checker"] = Fault(delay_s=30.0)
    targets.infos = tuple(replace(info, device="cuda") for info in targets.infos)
    carrier = Broadcast(
        targets,
        address="127.0.0.1",
        port=None,
        device=torch.device("cuda", 0),
        layout="auto",
        timeouts=Timeouts(),
    )
    with pytest.raises(PushTimeoutError, match="has to be started again"):
        carrier.connect()
    assert [path for path, _ in proxy.seen] == ["/weights_checker"]


def test_a_server_that_can_not_be_asked(targets: Targets, proxy: FaultProxy) -> None:
    """An old one has no route that waits for the GPU."""
    [info] = targets.infos
    old = replace(info, capabilities=replace(info.capabilities, checksum=False))
    targets.infos = (old,)
    targets.wait_for_gpus("init")
    assert not proxy.seen


@pytest.mark.parametrize(
    ("device", "managed", "fault", "found"),
    [
        ("cuda", True, None, False),
        ("cuda", True, "/weights_checker", True),
        ("cuda", True, "/server_info", True),
        ("cuda", False, "/weights_checker", False),
        ("cpu", True, "/weights_checker", False),
        ("cpu", True, "/server_info", True),
    ],
)
def test_which_servers_are_started_again(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    managed: bool,
    fault: str | None,
    found: bool,
) -> None:
    monkeypatch.setattr(health, "ALIVE_S", 2.0)
    monkeypatch.setattr(health, "LAG_S", 0.2)
    if fault is not None:
        proxy.faults[fault] = Fault(delay_s=30.0)
    servers = proxied.servers
    infos = tuple(replace(info, device=device) for info in proxied.cluster.infos)
    servers.timeouts = Timeouts(control_s=2.0)
    servers._cluster = replace(proxied.cluster, infos=infos)
    monkeypatch.setattr(Servers, "managed_urls", (proxy.url,) if managed else ())
    assert servers.lifeless() == ((proxy.url,) if found else ())


def test_nothing_is_started_after_the_end(monkeypatch: pytest.MonkeyPatch, service: Any) -> None:
    """A restart that another thread's shutdown overtakes leaves no server behind."""
    fleet = service.servers.fleet
    monkeypatch.setattr(fleet, "_stopped", True)
    with pytest.raises(LaunchError, match="shut down"):
        fleet._spawn("server-9", ["true"], {})
    assert all(child.name != "server-9" for child in fleet._children)
