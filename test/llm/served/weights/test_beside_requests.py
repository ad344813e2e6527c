"""Requests beside a push: what is sent under which salt, and what ends with a push that failed."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.marks import IDLE
from helpers.rows import tokens_of
from helpers.servers import (
    Connect,
    connect_like,
    num_under_way,
    perturb,
    told,
    wait_until,
    worst_error,
)
from helpers.under_way import request_of
from torchrl_sglang import (
    AsyncSGLang,
    GenerateRequest,
    SamplingParams,
    ServiceState,
    SGLangWrapper,
    Timeouts,
    WeightSyncConfig,
)
from torchrl_sglang.errors import PushError, ServiceBrokenError
from torchrl_sglang.generate import client as data_client
from torchrl_sglang.weights.carry.group import in_thread
from torchrl_sglang.weights.targets import Targets

pytestmark = IDLE

PROMPT = list(range(100, 164))

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)

LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds

UNFLUSHED = WeightSyncConfig(flush_cache=False)

IN_PLACE = WeightSyncConfig(pause_mode="in_place")

AT_ONCE_S = 5.0


def salts(proxy: FaultProxy) -> list[str]:
    """The salts of the generation requests so far."""
    return [json.loads(body)["extra_key"] for path, body in proxy.seen if path == "/generate"]


# Sent late


@pytest.mark.parametrize("config", [UNFLUSHED, IN_PLACE], ids=["unflushed", "in_place"])
def test_a_loop_that_is_begun_after_a_push(
    service: AsyncSGLang, model: Any, connected: Connect, config: WeightSyncConfig
) -> None:
    scheme = connected(config=config)
    service.generate(PROMPT, SAMPLING)  # its prefix is cached under the old weights
    iterator = service.as_completed([request_of(*PROMPT)])
    scheme.send(perturb(model, seed=61))
    ((_, completions),) = iterator
    assert completions[0].cached_tokens == 0
    assert worst_error(model, [PROMPT], completions) < 0.02


@pytest.mark.parametrize("config", [UNFLUSHED, IN_PLACE], ids=["unflushed", "in_place"])
def test_a_request_that_is_sent_again_after_a_push(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect, config: Any
) -> None:
    scheme = connected(proxied, config=config)
    scheme.send(model)
    proxied.generate(PROMPT, SAMPLING)
    proxy.seen.clear()
    proxy.faults["/generate"] = Fault(status=503, delay_s=1.0, times=1)
    call = in_thread(lambda: proxied.generate(PROMPT, SAMPLING), "test")
    wait_until(lambda: salts(proxy))
    scheme.send(perturb(model, seed=62))
    assert not call.done()
    completion = call.result(30.0)
    pushed = proxied.pushed_version
    assert pushed is not None
    assert salts(proxy) == [f"weights-{pushed - 1}", f"weights-{pushed}"]
    assert completion.cached_tokens == 0
    assert worst_error(model, [PROMPT], [completion]) < 0.02


def test_a_request_that_waited_for_a_connection_during_a_push(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had its salt when the push began, but was not written yet."""
    monkeypatch.setattr(data_client, "_max_connections", lambda: 1)
    scheme = connected(proxied, config=UNFLUSHED)
    scheme.send(model)
    proxy.seen.clear()
    proxy.faults["/generate"] = Fault(delay_s=1.5, times=1)
    calls = in_thread(
        lambda: proxied.complete([request_of(*PROMPT), request_of(*PROMPT, 7)]), "test"
    )
    wait_until(lambda: salts(proxy))
    scheme.send(perturb(model, seed=63))
    assert len(salts(proxy)) == 1
    _, second = calls.result(30.0)
    assert len(salts(proxy)) == 2
    assert salts(proxy)[1] == f"weights-{proxied.pushed_version}"
    assert second.weight_version == str(proxied.pushed_version)
    assert worst_error(model, [[*PROMPT, 7]], [second]) < 0.02


def test_nothing_is_sent_again_while_weights_change(
    proxied: AsyncSGLang, proxy: FaultProxy
) -> None:
    proxy.faults["/generate"] = Fault(status=503, delay_s=1.0, times=1)
    call = in_thread(lambda: proxied.generate(PROMPT, SAMPLING), "test")
    wait_until(lambda: salts(proxy))
    proxied.gate.begin()
    time.sleep(1.8)  # the next attempt would be 1.2 s after the first
    assert len(salts(proxy)) == 1
    proxied.gate.commit()
    assert call.result(10.0).output_ids
    assert len(salts(proxy)) == 2


