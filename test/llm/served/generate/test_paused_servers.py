"""Requests to servers that somebody else paused, or that answer nothing."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.marks import IDLE
from helpers.servers import Connect, connect_like, num_under_way, told, wait_until
from helpers.under_way import request_of
from torchrl_sglang import AsyncSGLang, SamplingParams, Timeouts
from torchrl_sglang.errors import RequestTimeoutError, ServerFailedError
from torchrl_sglang.generate.bounds import CallBounds
from torchrl_sglang.servers.control import ControlClient
from torchrl_sglang.servers.gate import UpdateGate
from torchrl_sglang.servers.health import Looks, is_paused, looks_of
from torchrl_sglang.weights.carry.group import in_thread
from torchrl_sglang.weights.targets import Targets

pytestmark = IDLE

PROMPT = list(range(100, 164))

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)

LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds


@pytest.mark.parametrize("says", [True, False], ids=["ready", "before 0.5.20"])
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_server_tells_that_it_is_paused(
    service: AsyncSGLang, impatient: AsyncSGLang, proxy: FaultProxy, mode: str, says: bool
) -> None:
    if not says:
        proxy.faults["/ready"] = Fault(status=404)
    (worker,) = impatient.workers
    assert not is_paused(worker)
    told(service.workers[0], "/pause_generation", {"mode": mode})
    assert is_paused(worker)
    told(service.workers[0], "/continue_generation")
    assert not is_paused(worker)


@pytest.mark.parametrize("when", ["before", "in flight"])
def test_requests_are_not_left_with_servers_that_stay_paused(
    service: AsyncSGLang, impatient: AsyncSGLang, proxy: FaultProxy, when: str
) -> None:
    pause = {"mode": "retract"}
    if when == "before":
        told(service.workers[0], "/pause_generation", pause)
    call = in_thread(lambda: impatient.complete([request_of(5, 6, sampling=LONG)]), "test")
    if when == "in flight":
        wait_until(lambda: num_under_way(service))
        told(service.workers[0], "/pause_generation", pause)
    start = time.monotonic()
    with pytest.raises(RequestTimeoutError, match="paused_s") as caught:
        call.result(15.0)
    assert 1.0 <= time.monotonic() - start < 8.0
    assert proxy.url in str(caught.value)
    told(service.workers[0], "/continue_generation")
    assert impatient.generate([5, 6], SAMPLING).output_ids


@pytest.mark.slow
def test_the_bound_of_a_pause_is_kept(service: AsyncSGLang, proxy: FaultProxy) -> None:
    """It begins with the first look at a paused server, and the error says how long it was."""
    limit_s = 6.0
    told(service.workers[0], "/pause_generation", {"mode": "retract"})
    with connect_like(service, proxy.url, timeouts=Timeouts(paused_s=limit_s)) as external:
        begun = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"paused for .* \(6 s\)") as caught:
            external.generate([5, 6], SAMPLING)
        took = time.monotonic() - begun
        told(service.workers[0], "/continue_generation")
    said = float(re.search(r"paused for (\S+) s", str(caught.value))[1])  # type: ignore[index]
    assert limit_s <= said <= took
    assert took < limit_s + limit_s / 4 + 2.0  # the first look, and some


def test_a_pause_that_ends_in_time(service: AsyncSGLang, impatient: AsyncSGLang) -> None:
    told(service.workers[0], "/pause_generation", {"mode": "retract"})
    opener = threading.Timer(0.9, lambda: told(service.workers[0], "/continue_generation"))
    opener.start()
    assert impatient.generate([5, 6], SAMPLING).output_ids
    opener.join()


@pytest.mark.slow
def test_a_server_that_is_busy_is_not_taken_for_paused(
    impatient: AsyncSGLang, proxy: FaultProxy
) -> None:
    """One that has worked on a long prompt says that it is not ready."""
    proxy.faults["/ready"] = Fault(status=503)
    start = time.monotonic()
    assert impatient.complete([request_of(5, 6, sampling=LONG)])
    assert time.monotonic() - start > 1.6  # else it proves nothing


@pytest.mark.slow
def test_a_push_of_this_process_may_take_longer(
    proxied: AsyncSGLang,
    impatient: AsyncSGLang,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = Targets.begin

    def begin_late(targets: Targets) -> None:
        time.sleep(6.0)
        begin(targets)

    scheme = connected(impatient)
    call = in_thread(lambda: impatient.complete([request_of(5, 6, sampling=LONG)]), "test")
    wait_until(lambda: num_under_way(impatient))
    monkeypatch.setattr(Targets, "begin", begin_late)
    scheme.send(model)
    assert len(call.result(60.0)[0].output_ids) == LONG.max_new_tokens


# Servers that answer nothing


@pytest.fixture
def deaf() -> Iterator[ControlClient]:
    """What takes connections and answers nothing, as SGLang once one of its processes crashed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield ControlClient(url, api_key=None, admin_api_key=None, timeouts=Timeouts())


def test_a_call_does_not_wait_for_servers_that_answer_nothing(
    proxy: FaultProxy, service: AsyncSGLang
) -> None:
    timeouts = Timeouts(request_s=60.0, retry_s=1.0)
    with connect_like(service, proxy.url, timeouts=timeouts) as external:
        proxy.faults = dict.fromkeys(("/ready", "/generate", "/health"), Fault(delay_s=40.0))
        start = time.monotonic()
        with pytest.raises(
            RequestTimeoutError, match=r"answered anything for .*retry_s is 1 s"
        ) as caught:
            external.generate(PROMPT, SAMPLING)
        assert time.monotonic() - start < 12.0
        assert proxy.url in str(caught.value)


class NothingDied:
    """As of an external service, whose servers and router are not its own."""

    lost = False

    def recover(self) -> None:
        raise AssertionError("nothing is lost")


@pytest.mark.slow
def test_it_waits_for_those_that_answer(service: AsyncSGLang, deaf: ControlClient) -> None:
    """A router sends them what the others have lost."""
    timeouts = Timeouts(retry_s=0.5, paused_s=0.5)
    assert [looks_of(each) for each in (deaf, service.workers[0])] == [Looks.SILENT, Looks.ANSWERS]

    async def wait(*workers: ControlClient) -> None:
        calls = CallBounds(UpdateGate(), lambda: workers, timeouts, NothingDied())
        async with calls.bounded(8.0):
            await asyncio.sleep(7.0)

    asyncio.run(wait(deaf, service.workers[0]))
    with pytest.raises(RequestTimeoutError, match=deaf.url):
        asyncio.run(wait(deaf))


def test_asking_for_the_version_again_takes_no_time_of_its_own(
    proxy: FaultProxy, service: AsyncSGLang
) -> None:
    """Each attempt asks it; the time to try again is that of the request alone."""
    retry_s = 4.0
    timeouts = Timeouts(request_s=60.0, retry_s=retry_s)
    with connect_like(service, proxy.url, timeouts=timeouts) as external:
        proxy.faults["/generate"] = Fault(status=503)
        # The first ticket gets its version.
        proxy.faults["/model_info"] = Fault(status=503, after=1)
        start = time.monotonic()
        with pytest.raises(ServerFailedError):
            external.generate(PROMPT, SAMPLING)
        assert time.monotonic() - start < 1.4 * retry_s
