"""Generation without blocking: awaited, many at once, and cancelled."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from helpers.fault_proxy import FaultProxy, WatchingProxy
from helpers.marks import IDLE
from helpers.rows import token_rows
from helpers.servers import num_under_way, wait_until, worst_error
from helpers.under_way import requests_of
from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper
from torchrl_sglang.errors import (
    EmptyBatchError,
    RequestRefusedError,
    ServiceBrokenError,
    ServiceClosedError,
    UnsupportedOptionError,
)
from torchrl_sglang.policy import call
from torchrl_sglang.policy.outputs import writer
from torchrl_sglang.servers import members

pytestmark = IDLE

GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}

LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds

# SGLang looks every 4 s whether a client is still there.
NOTICED_WITHIN_S = 9.0


async def until(holds: Callable[[], Any], within_s: float = 10.0) -> float:
    return await asyncio.to_thread(wait_until, holds, within_s)


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

    watch(members, "attach")
    watch(call, "read_prompts")
    watch(writer, "build_outputs")
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
            most = max(most, await asyncio.to_thread(num_under_way, service))

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
        await until(lambda: num_under_way(service) == 30)
        for task in tasks:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await until(lambda: not num_under_way(service), NOTICED_WITHIN_S)

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
            await until(lambda: num_under_way(watched))
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
        await until(lambda: num_under_way(attached))
        await asyncio.to_thread(attached.shutdown)
        return (await asyncio.gather(call, return_exceptions=True))[0]

    assert isinstance(asyncio.run(main()), ServiceClosedError)


def test_a_cancellation_during_shutdown_stays_one(attached: AsyncSGLang) -> None:
    async def main() -> None:
        call = asyncio.create_task(attached.acomplete(requests_of(LONG)))
        await until(lambda: num_under_way(attached))
        attached.gate.close()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
