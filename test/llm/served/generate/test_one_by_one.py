"""One completion after the other, and a loop that is left early."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy, WatchingProxy
from helpers.marks import IDLE
from helpers.rows import token_rows
from helpers.servers import connect_like, num_under_way, wait_until, worst_error
from helpers.under_way import requests_of
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper, Timeouts
from torchrl_sglang.errors import (
    EmptyBatchError,
    InputError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServiceClosedError,
)

pytestmark = IDLE

GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}

SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)

LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds


# As completed


def forms(service: AsyncSGLang) -> dict[str, Callable[[list[GenerateRequest]], Any]]:
    """Both faces, as a list of what they yield."""

    async def drained(requests: list[GenerateRequest]) -> list[Any]:
        return [one async for one in service.aas_completed(requests)]

    return {
        "blocking": lambda requests: list(service.as_completed(requests)),
        "awaited": lambda requests: asyncio.run(drained(requests)),
    }


@pytest.mark.parametrize("form", ["blocking", "awaited"])
def test_early_finishers_come_first(service: AsyncSGLang, model: Any, form: str) -> None:
    lengths = [300, 30, 600, 120, 1]
    requests = requests_of(*(SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths))
    finished = forms(service)[form](requests)
    assert [len(group[0].output_ids) for _, group in finished] == sorted(lengths)
    for index, group in finished:
        assert len(group) == 1
        assert group[0].rid == requests[index].rid
        assert len(group[0].output_ids) == lengths[index]
    prompts = [list(requests[index].input_ids or ()) for index, _ in finished]
    assert worst_error(model, prompts, [group[0] for _, group in finished]) < 0.02


def test_the_first_is_there_while_the_last_is_generated(service: AsyncSGLang) -> None:
    iterator = service.as_completed(requests_of(LONG, SHORT))
    index, group = next(iterator)
    assert (index, len(group[0].output_ids)) == (1, 4)
    wait_until(lambda: num_under_way(service) == 1)


@pytest.mark.parametrize("form", ["blocking", "awaited"])
def test_the_samples_of_a_prompt_come_together(service: AsyncSGLang, form: str) -> None:
    finished = forms(service)[form](requests_of(SHORT.updated({"n": 3}), SHORT))
    assert sorted((index, len(group)) for index, group in finished) == [(0, 3), (1, 1)]


def leave_blocking(service: AsyncSGLang, requests: list[GenerateRequest]) -> None:
    for index, _ in service.as_completed(requests):
        assert index == 1
        break


def leave_awaited(service: AsyncSGLang, requests: list[GenerateRequest]) -> None:
    async def main() -> None:
        async for index, _ in service.aas_completed(requests):
            assert index == 1
            break

    asyncio.run(main())


def leave_closing(service: AsyncSGLang, requests: list[GenerateRequest]) -> None:
    async def main() -> None:
        iterator = service.aas_completed(requests)
        assert (await anext(iterator))[0] == 1
        await iterator.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)

    asyncio.run(main())


def leave_by_an_error(service: AsyncSGLang, requests: list[GenerateRequest]) -> None:
    def rewarded(index: int) -> None:
        raise KeyError(index)

    with contextlib.suppress(KeyError):
        for index, _ in service.as_completed(requests):
            rewarded(index)


def leave_by_cancelling(service: AsyncSGLang, requests: list[GenerateRequest]) -> None:
    """While it waits for the next: nobody may go on waiting for it."""

    async def consume(waiting: asyncio.Event) -> None:
        async for _ in service.aas_completed(requests):
            waiting.set()

    async def main() -> None:
        waiting = asyncio.Event()
        consumer = asyncio.create_task(consume(waiting))
        await waiting.wait()
        await asyncio.sleep(0.05)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer

    asyncio.run(main())


@pytest.mark.parametrize(
    "leave",
    [leave_blocking, leave_awaited, leave_closing, leave_by_an_error, leave_by_cancelling],
)
def test_leaving_the_loop_early_aborts_the_rest(
    watched: AsyncSGLang,
    watching: WatchingProxy,
    leave: Callable[[AsyncSGLang, list[GenerateRequest]], None],
) -> None:
    requests = requests_of(LONG, SHORT, LONG)
    leave(watched, requests)
    wait_until(lambda: len(watching.left) == 2)
    assert sorted(watching.left) == sorted([requests[0].rid, requests[2].rid])
    assert watched.generate([5, 6], GREEDY).output_ids


@pytest.mark.parametrize("form", ["blocking", "awaited"])
def test_an_error_says_which_prompt_and_ends_the_others(
    watched: AsyncSGLang, watching: WatchingProxy, form: str
) -> None:
    requests = requests_of(LONG, LONG, LONG)
    requests[1] = GenerateRequest(input_ids=(5, 6), sampling=SamplingParams(regex="(["))
    with pytest.raises(RequestRefusedError) as caught:
        forms(watched)[form](requests)
    assert caught.value.__notes__ == ["prompt 1 of the batch, attempt 1"]
    wait_until(lambda: len(watching.left) == 2)


def test_what_was_finished_before_an_error_comes(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    requests = requests_of(SHORT, SamplingParams(max_new_tokens=200, ignore_eos=True))
    proxy.faults["/generate"] = Fault(
        garble=lambda answer: b"[]" if requests[1].rid.encode() in answer else answer
    )
    seen: list[int] = []
    with pytest.raises(ResponseError, match=requests[1].rid) as caught:
        seen.extend(index for index, _ in proxied.as_completed(requests))
    assert seen == [0]
    assert caught.value.__notes__ == ["prompt 1 of the batch, attempt 1"]


@pytest.mark.parametrize("form", ["blocking", "awaited"])
def test_the_whole_is_bounded(proxy: FaultProxy, service: AsyncSGLang, form: str) -> None:
    timeouts = Timeouts(request_s=1.0)
    with AsyncSGLang.connect(proxy.url, api_key=service.api_key, timeouts=timeouts) as external:
        proxy.faults["/generate"] = Fault(delay_s=30.0)
        start = time.monotonic()
        with pytest.raises(RequestTimeoutError, match="request_s"):
            forms(external)[form](requests_of(SHORT, SHORT))
        assert time.monotonic() - start < 3.0


@pytest.mark.parametrize("form", ["blocking", "awaited"])
def test_shutdown_meanwhile(attached: AsyncSGLang, service: AsyncSGLang, form: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        loop = pool.submit(forms(attached)[form], requests_of(LONG, SHORT, LONG))
        wait_until(lambda: num_under_way(service) == 2)
        start = time.monotonic()
        attached.shutdown()
        assert isinstance(loop.exception(10.0), ServiceClosedError)
        assert time.monotonic() - start < 5.0
    with pytest.raises(ServiceClosedError):
        forms(attached)[form](requests_of(SHORT))


def test_shutdown_at_any_moment_leaves_nobody_waiting(service: AsyncSGLang) -> None:
    """Also before the first request is on its way."""
    for delay_s in (0.0, 0.001, 0.005, 0.02, 0.05):
        external = connect_like(service, admin_api_key=None)
        external.generate([5, 6], {"max_new_tokens": 1})
        with ThreadPoolExecutor(2) as pool:
            loop = pool.submit(list, external.as_completed(requests_of(SHORT, SHORT)))
            call = pool.submit(asyncio.run, external.acomplete(requests_of(SHORT)))
            time.sleep(delay_s)
            external.shutdown()
            for future in (loop, call):
                error = future.exception(10.0)
                assert error is None or isinstance(error, ServiceClosedError)


def test_wrong_requests_raise_before_anything_is_sent(
    proxied: AsyncSGLang, proxy: FaultProxy
) -> None:
    proxy.seen.clear()
    too_long = GenerateRequest(input_ids=(5,) * 4000, sampling=SHORT)
    with pytest.raises(InputError):
        proxied.as_completed([*requests_of(SHORT), too_long])
    with pytest.raises(EmptyBatchError):
        proxied.as_completed([])
    assert "/generate" not in [path for path, _ in proxy.seen]


def test_a_loop_that_is_never_begun_sends_nothing(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    iterator = proxied.as_completed(requests_of(SHORT))
    time.sleep(0.1)
    assert "/generate" not in [path for path, _ in proxy.seen]
    assert len(list(iterator)) == 1


# Ctrl-C


@contextlib.contextmanager
def ctrl_c_once(holds: Callable[[], Any]) -> Iterator[None]:
    """Interrupts the main thread as Ctrl-C does, when something holds."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def watch() -> None:
        wait_until(holds)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


CALLS: dict[str, Callable[[AsyncSGLang], Any]] = {
    "complete": lambda service: service.complete(requests_of(LONG, LONG)),
    "as_completed": lambda service: list(service.as_completed(requests_of(LONG, LONG))),
    "policy": lambda service: SGLangWrapper(service, input_mode="tokens")(
        token_rows([5, 6], [7, 8]), max_new_tokens=1900, ignore_eos=True
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_aborts_on_the_server(
    watched: AsyncSGLang, watching: WatchingProxy, call: str
) -> None:
    with ctrl_c_once(lambda: num_under_way(watched) == 2), pytest.raises(KeyboardInterrupt):
        CALLS[call](watched)
    wait_until(lambda: len(watching.left) == 2)
    assert watched.generate([5, 6], GREEDY).output_ids
