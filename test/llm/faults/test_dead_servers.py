"""Trainers and servers that die in a push, and servers that are started again."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.asserts import distance
from helpers.counts import done_by
from helpers.processes import descendants
from helpers.prompts import PROMPTS
from helpers.servers import CPU_SERVER_ARGS, perturb, told, worst_error
from helpers.steps import repaired
from torchrl_sglang import (
    AsyncSGLang,
    PushResult,
    ServiceState,
    SGLangWeightSyncScheme,
    Timeouts,
    WeightSyncConfig,
)
from torchrl_sglang.errors import EngineLostError, PushError, ServiceBrokenError, ServiceError
from torchrl_sglang.servers import health as revive_module
from torchrl_sglang.servers.threads import in_thread
from torchrl_sglang.weights import after_failure as failure
from torchrl_sglang.weights.carry.payload import Payloads

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}

CONFIG = WeightSyncConfig(bucket_bytes=1 << 18)

WITHIN_S = 6.0


# Deaths

TRAINER = """
import pickle, sys, time
from transformers import AutoModelForCausalLM
from torchrl_sglang import SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.weights.carry.payload import Payloads
service, path = pickle.loads(bytes.fromhex(sys.argv[1]))
flattened = Payloads._flattened

def stall(payloads, index, bucket):
    if index == 1:
        time.sleep(0.5)  # by now the server was told of this bucket, and waits for it
        print("in the middle", flush=True)
        time.sleep(60)
    return flattened(payloads, index, bucket)

Payloads._flattened = stall
scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(bucket_bytes=1 << 18))
scheme.connect()
scheme.send(AutoModelForCausalLM.from_pretrained(path))
"""


@pytest.mark.slow
def test_a_trainer_that_is_killed_in_mid_push(
    service: AsyncSGLang,
    attached: AsyncSGLang,
    model: Any,
    model_path: Path,
    restore_weights: None,
    report: list[str],
) -> None:
    """The server waits for a bucket that never comes; a new trainer gets it back.

    Who asks meanwhile waits, and is answered by the new trainer's weights.
    """
    told = pickle.dumps((attached, str(model_path))).hex()
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, told], stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "in the middle\n"
        trainer.kill()
    pending = in_thread(lambda: service.generate(PROMPTS, SAMPLING), "test")
    with pytest.raises(TimeoutError):
        pending.result(0.5)
    begun = time.monotonic()
    scheme = SGLangWeightSyncScheme(attached, config=CONFIG)
    scheme.connect()
    repaired(attached, scheme, perturb(model, seed=43))
    took = time.monotonic() - begun
    assert worst_error(model, PROMPTS, pending.result(20.0)) < 0.02
    scheme.close()
    assert took < 30.0
    report.append(
        "| transfer | 1 | the trainer is killed | none is left to see one | | servers paused, "
        f"requests wait | of a new trainer: succeeds, {took:.2f} s; they are answered then |"
    )


@pytest.fixture(scope="module")
def two(model_path: Path) -> Iterator[AsyncSGLang]:
    """Two servers that tests may kill, since they can be started again."""
    with AsyncSGLang.from_pretrained(
        str(model_path),
        num_replicas=2,
        device="cpu",
        timeouts=Timeouts(start_s=240.0, request_s=120.0, group_s=20.0),
        enable_metrics=True,
        **CPU_SERVER_ARGS,
    ) as service:
        yield service


def schedulers(pid: int) -> list[Any]:
    """The processes of a server that hold its weights."""
    return [each for each in descendants(pid) if "scheduler" in " ".join(each.cmdline())]


def kill_all(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)


def kill_scheduler(pid: int) -> None:
    """It has the weights; what listens to HTTP lives for some seconds more."""
    schedulers(pid)[0].kill()


def stop_scheduler(pid: int) -> None:
    """It does not answer any more, and never ends, as one that is stuck in a broadcast."""
    schedulers(pid)[0].suspend()


def killing(
    service: AsyncSGLang, url: str, monkeypatch: pytest.MonkeyPatch, kill: Callable[[int], None]
) -> list[float]:
    """From now on a push kills a server, or a part of it, between its first bucket and second.

    Returns:
        When it did, once it has.
    """
    fleet = service.servers.fleet
    assert fleet is not None
    name = f"server-{fleet.server_urls.index(url)}"
    [child] = [child for child in fleet._children if child.name == name]
    flattened, killed_at = Payloads._flattened, list[float]()

    def kill_at(payloads: Payloads, index: int, bucket: Any) -> Any:
        if index == 1 and not killed_at:
            killed_at.append(time.monotonic())
            kill(child.pid)
            time.sleep(0.2)
        return flattened(payloads, index, bucket)

    monkeypatch.setattr(Payloads, "_flattened", kill_at)
    return killed_at


@pytest.mark.slow
def test_servers_that_are_killed_in_mid_push(
    two: AsyncSGLang, model: Any, monkeypatch: pytest.MonkeyPatch, report: list[str]
) -> None:
    """One of two is reported and left out, if the user allows it; the last one is an error.

    Of the first only the process that has the weights dies: it still takes connections then, and
    the other server is the first to notice.
    """
    first, second = (worker.url for worker in two.workers)
    config = WeightSyncConfig(bucket_bytes=1 << 18, lost_engines="drop")
    scheme = SGLangWeightSyncScheme(two, config=config)
    scheme.connect()
    scheme.send(model)
    # A busy machine notices a death later.
    monkeypatch.setattr(failure, "NOTICE_S", 3.0)
    monkeypatch.setattr(failure, "DYING_S", 3.0)
    assert scheme.last_push.lost_engines == ()  # type: ignore[union-attr]
    with monkeypatch.context() as patched:
        killing(two, second, patched, kill_scheduler)
        begun = time.monotonic()
        scheme.send(perturb(model, seed=44))
        took = time.monotonic() - begun
    assert took < WITHIN_S + 5.0  # with the push to the one that is left
    push = scheme.last_push
    assert push is not None
    assert (push.lost_engines, push.verified_by) == ((second,), "checksum")
    assert [worker.url for worker in two.workers] == [first]
    repaired(two, scheme, perturb(model, seed=45))
    report.append(
        "| transfer | 1 | the scheduler of one of two servers is killed, lost_engines='drop' | | "
        f"{took:.2f} s | synced | of the other alone: the same one |"
    )
    with monkeypatch.context() as patched:
        killing(two, first, patched, kill_all)
        begun = time.monotonic()
        with pytest.raises(EngineLostError) as caught:
            scheme.send(perturb(model, seed=46))
        took = time.monotonic() - begun
    assert took < WITHIN_S
    assert (caught.value.engine, caught.value.step) == (first, "transfer")
    assert two.state is ServiceState.BROKEN
    begun = time.monotonic()
    scheme.close()
    assert time.monotonic() - begun < 10.0
    begun = time.monotonic()
    again = connected_to(two)
    repaired(two, again, perturb(model, seed=47))
    needed = time.monotonic() - begun
    assert [worker.url for worker in two.workers] == [first]
    report.append(
        f"| transfer | 1 | the server is killed | EngineLostError | {took:.2f} s | broken | "
        f"of a new scheme: starts it again and succeeds, {needed:.1f} s |"
    )
    again_log = f"server-{two.servers.fleet.server_urls.index(first)}.2.log"  # type: ignore[union-attr]
    logs = {path.name for path in two.log_dir.iterdir()}  # type: ignore[union-attr]
    assert logs == {"router.log", "server-0.log", "server-1.log", again_log}
    again.close()


@pytest.mark.faults
def test_one_that_was_left_out_comes_back(
    two: AsyncSGLang, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started by hand, and takes no request before a push with its own weights."""
    scheme = connected_to(two, lost_engines="drop")
    scheme.send(model)
    if len(two.workers) == 2:  # as when no test before has left one out
        with monkeypatch.context() as patched:
            killing(two, two.workers[1].url, patched, kill_all)
            scheme.send(perturb(model, seed=47))
    [left] = [worker.url for worker in two.workers]
    [out] = {*two.managed_urls} - {left}
    two.restart_workers([out])
    assert {worker.url for worker in two.workers} == {left, out}
    assert two.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError, match="started again, with the model's own files"):
        two.generate(PROMPTS, SAMPLING)
    repaired(two, scheme, perturb(model, seed=48))
    check_each(two, model)
    scheme.close()


