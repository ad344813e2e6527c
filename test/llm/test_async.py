"""Generation without blocking: awaited, many at once, and one completion after the other."""

from __future__ import annotations

from helpers.servers import connect_like
import asyncio
import contextlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from aiohttp import web
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import asked, worst_error
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Tokens

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper, Timeouts
from torchrl_sglang.errors import (
    EmptyBatchError,
    InputError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServiceBrokenError,
    ServiceClosedError,
    UnsupportedOptionError,
)
from torchrl_sglang.policy import call
from torchrl_sglang.service import local

GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}
SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds
# SGLang looks every 4 s whether a client is still there.
NOTICED_WITHIN_S = 9.0


def requests_of(*samplings: SamplingParams) -> list[GenerateRequest]:
    return [
        GenerateRequest(input_ids=(5, 6, 7 + index), sampling=sampling)
        for index, sampling in enumerate(samplings)
    ]


def num_running(service: AsyncSGLang) -> int:
    """Requests that the server works on, or has in its queue."""
    load = asked(service.workers[0], "/v1/loads")["loads"][0]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def wait_until(holds: Callable[[], Any], within_s: float = 10.0) -> float:
    """Seconds until it came about."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < within_s, "it did not come about"
        time.sleep(0.02)
    return time.monotonic() - start


async def until(holds: Callable[[], Any], within_s: float = 10.0) -> float:
    return await asyncio.to_thread(wait_until, holds, within_s)


@pytest.fixture(autouse=True)
def idle(service: AsyncSGLang) -> Iterator[None]:
    """Nothing of one test is left to the next."""
    yield
    service.abort()
    wait_until(lambda: not num_running(service))


class WatchingProxy(FaultProxy):
    """Tells at once which clients went away before they had their answer."""

    left: list[str]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await super()._handle(request)
        except asyncio.CancelledError:
            self.left.append(json.loads(await request.read())["rid"])
            raise


@pytest.fixture
def watching(service: AsyncSGLang) -> Iterator[WatchingProxy]:
    with WatchingProxy(service.workers[0].url) as proxy:
        proxy.left = []
        yield proxy


@pytest.fixture
def watched(service: AsyncSGLang, watching: WatchingProxy) -> Iterator[AsyncSGLang]:
    """A service whose connections are watched."""
    with connect_like(service, watching.url) as external:
        yield external


def token_rows(*prompts: list[int]) -> TensorDict:
    return lazy_stack(
        [
            TensorDict(tokens=Tokens(prompt=torch.tensor(p), batch_size=()), batch_size=())
            for p in prompts
        ]
    )


def chat_rows(*questions: str) -> TensorDict:
    histories = History.from_chats([[{"role": "user", "content": q}] for q in questions])
    return lazy_stack(
        [TensorDict(history=ChatHistory(prompt=h, batch_size=()), batch_size=()) for h in histories]
    )


# Awaited


@pytest.mark.parametrize("mode", ["tokens", "history"])
def test_the_policy_awaited_is_the_policy_called(service: AsyncSGLang, mode: str) -> None:
    policy = SGLangWrapper(service, input_mode=mode, generate_kwargs=GREEDY, inplace=False)

    def made() -> TensorDict:
        return token_rows([5, 6], [7, 8, 9]) if mode == "tokens" else chat_rows("hello", "no")

    called, awaited = policy(made()), asyncio.run(policy.agenerate(made()))
    assert set(called.keys()) == set(awaited.keys())
    for one, other in zip(called.unbind(0), awaited.unbind(0), strict=True):
        assert one["tokens"].full.tolist() == other["tokens"].full.tolist()
        assert one["text"].full == other["text"].full
        torch.testing.assert_close(
            one["log_probs"].response, other["log_probs"].response, atol=0.02, rtol=0
        )


def test_what_the_policy_takes_it_takes_awaited(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=GREEDY)
    td = token_rows([5, 6], [7, 8, 9])
    target = TensorDict(kept=torch.arange(2), batch_size=2)
    out = asyncio.run(policy.agenerate(td, tensordict_out=target, max_new_tokens=2))
    assert out is target
    assert "tokens" in out
    assert "text" not in td
    assert [len(row["tokens"].response) for row in out.unbind(0)] == [2, 2]
    assert asyncio.run(policy.agenerate(td)) is td
    with pytest.raises(EmptyBatchError):
        asyncio.run(policy.agenerate(token_rows([5])[:0]))


def test_what_takes_time_is_done_in_threads(
    attached: AsyncSGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attaching, reading prompts, making outputs: the event loop of the caller does none of it."""
    policy = SGLangWrapper(attached, generate_kwargs=GREEDY, inplace=False)
    seen: dict[str, threading.Thread] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            seen[name] = threading.current_thread()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    watch(local, "attach")
    watch(call, "read_prompts")
    watch(call, "build_outputs")
    watch(SGLangWrapper, "_place")
    copied = pickle.loads(pickle.dumps(policy))  # attaches on first use
    with copied.service:
        out = asyncio.run(copied.agenerate(chat_rows("hello", "no")))
    assert out.batch_size == (2,)
    assert set(seen) == {"attach", "read_prompts", "build_outputs", "_place"}
    assert threading.main_thread() not in seen.values()


