"""Two managed replicas: every way of sending requests spreads them, and samples stay together."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.counts import Counts, done_by
from helpers.processes import alive, descendants, listening
from helpers.rows import make_input
from helpers.servers import (
    CPU_SERVER_ARGS,
    asked,
    connect_like,
    needs,
    perturb,
    wait_until,
    worst_error,
)
from torchrl_sglang import (
    AsyncSGLang,
    GenerateRequest,
    SamplingParams,
    ServiceState,
    SGLangWeightSyncScheme,
    SGLangWrapper,
    Timeouts,
)
from torchrl_sglang.errors import ConnectError, NoWorkersError
from torchrl_sglang.generate.request import Returns, passes_router

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def replicas(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    """Started by a thread that is gone afterwards: they live on, and nothing is left in the end."""
    earlier = set(descendants(os.getpid()))
    made: list[AsyncSGLang] = []

    def start() -> None:
        service = AsyncSGLang.from_pretrained(
            str(model_path),
            num_replicas=2,
            device="cpu",
            timeouts=timeouts,
            enable_metrics=True,
            **CPU_SERVER_ARGS,
        )
        made.append(service)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(280.0)
    with made[0] as service:
        children = [p for p in descendants(os.getpid()) if p not in earlier]
        assert len(children) >= 9
        urls = [service.server_url, *(worker.url for worker in service.workers)]
        assert len(set(urls)) == 3
        assert all(listening(url) for url in urls)
        yield service
    assert alive(children) == []
    assert not any(listening(url) for url in urls)


def prompts_of(count: int, *, length: int = 16, first: int = 3) -> list[list[int]]:
    """Prompts of one length that have no beginning in common."""
    return [[first + i // 300, 3 + i % 300, *range(100, 98 + length)] for i in range(count)]


def check_even(shares: list[Counts], *, requests: int) -> None:
    """Each worker did half of it, give or take a tenth of that."""
    assert sum(share["requests"] for share in shares) == requests
    assert sum(share["generated"] for share in shares) == 8 * requests
    for name in ("requests", "prompt", "generated"):
        half = sum(share[name] for share in shares) / 2
        assert all(abs(share[name] - half) <= 0.1 * half for share in shares), (name, shares)


def test_prompts_of_equal_length_are_spread_evenly(replicas: AsyncSGLang) -> None:
    prompts = prompts_of(256)
    completions, shares = done_by(replicas, lambda: replicas.generate(prompts, SAMPLING))
    assert [len(c.output_ids) for c in completions] == [8] * 256
    check_even(shares, requests=256)
    assert sum(share["prompt"] for share in shares) == 256 * 16


@pytest.mark.parametrize(
    ("options", "returns"),
    [
        ({"logit_bias": {7: 1.0}}, {}),
        ({"stop_regex": "zzzz"}, {}),
        ({"top_k": 20}, {"sampling_mask": True}),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_bypasses_the_router_is_spread_evenly(
    replicas: AsyncSGLang, options: dict[str, Any], returns: dict[str, Any]
) -> None:
    if returns:
        needs(replicas, "sampling_mask_tokens")
    batch = [
        GenerateRequest(
            input_ids=ids, sampling=SAMPLING.updated(options), returns=Returns(**returns)
        )
        for ids in prompts_of(64, first=400)
    ]
    assert not any(passes_router(request.bodies(seeded=False)) for request in batch)
    _, shares = done_by(replicas, lambda: replicas.complete(batch))
    check_even(shares, requests=64)


def test_sessions_are_spread_evenly_and_stay(replicas: AsyncSGLang) -> None:
    sessions = [replicas.open_session() for _ in range(8)]
    try:
        homes = [session.worker_url for session in sessions]
        assert sorted(homes) == sorted([worker.url for worker in replicas.workers] * 4)
        for turn in range(2):
            batch = [
                session.request([*session.tokens, *range(20 + 40 * turn + i, 36 + 40 * turn + i)],
                                sampling=SAMPLING)
                for i, session in enumerate(sessions)
            ]  # fmt: skip
            completions, shares = done_by(replicas, lambda batch=batch: replicas.complete(batch))
            assert [share["generated"] for share in shares] == [32, 32]
            assert all((c.cached_tokens >= 16) == (turn == 1) for c in completions)
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize("direct", [False, True], ids=["router", "direct"])
def test_samples_of_a_prompt_share_a_cache(
    replicas: AsyncSGLang, tokenizer: Any, direct: bool
) -> None:
    """One worker alone has a prompt's samples; the next prompt goes to the other.

    By the server's own ``n`` the prompt is computed once. In a batch that goes to a server itself,
    SGLang computes it for each sample, all at once.
    """
    if direct:
        needs(replicas, "sampling_mask_tokens")
    request = GenerateRequest(
        input_ids=range(100 + direct, 148 + direct),
        sampling=SAMPLING.updated({"n": 8, "top_k": 20, "temperature": 3.0}),
        returns=Returns(sampling_mask=direct),
    )
    assert passes_router(request.bodies(seeded=False)) is not direct
    completions, shares = done_by(replicas, lambda: replicas.complete([request]))
    assert sorted(share["generated"] for share in shares) == [0, 64]
    cached = sorted(c.cached_tokens for c in completions)
    # All but the last token, which the first one is sampled from.
    assert direct or cached[1:] == [47] * 7
    assert len({tuple(c.output_ids) for c in completions}) > 1

    many = [
        GenerateRequest(
            input_ids=ids, sampling=request.sampling, returns=request.returns
        )
        for ids in prompts_of(16, first=440 + direct)
    ]  # fmt: skip
    _, shares = done_by(replicas, lambda: replicas.complete(many))
    assert [share["generated"] for share in shares] == [8 * 8 * 8] * 2


def test_the_policy_spreads_and_keeps_samples_together(
    replicas: AsyncSGLang, tokenizer: Any
) -> None:
    policy = SGLangWrapper(
        replicas,
        num_samples=8,
        inplace=False,
        generate_kwargs={"max_new_tokens": 8, "ignore_eos": True},
        extras=["cached_tokens"],
    )
    td = make_input("history", (6,), tokenizer)
    out, shares = done_by(replicas, lambda: policy(td))
    assert out.batch_size == (6, 8)
    assert [share["generated"] for share in shares] == [6 * 8 * 8 // 2] * 2
    cached = out["rollout", "cached_tokens"]
    lengths = [len(row["tokens"].prompt) for row in out[:, 0].unbind(0)]
    for row, length in zip(cached.tolist(), lengths, strict=True):
        assert sorted(row)[1:] == [length - 1] * 7


def test_a_push_reaches_both(replicas: AsyncSGLang, model: Any) -> None:
    pushed = perturb(model, seed=1)
    scheme = SGLangWeightSyncScheme(replicas, num_gpus=2)
    scheme.init_on_sender()
    scheme.connect()
    scheme.send(pushed)
    assert scheme.last_push is not None
    if replicas.info.capabilities.checksum:
        assert scheme.last_push.verified_by == "checksum"
    prompts, sampling = prompts_of(16, length=3), {"max_new_tokens": 8, "ignore_eos": True}
    assert worst_error(pushed, prompts, replicas.generate(prompts, sampling)) < 0.02
    for worker in replicas.workers:
        with connect_like(replicas, worker.url) as one:
            assert one.weight_version == str(scheme.last_push.version)
            assert worst_error(pushed, prompts, one.generate(prompts, sampling)) < 0.02
    scheme.close()


# Those that die: a router, one server, all of them. In this order, on the same servers.


def kill(service: AsyncSGLang, name: str) -> None:
    """Ends a child at once; returns when that is known."""
    fleet = service.servers.fleet
    assert fleet is not None
    child = next(child for child in fleet._children if child.name == name)
    os.kill(descendants(child.pid)[0].pid, signal.SIGKILL)
    wait_until(lambda: child.exit_code is not None, 20.0)


def external(service: AsyncSGLang) -> AsyncSGLang:
    return connect_like(service, service.server_url)


def test_a_router_that_died_is_started_again(
    replicas: AsyncSGLang, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that it had, and new ones, are answered; its log goes on in another file."""
    long = SAMPLING.updated({"max_new_tokens": 100})
    call = threading.Thread(target=lambda: done.extend(replicas.generate(prompts_of(8), long)))
    done: list[Any] = []
    call.start()
    time.sleep(0.5)
    kill(replicas, "router")
    assert replicas.state is ServiceState.BROKEN
    assert len(replicas.generate([5, 6], SAMPLING).output_ids) == 8
    assert re.search(r"router ended with exit code -9 .*router\.log", caplog.text)
    call.join(60.0)
    assert [len(c.output_ids) for c in done] == [100] * 8
    assert replicas.state is ServiceState.SYNCED
    _, shares = done_by(replicas, lambda: replicas.generate(prompts_of(32), SAMPLING))
    check_even(shares, requests=32)
    assert replicas.log_dir is not None
    assert {"router.log", "router.2.log"} <= {path.name for path in replicas.log_dir.iterdir()}