def connected_to(service: AsyncSGLang, **config: Any) -> SGLangWeightSyncScheme:
    """A scheme of its own, which starts again at once what the one before left broken."""
    scheme = SGLangWeightSyncScheme(
        service, config=WeightSyncConfig(bucket_bytes=1 << 18, **config)
    )
    scheme.connect()
    return scheme


def check_each(service: AsyncSGLang, model: Any) -> None:
    """Every server runs the model's weights, and the router sends to every one."""
    for worker in service.workers:
        body = {"input_ids": PROMPTS, "sampling_params": SAMPLING, "return_logprob": True}
        for prompt, answer in zip(PROMPTS, told(worker, "/generate", body), strict=True):
            assert distance(model, prompt, answer) < 0.02
    _, counts = done_by(service, lambda: service.generate([[i, 9] for i in range(16)], SAMPLING))
    assert all(count["requests"] for count in counts), counts


LONG = {"max_new_tokens": 600, "ignore_eos": True}

LONG_PROMPTS = [[index, index + 1] for index in range(10, 26)]


@pytest.mark.faults
@pytest.mark.parametrize("kill", [kill_all, kill_scheduler, stop_scheduler])
def test_a_push_starts_a_server_again(
    two: AsyncSGLang,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    report: list[str],
    kill: Callable[[int], None],
) -> None:
    """What was asked before waits, and is answered under the new weights."""
    monkeypatch.setattr(revive_module, "ALIVE_S", 3.0)
    urls = [worker.url for worker in two.workers]
    scheme = connected_to(two, lost_engines="restart")
    scheme.send(model)
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        killing(two, urls[1], patched, kill)
        asked = pool.submit(two.generate, LONG_PROMPTS, LONG)
        time.sleep(0.5)
        scheme.send(perturb(model, seed=49))
        completions = asked.result(120.0)
    push = check_restarted(two, scheme, model, urls)
    assert {completion.weight_version for completion in completions} == {str(push.version)}
    assert [len(completion.output_ids) for completion in completions] == [600] * 16
    scheme.close()
    report.append(
        f"| transfer | 1 | {spoken(kill)} of one of two, lost_engines='restart' | | | synced | of "
        f"both: the same one, {push.total_s:.1f} s |"
    )