def test_a_policy_that_batches_over_threads_is_not_awaited(service: AsyncSGLang) -> None:
    for sizes in ({"batching": True}, {"min_batch_size": 2}):
        policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=GREEDY, **sizes)
        with pytest.raises(UnsupportedOptionError, match="min_batch_size"):
            asyncio.run(policy.agenerate(token_rows([5, 6])))


def test_many_awaited_at_once(service: AsyncSGLang, model: Any) -> None:
    """All in flight together, whoever asks; each gets its own."""
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs={"max_new_tokens": 40, "ignore_eos": True}
    )
    prompts = [[5, 6, 20 + index] for index in range(24)]
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, await asyncio.to_thread(num_running, service))

    async def main() -> Any:
        watcher = asyncio.create_task(watch())
        try:
            return await asyncio.gather(
                *(policy.agenerate(token_rows(prompt)) for prompt in prompts[:12]),
                *(service.agenerate(prompt, {"max_new_tokens": 40}) for prompt in prompts[12:]),
            )
        finally:
            watcher.cancel()

    outs = asyncio.run(main())
    assert [out[0]["tokens"].prompt.tolist() for out in outs[:12]] == prompts[:12]
    assert worst_error(model, prompts[12:], outs[12:]) < 0.02
    assert most > 12


def test_several_event_loops(service: AsyncSGLang) -> None:
    """One after the other, and in several threads at once: the service has a loop of its own."""
    expected = service.generate([5, 6, 7], GREEDY).output_ids
    for _ in range(2):
        assert asyncio.run(service.agenerate([5, 6, 7], GREEDY)).output_ids == expected
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(asyncio.run, service.agenerate([5, 6, 7], GREEDY)) for _ in range(4)]
        assert [run.result().output_ids for run in runs] == [expected] * 4


def test_the_callers_loop_is_not_blocked(service: AsyncSGLang, proxied: AsyncSGLang) -> None:
    """Neither by generating nor by a push that requests wait for."""

    async def main() -> int:
        proxied.gate.begin()
        call = asyncio.create_task(proxied.agenerate([5, 6], {"max_new_tokens": 200}))
        beats = 0
        while not call.done():
            await asyncio.sleep(0.01)
            beats += 1
            if beats == 20:
                proxied.gate.commit()
        await call
        return beats

    assert asyncio.run(main()) > 20


