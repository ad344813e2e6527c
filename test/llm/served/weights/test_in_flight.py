"""Prefixes and requests that a push meets: none runs on weights that it should not."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from helpers.asserts import error_of
from helpers.prompts import EIGHT_PROMPTS
from helpers.servers import (
    Connect,
    hf_log_probs,
    needs_version_spans,
    num_running,
    perturb,
    wait_until,
    worst_error,
)
from torchrl_sglang import AsyncSGLang, WeightSyncConfig
from torchrl_sglang.generate.generator import Generator
from torchrl_sglang.weights.targets import Targets

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}


def test_a_prefix_cached_before_the_push_is_not_used_after(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected()
    prompt = list(range(100, 164))
    service.generate(prompt, SAMPLING)
    assert service.generate(prompt, SAMPLING).cached_tokens > 32
    scheme.send(perturb(model, seed=5))
    completion = service.generate(prompt, SAMPLING)
    assert completion.cached_tokens == 0
    assert worst_error(model, [prompt], [completion]) < 0.02
    assert service.generate(prompt, SAMPLING).cached_tokens > 32  # hits within a version go on


def test_without_salt_and_flush_stale_prefixes_would_be_used(
    service: AsyncSGLang, model: Any, connected: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above guards against does happen, so it can fail."""
    monkeypatch.setattr(Generator, "_cache_salt", lambda self, version: "always the same")
    scheme = connected(config=WeightSyncConfig(flush_cache=False))
    prompt = list(range(100, 164))
    service.generate(prompt, SAMPLING)
    scheme.send(perturb(model, seed=6))
    assert service.generate(prompt, SAMPLING).cached_tokens > 32


@pytest.mark.parametrize("pause_mode", ["retract", "in_place", "abort"])
def test_requests_posted_during_a_push(
    service: AsyncSGLang,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
    pause_mode: Any,
) -> None:
    """They wait, and what they return was sampled by the new weights."""
    scheme = connected(config=WeightSyncConfig(pause_mode=pause_mode))
    perturb(model, seed=7)
    paused, results = threading.Event(), []
    original = Targets.begin

    def begin_when_others_wait(targets: Targets) -> None:
        paused.set()
        time.sleep(0.3)  # the others post into the pause
        original(targets)

    def generate() -> None:
        assert paused.wait(20.0)
        results.append(service.generate(EIGHT_PROMPTS, SAMPLING))

    monkeypatch.setattr(Targets, "begin", begin_when_others_wait)
    thread = threading.Thread(target=generate)
    thread.start()
    scheme.send(model)
    thread.join(60.0)
    assert worst_error(model, EIGHT_PROMPTS, results[0]) < 0.02


@pytest.mark.slow
def test_requests_in_flight_when_a_push_comes(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """They go on under the new weights, and every token says which weights sampled it."""
    scheme = connected()
    long = {"max_new_tokens": 1200, "ignore_eos": True}
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.extend(service.generate(EIGHT_PROMPTS[:4], long))
    )
    thread.start()
    wait_until(lambda: num_running(service) >= 4, 20.0)  # each has a token by then
    scheme.send(perturb(model, seed=8))
    thread.join(120.0)
    assert len(results) == 4
    assert all(len(completion.output_ids) == 1200 for completion in results)
    needs_version_spans(service)
    for completion in results:
        versions = [span.version for span in completion.version_spans]
        assert len(versions) == 2
        assert versions[1] == str(scheme.last_push.version)  # type: ignore[union-attr]


# Requests in flight


def in_flight_prompt(index: int) -> list[int]:
    return list(range(20 + index, 40 + index))


def in_flight(service: AsyncSGLang, tokens: int) -> tuple[threading.Thread, list[Any]]:
    """Four long requests that run by now, and where their completions will be."""
    results: list[Any] = []
    sampling = {"max_new_tokens": tokens, "ignore_eos": True}
    prompts = [in_flight_prompt(index) for index in range(4)]
    thread = threading.Thread(target=lambda: results.extend(service.generate(prompts, sampling)))
    thread.start()
    wait_until(lambda: num_running(service) >= 4, 20.0)  # each has a token by then
    return thread, results


@pytest.mark.slow
@pytest.mark.parametrize("pause_mode", ["retract", "in_place"])
def test_what_requests_in_flight_go_on_with(
    service: AsyncSGLang, model: Any, connected: Connect, pause_mode: Any
) -> None:
    """No token is lost. In place the old weights' cache is kept, else it is computed anew."""
    needs_version_spans(service)
    scheme = connected(config=WeightSyncConfig(pause_mode=pause_mode))
    thread, results = in_flight(service, 800)
    scheme.send(perturb(model, seed=35, scale=0.3))
    push = scheme.last_push
    assert push is not None
    thread.join(120.0)
    assert len(results) == 4
    errors = []
    for index, completion in enumerate(results):
        assert len(completion.output_ids) == 800
        _, after = completion.version_spans
        assert after.version == str(push.version)
        ours = hf_log_probs(model, in_flight_prompt(index), completion.output_ids)
        pairs = zip(completion.log_probs[after.start :], ours[after.start :], strict=True)
        errors.append(max(abs(a - b) for a, b in pairs))
    if service.info.capabilities.update_session:  # since SGLang 0.5.23; see PushResult.flushed
        assert push.flushed == (pause_mode == "retract")
    assert push.flushed <= (pause_mode == "retract")
    if push.flushed or pause_mode == "in_place":
        assert (max(errors) < 0.02) == push.flushed
    assert error_of(service, model) < 0.02