def test_a_router_that_does_not_start_again(
    replicas: AsyncSGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = replicas.servers.fleet
    assert fleet is not None
    wrong = replace(fleet._plan.router, extra_args={"no_such_option": 1})
    with monkeypatch.context() as patched:
        patched.setattr(fleet, "_plan", replace(fleet._plan, router=wrong))
        kill(replicas, "router")
        with pytest.raises(ConnectError, match=r"exit code -9 .*no-such-option") as caught:
            replicas.generate([5, 6], SAMPLING)
        assert "router.2.log" in str(caught.value)
        assert replicas.state is ServiceState.BROKEN
    assert len(replicas.generate([5, 6], SAMPLING).output_ids) == 8
    assert replicas.state is ServiceState.SYNCED


@pytest.mark.slow
def test_what_is_dead_is_known_as_dead(replicas: AsyncSGLang, model: Any) -> None:
    first, second = replicas.managed_urls
    kill(replicas, "server-0")
    replicas.refresh()
    assert [worker.url for worker in replicas.workers] == [second]
    assert replicas.managed_urls == (first, second)
    assert all(len(c.output_ids) == 8 for c in replicas.generate(prompts_of(8), SAMPLING))
    assert replicas.weight_version == asked(replicas.workers[0], "/model_info")["weight_version"]
    replicas.flush_cache()
    with replicas.open_session() as session:
        assert session.worker_url == second
    with pytest.warns(RuntimeWarning, match=f"don't answer: {first}.*refresh"):
        attached = external(replicas)
    with attached:
        assert [worker.url for worker in attached.workers] == [second]
        assert attached.cluster.silent == (first,)
        assert len(attached.generate([5, 6], SAMPLING).output_ids) == 8
    replicas.restart_workers([first])
    scheme = SGLangWeightSyncScheme(replicas)
    scheme.connect()
    scheme.send(model)
    scheme.close()
    assert {worker.url for worker in replicas.workers} == {first, second}
    assert replicas.state is ServiceState.SYNCED


def test_one_that_a_push_does_not_reach_leaves_the_router(
    replicas: AsyncSGLang, model: Any
) -> None:
    """It would come back with other weights."""
    first, second = replicas.managed_urls
    kill(replicas, "server-1")
    with pytest.warns(RuntimeWarning, match="don't answer"):
        attached = external(replicas)
    with attached:
        scheme = SGLangWeightSyncScheme(attached)
        scheme.connect()
        scheme.send(perturb(model, seed=3))
        scheme.close()
        routed = asked(attached.servers.front, "/workers")["workers"]
        assert [worker["url"] for worker in routed] == [first]
    replicas.drop_worker(second)
    assert [worker.url for worker in replicas.workers] == [first]
    assert len(replicas.generate([5, 6], SAMPLING).output_ids) == 8


def test_when_every_server_died(replicas: AsyncSGLang) -> None:
    kill(replicas, "server-0")
    assert replicas.state is ServiceState.BROKEN
    begun = time.monotonic()
    with pytest.raises(
        NoWorkersError, match=r"server-0 ended with exit code -9 .*server-0(\.2)?\.log"
    ):
        replicas.generate([5, 6], SAMPLING)
    replicas.refresh()
    with pytest.raises(NoWorkersError, match="restart_workers"):
        replicas.generate([5, 6], SAMPLING)
    replicas.servers.versions.others_push = True  # so that the servers have to be asked
    with pytest.raises(NoWorkersError, match="restart_workers"):
        replicas.generate([5, 6], SAMPLING)
    assert time.monotonic() - begun < 2.0
    with pytest.raises(ConnectError, match="nothing answers"):
        external(replicas)