@pytest.mark.faults
def test_the_next_push_starts_a_server_again_that_is_stuck(
    two: AsyncSGLang, model: Any, monkeypatch: pytest.MonkeyPatch, report: list[str]
) -> None:
    monkeypatch.setattr(revive_module, "ALIVE_S", 3.0)
    urls = [worker.url for worker in two.workers]
    scheme = connected_to(two)
    scheme.send(model)
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        stopped_at = killing(two, urls[1], patched, stop_scheduler)
        asked = pool.submit(two.generate, LONG_PROMPTS, LONG)
        time.sleep(0.5)
        with pytest.raises(PushError, match="gave no answer afterwards either") as caught:
            scheme.send(perturb(model, seed=50))
        took = time.monotonic() - stopped_at[0]
        assert isinstance(asked.exception(10.0), ServiceBrokenError)
    assert took < WITHIN_S
    assert (caught.value.engine, caught.value.step) == (urls[1], "transfer")
    scheme.send(model)
    push = check_restarted(two, scheme, model, urls)
    scheme.close()
    report.append(
        f"| transfer | 1 | {spoken(stop_scheduler)} of one of two | "
        f"{type(caught.value).__name__} | {took:.2f} s | broken | starts it again and succeeds, "
        f"{push.total_s:.1f} s |"
    )


def check_restarted(
    service: AsyncSGLang, scheme: SGLangWeightSyncScheme, model: Any, urls: list[str]
) -> PushResult:
    push = scheme.last_push
    assert push is not None
    assert (push.restarted_engines, push.lost_engines) == ((urls[1],), ())
    assert 1.0 < push.step_s["restart"] < push.total_s
    assert [worker.url for worker in service.workers] == urls
    assert service.state is ServiceState.SYNCED
    check_each(service, model)
    return push


def spoken(kill: Callable[[int], None]) -> str:
    return kill.__name__.replace("_", " ")


@pytest.mark.faults
def test_a_server_that_does_not_start_again(
    two: AsyncSGLang, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names it and says why; once that is mended, the next push starts it."""
    fleet, urls = two.servers.fleet, [worker.url for worker in two.workers]
    assert fleet is not None
    scheme = connected_to(two, lost_engines="restart")
    try:
        scheme.send(model)
        broken = [replace(each, model_path="/nowhere") for each in fleet._plan.servers]
        with monkeypatch.context() as patched:
            patched.setattr(fleet, "_plan", replace(fleet._plan, servers=tuple(broken)))
            killing(two, urls[0], patched, kill_all)
            with pytest.raises(EngineLostError, match="did not start again") as caught:
                scheme.send(perturb(model, seed=51))
        assert (caught.value.engine, caught.value.step) == (urls[0], "restart")
        assert "/nowhere" in str(caught.value)
        assert two.state is ServiceState.BROKEN
        scheme.send(perturb(model, seed=52))
        assert scheme.last_push.restarted_engines == (urls[0],)  # type: ignore[union-attr]
        check_each(two, model)
    finally:
        scheme.close()


@pytest.mark.faults
def test_another_process_pushes_to_what_was_started_again(two: AsyncSGLang, model: Any) -> None:
    """The owner learns of it by asking: the servers' versions are one again."""
    scheme = connected_to(two)
    scheme.send(model)
    scheme.close()
    url = two.workers[0].url
    with pickle.loads(pickle.dumps(two)) as copied:
        assert len(copied.workers) == 2  # it knew both before
        two.restart_workers([url])
        two.restart_workers([])
        assert two.state is ServiceState.BROKEN
        two.refresh()
        assert len(two.workers) == 2
        theirs = connected_to(copied)
        theirs.send(perturb(model, seed=53))
        theirs.close()
    two.restart_workers([])
    assert two.state is ServiceState.SYNCED
    assert {worker.url for worker in two.workers} == {*two.managed_urls}
    check_each(two, model)


@pytest.mark.faults
def test_two_restarts_at_once(two: AsyncSGLang, model: Any) -> None:
    """The second is refused; servers that are named twice are started once."""
    url = two.workers[1].url
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(two.restart_workers, [url, url])
        time.sleep(1.0)
        with pytest.raises(ServiceError, match="wait for its end"):
            two.restart_workers([url])
        first.result(240.0)
    scheme = connected_to(two)
    repaired(two, scheme, model)
    scheme.close()
    check_each(two, model)
