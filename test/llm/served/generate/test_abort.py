"""Aborting requests: one, all, those that wait, and what their callers get."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.marks import IDLE
from helpers.parts import reasons, split
from helpers.rows import rows_of, token_rows
from helpers.servers import needs, told, wait_until
from helpers.under_way import load, once_running, requests_of
from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper
from torchrl_sglang.errors import RequestAbortedError, ServerFailedError, UnsupportedOptionError
from torchrl_sglang.generate.request import Returns

pytestmark = IDLE

SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)

LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds


# The service


def test_one_request(service: AsyncSGLang) -> None:
    requests = requests_of(LONG, LONG, partial_allowed=True)
    future = once_running(service, 2, lambda: service.complete(requests))
    service.abort(requests[1].rid)
    wait_until(lambda: load(service)[0] == 1)
    service.abort(requests[0].rid)
    first, second = future.result(10.0)
    assert (first.finish_type, second.finish_type) == ("abort", "abort")
    assert 0 < len(second.output_ids) < len(first.output_ids) < 1900
    assert len(second.log_probs) == len(second.output_ids)
    assert second.version_spans[-1].end == len(second.output_ids)


def test_all_requests_of_all_clients(service: AsyncSGLang, attached: AsyncSGLang) -> None:
    ours = once_running(
        service, 2, lambda: service.complete(requests_of(LONG, LONG, partial_allowed=True))
    )
    theirs = once_running(service, 3, lambda: attached.complete(requests_of(LONG)))
    service.abort()
    assert [c.finish_type for c in ours.result(10.0)] == ["abort", "abort"]
    with pytest.raises(RequestAbortedError, match=r"aborted after \d+ tokens") as caught:
        theirs.result(10.0)
    assert caught.value.__notes__ == ["prompt 0 of the batch, attempt 1"]


def test_requests_that_wait_in_the_servers_queue(service: AsyncSGLang) -> None:
    """They have nothing yet, and are as partial as the others."""
    requests = requests_of(*[LONG] * 40, partial_allowed=True)
    future = once_running(service, 40, lambda: service.complete(requests))
    wait_until(lambda: load(service)[1])
    service.abort()
    completions = future.result(10.0)
    assert {c.finish_type for c in completions} == {"abort"}
    empty = [c for c in completions if not c.output_ids]
    assert 0 < len(empty) < 40
    for request, completion in zip(requests, completions, strict=True):
        assert completion.rid == request.rid
        assert completion.prompt_tokens == 3
        assert len(completion.log_probs) == len(completion.output_ids)
        assert completion.version_spans[-1].end == len(completion.output_ids)


def test_every_extra_of_a_request_that_waits_in_the_queue(service: AsyncSGLang) -> None:
    needs(service, "sampling_mask_tokens")
    returns = Returns(input_log_probs=True, top_log_probs=2, sampling_mask=True)
    sampling = LONG.updated({"top_k": 5})
    requests = requests_of(*[sampling] * 40, partial_allowed=True, returns=returns)
    future = once_running(service, 40, lambda: service.complete(requests))
    wait_until(lambda: load(service)[1])
    service.abort()
    for completion in future.result(10.0):
        length = len(completion.output_ids)
        assert len(completion.top_log_probs) == len(completion.sampling_mask) == length
        assert len(completion.sampling_log_probs) == length
        assert (completion.input_log_probs is None) == (length == 0)


def test_older_servers_say_nothing_of_what_waits(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """SGLang 0.5.17 answers 499 for a request that it aborts in its queue."""
    proxy.faults["/generate"] = Fault(status=499)
    with pytest.raises(RequestAbortedError, match="before it ran"):
        proxied.complete(requests_of(SHORT))
    needs(proxied, "sampling_mask_tokens")
    returns = Returns(top_log_probs=2, sampling_mask=True)
    sampling = SHORT.updated({"top_k": 5})
    requests = requests_of(
        sampling, sampling.updated({"n": 2}), partial_allowed=True, returns=returns
    )
    completions = proxied.complete(requests)
    assert [c.finish_type for c in completions] == ["abort"] * 3
    assert [c.output_ids for c in completions] == [[]] * 3
    assert [c.prompt_tokens for c in completions] == [3] * 3
    assert completions[0].log_probs == completions[0].sampling_mask == []
    policy = SGLangWrapper(
        proxied, input_mode="tokens", partial_rollouts=True, extras={"top_log_probs": 2}
    )
    out = policy(token_rows([5, 6], [7, 8]), max_new_tokens=4, ignore_eos=True)
    assert reasons(out) == ["abort"] * 2
    proxy.faults.clear()
    out = policy.resume(out, max_new_tokens=4, ignore_eos=True)
    assert [len(split(row)[1]) for row in rows_of(out)] == [4, 4]


@pytest.mark.parametrize("masked", [False, True])
def test_requests_that_were_retracted(service: AsyncSGLang, masked: bool) -> None:
    """They keep what the server had sent of them; what lacks a mask that was asked for goes."""
    needs(service, *(["sampling_mask_tokens"] if masked else []))
    sampling = LONG.updated({"top_k": 5}) if masked else LONG
    returns = Returns(sampling_mask=masked)
    requests = requests_of(sampling, sampling, partial_allowed=True, returns=returns)
    future = once_running(service, 2, lambda: service.complete(requests))
    time.sleep(1.5)  # answers that are not streamed are handed over every 50 tokens
    worker = service.workers[0]
    told(worker, "/pause_generation", {"mode": "retract"})
    try:
        service.abort()
        completions = future.result(10.0)
    finally:
        told(worker, "/continue_generation")
    for completion in completions:
        assert completion.finish_type == "abort"
        assert len(completion.log_probs) == len(completion.output_ids)
        assert bool(completion.output_ids) == (not masked)


def test_without_partial_rollouts_it_raises(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs={"ignore_eos": True})
    td = token_rows([5, 6], [7, 8])
    future = once_running(service, 2, lambda: policy(td, max_new_tokens=1900))
    service.abort()
    with pytest.raises(RequestAbortedError):
        future.result(10.0)
    assert set(td.keys()) == {"tokens"}  # nothing was written


def test_an_unknown_id_is_no_error(service: AsyncSGLang) -> None:
    service.abort("somebody-else")
    assert service.generate([5, 6], SHORT).output_ids


def test_a_request_that_was_sent_again(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """Under the id that the caller knows, though its second attempt has another."""
    proxy.faults["/generate"] = Fault(status=503, times=1)
    (request,) = requests_of(LONG, partial_allowed=True)
    future = once_running(proxied, 1, lambda: proxied.complete([request]))
    proxied.abort(request.rid)
    (completion,) = future.result(10.0)
    assert completion.finish_type == "abort"
    assert completion.rid != request.rid


def test_samples_of_one_prompt(service: AsyncSGLang) -> None:
    """The server gives them ids of its own, so that only all can be aborted, or none."""
    (request,) = requests_of(LONG.updated({"n": 3}), partial_allowed=True)
    future = once_running(service, 3, lambda: service.complete([request]))
    with pytest.raises(UnsupportedOptionError, match="several samples"):
        service.abort(request.rid)
    service.abort()
    assert [c.finish_type for c in future.result(10.0)] == ["abort"] * 3


def test_samples_with_ids_of_our_own(service: AsyncSGLang) -> None:
    needs(service, "sampling_mask_tokens")
    (request,) = requests_of(
        LONG.updated({"n": 3, "top_k": 5}),
        partial_allowed=True,
        returns=Returns(sampling_mask=True),
    )
    future = once_running(service, 3, lambda: service.complete([request]))
    service.abort(request.rid)
    assert [c.finish_type for c in future.result(10.0)] == ["abort"] * 3


def test_a_server_that_does_not_take_the_order(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/abort_request"] = Fault(status=500)
    with pytest.raises(ServerFailedError, match="injected"):
        proxied.abort()


def test_awaited_and_one_by_one(service: AsyncSGLang) -> None:
    requests = requests_of(LONG, SHORT, partial_allowed=True)

    async def main() -> list[Any]:
        seen = []
        async for index, group in service.aas_completed(requests):
            seen.append((index, group[0].finish_type))
            await asyncio.to_thread(service.abort, requests[0].rid)
        return seen

    assert asyncio.run(main()) == [(1, "length"), (0, "abort")]
