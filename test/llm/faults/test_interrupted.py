"""Whatever ends a push early, Ctrl-C included, the service is synced or broken, and can go on."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import _world

from helpers.asserts import error_of
from helpers.fault_proxy import Fault, FaultProxy
from helpers.prompts import PROMPTS
from helpers.servers import Connect, needs, perturb, told, wait_until
from torchrl_sglang import AsyncSGLang, ServiceState, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import PushError, RequestRefusedError, ServiceBrokenError
from torchrl_sglang.servers.gate import UpdateGate
from torchrl_sglang.servers.known_versions import KnownVersions
from torchrl_sglang.servers.threads import in_thread
from torchrl_sglang.weights import connection as connection_module
from torchrl_sglang.weights import push as update_module
from torchrl_sglang.weights.carry import broadcast as broadcast_module
from torchrl_sglang.weights.carry.broadcast import Broadcast
from torchrl_sglang.weights.targets import Targets

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}

ROUTE = "/update_weights_from_distributed"

NON_BLOCKING = WeightSyncConfig(non_blocking=True)


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


# Ctrl-C


def interrupt_last_wait(patched: pytest.MonkeyPatch) -> None:
    watch = broadcast_module.watch

    def watched(futures: Any, **kwargs: Any) -> None:
        if not any(futures.values()):
            raise KeyboardInterrupt
        watch(futures, **kwargs)

    patched.setattr(broadcast_module, "watch", watched)


PLACES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "pause": lambda patched: patched.setattr(Targets, "pause", interrupt),
    "transfer": lambda patched: patched.setattr(broadcast_module, "Payloads", interrupt),
    "end of the transfer": interrupt_last_wait,
    "version": lambda patched: patched.setattr(Targets, "set_version", interrupt),
    "before the commit": lambda p: p.setattr(KnownVersions, "set_pushed", interrupt),
    "commit": lambda patched: patched.setattr(UpdateGate, "commit", interrupt),
}


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_in_a_push(
    attached: AsyncSGLang, model: Any, connected: Connect, place: str
) -> None:
    scheme = connected(attached)
    perturb(model, seed=51)
    with pytest.MonkeyPatch.context() as patched:
        PLACES[place](patched)
        with pytest.raises(KeyboardInterrupt):
            scheme.send(model)
    assert attached.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError):
        attached.generate(PROMPTS, SAMPLING)
    scheme.send(model)
    assert error_of(attached, model) < 0.02


def test_a_second_ctrl_c_while_the_first_is_seen_to(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied)
    proxy.faults["/end_weight_update"] = Fault(status=500, times=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(update_module, "after_failure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheme.send(perturb(model, seed=52))
    assert proxied.state is ServiceState.BROKEN
    scheme.send(model)
    assert error_of(proxied, model) < 0.02


def test_ctrl_c_while_waiting_loses_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=NON_BLOCKING)
    proxy.faults[ROUTE] = Fault(status=500, times=1)
    scheme.send(perturb(model, seed=53))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(update_module, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheme.wait()
    with pytest.raises(PushError, match="'transfer', bucket 0"):
        scheme.wait()
    assert scheme.wait() is None
    scheme.send(model)
    assert scheme.wait() is not None


def test_a_thread_that_can_not_be_started(
    attached: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected(attached, config=NON_BLOCKING)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(update_module, "in_thread", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            scheme.send(model)
    assert attached.state is ServiceState.BROKEN
    scheme.send(model)
    scheme.wait()
    assert attached.state is ServiceState.SYNCED


# Without blocking


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A push goes no further than the pause until this is set."""
    begin, may_begin = Targets.begin, threading.Event()

    def begin_late(targets: Targets) -> None:
        assert may_begin.wait(20.0)
        begin(targets)

    monkeypatch.setattr(Targets, "begin", begin_late)
    return may_begin


def test_two_threads_never_push_the_same_version(
    service: AsyncSGLang,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
    held: threading.Event,
) -> None:
    scheme = connected(config=NON_BLOCKING)
    versions: list[int] = []
    push_later = scheme.pusher.push_later

    def pushed_later(*args: Any, **kwargs: Any) -> Any:
        versions.append(kwargs["version"])
        return push_later(*args, **kwargs)

    monkeypatch.setattr(scheme.pusher, "push_later", pushed_later)
    together = threading.Barrier(3)

    def push() -> None:
        together.wait(5.0)
        scheme.push(model)

    pushes = [in_thread(push, "test") for _ in range(3)]
    time.sleep(0.5)
    held.set()
    for one in pushes:
        one.result(20.0)
    scheme.wait()
    assert len(set(versions)) == 3
    assert service.weight_version == str(max(versions))


def test_a_scheme_that_nobody_holds_finishes_its_push(
    service: AsyncSGLang, model: Any, restore_weights: None, held: threading.Event
) -> None:
    scheme = SGLangWeightSyncScheme(service, config=NON_BLOCKING)
    scheme.connect()
    scheme.send(perturb(model, seed=54))
    known = weakref.ref(scheme)
    del scheme
    gc.collect()
    assert service.state is ServiceState.UPDATING
    held.set()
    wait_until(lambda: service.state is not ServiceState.UPDATING)
    assert service.state is ServiceState.SYNCED
    assert error_of(service, model) < 0.02
    wait_until(lambda: gc.collect() * 0 == 0 and known() is None)