def test_many_requests_that_a_push_held_ask_once(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """A service that did not push itself asks the server for its version."""
    proxy.faults["/generate"] = Fault(status=503, delay_s=1.0, times=20)
    requests = [request_of(5, 6, 20 + index) for index in range(20)]
    call = in_thread(lambda: proxied.complete(requests), "test")
    wait_until(lambda: len(salts(proxy)) == 20)
    proxied.gate.begin()
    time.sleep(1.5)
    proxied.gate.commit()
    assert len(call.result(20.0)) == 20
    assert [path for path, _ in proxy.seen].count("/model_info") == 2


async def drained(service: AsyncSGLang, requests: list[GenerateRequest]) -> list[Any]:
    return [one async for one in service.aas_completed(requests)]


def batched(service: AsyncSGLang, requests: list[GenerateRequest]) -> Any:
    policy = SGLangWrapper(service, input_mode="tokens", min_batch_size=2, batching_timeout=5.0)
    options = {"max_new_tokens": LONG.max_new_tokens, "ignore_eos": True}
    with ThreadPoolExecutor(len(requests)) as pool:
        rows = [tokens_of(*(request.input_ids or ())) for request in requests]
        calls = [pool.submit(policy, row, **options) for row in rows]
        errors = [call.exception() for call in calls]
    assert [type(error) for error in errors] == [ServiceBrokenError] * len(requests)
    raise errors[0]  # type: ignore[misc]


FORMS: dict[str, Callable[[AsyncSGLang, list[GenerateRequest]], Any]] = {
    "complete": lambda service, requests: service.complete(requests),
    "complete_each": lambda service, requests: service.complete_each(requests),
    "acomplete": lambda service, requests: asyncio.run(service.acomplete(requests)),
    "as_completed": lambda service, requests: list(service.as_completed(requests)),
    "aas_completed": lambda service, requests: asyncio.run(drained(service, requests)),
    "batching": batched,
}


@pytest.mark.parametrize("form", FORMS)
def test_calls_in_flight_end_when_a_push_fails(attached: AsyncSGLang, form: str) -> None:
    requests = [request_of(5, 6, 7 + index, sampling=LONG) for index in range(2)]
    call = in_thread(lambda: FORMS[form](attached, requests), "test")
    wait_until(lambda: num_under_way(attached) == 2)
    attached.gate.begin()
    told(attached.workers[0], "/pause_generation", {"mode": "retract"})
    time.sleep(0.1)
    assert not call.done()
    start = time.monotonic()
    attached.gate.fail(OSError("the cable"))
    with pytest.raises(ServiceBrokenError, match=r"in flight.*the cable") as caught:
        call.result(AT_ONCE_S)
    assert time.monotonic() - start < AT_ONCE_S
    assert isinstance(caught.value.__cause__, OSError)


def failing(call: Future[Any]) -> BaseException | None:
    return call.exception(AT_ONCE_S)


def test_a_push_that_fails_for_real_and_its_repair(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    """Requests on the server, one that will be sent again, and one that waits at the gate."""
    scheme = connected(proxied)
    running = in_thread(
        lambda: proxied.complete([request_of(5, i, sampling=LONG) for i in range(6, 9)]), "test"
    )
    wait_until(lambda: num_under_way(proxied) == 3)
    proxy.faults["/generate"] = Fault(status=503)
    again = in_thread(lambda: proxied.generate(PROMPT, SAMPLING), "test")
    wait_until(lambda: len(salts(proxy)) >= 5)  # sent twice: its next attempt is 0.4 s away
    proxy.faults["/update_weights_from_distributed"] = Fault(status=500, delay_s=1.0, times=1)
    push = in_thread(lambda: scheme.send(perturb(model, seed=64)), "test")
    wait_until(lambda: proxied.state is ServiceState.UPDATING)
    waiting = in_thread(lambda: proxied.generate(PROMPT, SAMPLING), "test")
    awaited = in_thread(lambda: asyncio.run(proxied.agenerate(PROMPT, SAMPLING)), "test")
    assert isinstance(push.exception(20.0), PushError)
    for call in (running, again, waiting, awaited):
        assert isinstance(failing(call), ServiceBrokenError)
    proxy.faults.clear()
    scheme.send(model)
    completion = proxied.generate(PROMPT, SAMPLING)
    assert worst_error(model, [PROMPT], [completion]) < 0.02
    wait_until(lambda: not num_under_way(proxied), 15.0)  # the servers drop what nobody waits for


COPY = """
import pickle, sys, time
from torchrl_sglang.errors import RequestTimeoutError
service = pickle.loads(bytes.fromhex(sys.argv[1]))
start = time.monotonic()
try:
    service.generate([5, 6], {"max_new_tokens": 2})
except RequestTimeoutError as error:
    print(time.monotonic() - start, error)
service.shutdown()
"""


@pytest.mark.slow
def test_a_copy_in_another_process_hears_of_a_failed_push(
    impatient: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(impatient)
    proxy.faults["/end_weight_update"] = Fault(status=500, times=1)
    proxy.faults["/weights_checker"] = Fault(status=500, times=1)
    with pytest.raises(PushError):
        scheme.send(model)
    command = [sys.executable, "-c", COPY, pickle.dumps(impatient).hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=True)
    took_s, _, message = done.stdout.partition(" ")
    assert float(took_s) < 12.0  # a copy attaches first
    assert "its push failed" in message
    proxy.faults.clear()
    scheme.send(model)
    assert impatient.generate([5, 6], SAMPLING).output_ids


# Who pushed last


def test_another_process_that_pushes_is_noticed(
    proxied: AsyncSGLang, proxy: FaultProxy, attached: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """By the first completion of its weights; from then on the servers are asked."""
    ours, theirs = connected(proxied), connected(attached)
    ours.send(model)
    pushed = proxied.pushed_version
    assert pushed is not None
    theirs.send(perturb(model, seed=65))
    assert proxied.generate(PROMPT, SAMPLING).weight_version == str(pushed + 1)
    assert proxied.weight_version == str(pushed + 1)
    theirs.send(perturb(model, seed=66))
    completion = proxied.generate(PROMPT, SAMPLING)
    assert salts(proxy)[-1] == f"weights-{pushed + 2}"
    assert worst_error(model, [PROMPT], [completion]) < 0.02
    ours.send(model)
    proxy.seen.clear()
    assert proxied.generate(PROMPT, SAMPLING).weight_version == str(pushed + 3)
    assert "/model_info" not in [path for path, _ in proxy.seen]  # trusted again


def test_what_ends_during_a_push_of_this_process_is_not_another_ones(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The servers run on before the push is over here."""
    scheme = connected(proxied, config=WeightSyncConfig(verify_method="probe"))
    scheme.send(model)
    running = in_thread(
        lambda: proxied.complete(
            [request_of(5, 6, sampling=LONG.updated({"max_new_tokens": 400}))]
        ),
        "test",
    )
    wait_until(lambda: num_under_way(proxied))
    resume = Targets.resume

    def resume_and_wait(targets: Targets) -> None:
        resume(targets)
        running.result(30.0)

    monkeypatch.setattr(Targets, "resume", resume_and_wait)
    scheme.send(model)
    assert running.result()[0].weight_version == str(proxied.pushed_version)
    proxy.seen.clear()
    proxied.generate([5, 6], SAMPLING)
    assert "/model_info" not in [path for path, _ in proxy.seen]


def test_a_server_that_was_started_again(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """It is at its checkpoint, but versions go on from where they were."""
    scheme = connected()
    scheme.send(model)
    pushed = service.pushed_version
    assert pushed is not None
    body = {"new_version": "default", "abort_all_requests": False}
    told(service.workers[0], "/update_weight_version", body)
    scheme.send(model)
    assert service.pushed_version == pushed + 1


# Runs that share a cache


def test_runs_with_names_do_not_share_prefixes(
    service: AsyncSGLang, proxy: FaultProxy, timeouts: Timeouts
) -> None:
    """Of one version, whose number says nothing of the weights; a copy belongs to its run."""
    prompt = list(uuid.uuid4().bytes * 4)  # that no cache has

    def cached(made: AsyncSGLang) -> int:
        with made:
            return int(made.generate(prompt, SAMPLING).cached_tokens)

    def run(name: str | None) -> AsyncSGLang:
        return connect_like(service, proxy.url, run_name=name, timeouts=timeouts)

    cached(run("one"))
    assert cached(run("two")) == cached(run(None)) == 0
    assert cached(run("one")) > 32
    assert cached(pickle.loads(pickle.dumps(run("one")))) > 32
    version = service.weight_version
    names = ["one/", "two/", "", "one/", "one/"]
    sent = [json.loads(body) for path, body in proxy.seen if path == "/generate"]
    found = [body["extra_key"] for body in sent if "extra_key" in body]  # the rest is for attaching
    assert found == [f"{name}weights-{version}" for name in names]
