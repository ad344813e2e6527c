"""Requests that take long, and what a server has of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from helpers.servers import asked, wait_until
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams
from torchrl_sglang.servers.threads import in_thread


def requests_of(*samplings: SamplingParams, **fields: Any) -> list[GenerateRequest]:
    return [
        GenerateRequest(input_ids=(5, 6, 7 + index), sampling=sampling, **fields)
        for index, sampling in enumerate(samplings)
    ]


def load(service: AsyncSGLang) -> tuple[int, int]:
    """How many requests the server works on, and how many wait in its queue."""
    loads = asked(service.workers[0], "/v1/loads")["loads"][0]
    return loads["num_running_reqs"], loads["num_waiting_reqs"]


def once_running(service: AsyncSGLang, count: int, call: Callable[[], Any]) -> Future[Any]:
    """``call`` in a thread, which returns once the server has so many requests and has begun."""
    future: Future[Any] = in_thread(call, "test")

    def settled() -> bool:
        """As many as are meant to be left, now and a moment later."""
        if sum(load(service)) != count:
            return future.done()
        time.sleep(0.2)
        return sum(load(service)) == count

    wait_until(settled)
    return future


SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)


def request_of(*ids: int, sampling: SamplingParams = SAMPLING) -> GenerateRequest:
    return GenerateRequest(input_ids=ids, sampling=sampling)