def test_closing_tells_what_became_of_the_last_push(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=NON_BLOCKING)
    proxy.faults[ROUTE] = Fault(status=500, times=1)
    scheme.send(model)
    with pytest.warns(RuntimeWarning, match="last weight push failed.*'transfer', bucket 0"):
        scheme.close()
    assert not scheme.pusher.link.connected


def test_the_device_is_found_out_where_the_trainer_connects(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    """The push's own thread may have another current GPU."""
    asked: list[threading.Thread] = []
    sending_device = connection_module.sending_device

    def seen(*args: Any) -> torch.device:
        asked.append(threading.current_thread())
        return sending_device(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connection_module, "sending_device", seen)
        scheme = connected(proxied, config=NON_BLOCKING)
        proxy.faults[ROUTE] = Fault(status=500, times=1)
        scheme.send(model)
        with pytest.raises(PushError):
            scheme.wait()
        scheme.send(model)  # in a new group
        assert scheme.wait() is not None
    assert asked == [threading.current_thread()]


# Others


def test_servers_that_change_are_joined_anew(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    """The same server at another address, as where a replica was replaced by another."""
    scheme = connected(proxied)
    scheme.send(model)
    with FaultProxy(proxy.target) as moved:
        proxied.servers.url = moved.url
        proxied.refresh()
        proxy.seen.clear()
        scheme.send(perturb(model, seed=55))
        paths = [path for path, _ in moved.seen]
        assert paths.index("/init_weights_update_group") < paths.index("/pause_generation")
        assert paths.count("/pause_generation") == 1
        assert [path for path, _ in proxy.seen] == ["/destroy_weights_update_group"]
        assert scheme.last_push is not None
        assert "join" in scheme.last_push.step_s
        assert error_of(proxied, model) < 0.02
        scheme.send(model)
        assert "join" not in scheme.last_push.step_s
        scheme.close()


def test_another_process_that_pushes_is_not_taken_for_a_dead_one(
    service: AsyncSGLang, proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    needs(service, "update_session")
    scheme = connected(proxied)
    [other] = service.workers
    told(other, "/begin_weight_update")

    def end() -> None:
        """The second time that it asks to begin, the first was refused."""
        wait_until(lambda: [path for path, _ in proxy.seen].count("/begin_weight_update") >= 2)
        told(other, "/end_weight_update")

    proxy.seen.clear()
    ending = in_thread(end, "test")
    with pytest.raises(PushError, match="another process was pushing") as caught:
        scheme.send(model)
    ending.result(10.0)
    assert (caught.value.step, caught.value.engine) == ("begin", proxy.url)
    scheme.send(model)
    assert proxied.state is ServiceState.SYNCED


def test_a_probe_that_fails_leaves_no_session_open(
    proxied: AsyncSGLang, proxy: FaultProxy, connected: Connect
) -> None:
    """NCCL's probe when joining; what it sends goes over gloo as well."""
    needs(proxied, "update_session")
    scheme = connected(proxied)
    carrier = scheme.pusher.link.carrier
    assert isinstance(carrier, Broadcast)
    carrier._first_broadcast()
    proxy.faults[ROUTE] = Fault(status=500, times=1)
    proxy.seen.clear()
    with pytest.raises(PushError, match="NCCL_CUMEM_ENABLE") as caught:
        carrier._first_broadcast()
    assert caught.value.step == "init"
    wait_until(lambda: any(path == "/end_weight_update" for path, _ in proxy.seen))

    def begins() -> bool:
        try:
            told(proxied.workers[0], "/begin_weight_update")
        except RequestRefusedError:
            return False
        return True

    wait_until(begins)
    told(proxied.workers[0], "/end_weight_update")


def test_a_group_that_was_joined_in_vain_is_left_again(
    proxied: AsyncSGLang, proxy: FaultProxy, restore_weights: None
) -> None:
    """The server has joined, but its answer is lost."""
    groups = {*_world.pg_map}
    proxy.faults["/init_weights_update_group"] = Fault(lose=True, times=1)
    scheme = SGLangWeightSyncScheme(proxied)
    scheme.init_on_sender()
    with pytest.raises(PushError, match="init"):
        scheme.connect()
    wait_until(lambda: {*_world.pg_map} <= groups)
    wait_until(lambda: any(path == "/destroy_weights_update_group" for path, _ in proxy.seen))
    scheme.connect()
    scheme.close()


def test_servers_are_told_of_a_group_that_failed(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied)
    proxy.faults[ROUTE] = Fault(status=500, times=1)
    with pytest.raises(PushError):
        scheme.send(model)
    wait_until(lambda: any(path == "/destroy_weights_update_group" for path, _ in proxy.seen))
    scheme.send(model)