def test_errors_are_those_of_a_blocking_call(service: AsyncSGLang, attached: AsyncSGLang) -> None:
    with pytest.raises(EmptyBatchError):
        asyncio.run(service.agenerate([]))
    with pytest.raises(RequestRefusedError) as caught:
        asyncio.run(service.agenerate([[5, 6], [7, 8]], {"regex": "(["}))
    assert "attempt 1" in caught.value.__notes__[0]
    attached.gate.begin()
    attached.gate.fail(RuntimeError("half a push"))
    with pytest.raises(ServiceBrokenError, match="half a push"):
        asyncio.run(attached.agenerate([5, 6], GREEDY))


# Cancelled


def test_cancelling_frees_the_server(service: AsyncSGLang, attached: AsyncSGLang) -> None:
    """Through the router, which closes its own connection then, and without one."""
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs={"ignore_eos": True})
    assert service.cluster.behind_router
    assert not attached.cluster.behind_router

    async def main() -> float:
        calls = [
            policy.agenerate(token_rows(*[[5, 6]] * 15), max_new_tokens=LONG.max_new_tokens),
            attached.acomplete(requests_of(*[LONG] * 15)),
        ]
        tasks = [asyncio.create_task(call) for call in calls]
        # More than fit at once: on their own they would take far longer than is waited for.
        await until(lambda: num_running(service) == 30)
        for task in tasks:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await until(lambda: not num_running(service), NOTICED_WITHIN_S)

    assert asyncio.run(main()) < NOTICED_WITHIN_S
    assert service.generate([5, 6], GREEDY).output_ids


def test_a_timeout_around_a_call(watched: AsyncSGLang, watching: WatchingProxy) -> None:
    """What else is asked of the service goes on."""
    requests = requests_of(LONG, LONG, LONG)
    watching.seen.clear()

    async def main() -> Any:
        other = asyncio.create_task(watched.agenerate([5, 6, 7], {"max_new_tokens": 300}))
        call = asyncio.create_task(watched.acomplete(requests))
        await until(lambda: [path for path, _ in watching.seen].count("/generate") == 4)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call
        await until(lambda: len(watching.left) == 3)
        return await other

    assert asyncio.run(main()).finish_type in ("stop", "length")
    assert sorted(watching.left) == sorted(request.rid for request in requests)


def test_one_of_a_group_that_fails_cancels_the_others(
    watched: AsyncSGLang, watching: WatchingProxy
) -> None:
    requests = requests_of(LONG)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(watched.acomplete(requests))
            await until(lambda: num_running(watched))
            group.create_task(watched.agenerate([5, 6], {"regex": "(["}))

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    assert [type(error) for error in caught.value.exceptions] == [RequestRefusedError]
    wait_until(lambda: watching.left == [requests[0].rid])


def test_cancelling_while_a_push_is_waited_for(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """Nothing is sent, then or later."""
    proxy.seen.clear()

    async def main() -> None:
        proxied.gate.begin()
        call = asyncio.create_task(proxied.agenerate([5, 6], GREEDY))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        proxied.gate.commit()
        await asyncio.sleep(0.2)

    asyncio.run(main())
    assert "/generate" not in [path for path, _ in proxy.seen]


def test_shutdown_while_awaited(attached: AsyncSGLang) -> None:
    async def main() -> BaseException | None:
        call = asyncio.create_task(attached.acomplete(requests_of(LONG)))
        await until(lambda: num_running(attached))
        await asyncio.to_thread(attached.shutdown)
        return (await asyncio.gather(call, return_exceptions=True))[0]

    assert isinstance(asyncio.run(main()), ServiceClosedError)


def test_a_cancellation_during_shutdown_stays_one(attached: AsyncSGLang) -> None:
    async def main() -> None:
        call = asyncio.create_task(attached.acomplete(requests_of(LONG)))
        await until(lambda: num_running(attached))
        attached.gate.close()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())


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
    wait_until(lambda: num_running(service) == 1)


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
        wait_until(lambda: num_running(service) == 2)
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
    with ctrl_c_once(lambda: num_running(watched) == 2), pytest.raises(KeyboardInterrupt):
        CALLS[call](watched)
    wait_until(lambda: len(watching.left) == 2)
    assert watched.generate([5, 6], GREEDY).output_ids
