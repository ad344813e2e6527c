"""Calls of many threads that share requests to the servers."""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from helpers.fault_proxy import Fault, FaultProxy
from helpers.lora_files import random_adapter
from helpers.servers import needs, wait_until
from helpers.threads import in_threads
from torchrl_sglang import AsyncSGLang, SGLangWrapper, Timeouts
from torchrl_sglang.errors import (
    ConfigError,
    InputError,
    PromptTooLongError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServiceError,
    UnsupportedOptionError,
)

GREEDY = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}

BROKEN_REGEX = "(["


def rows(*ids: Sequence[int], regex: str | None = None) -> TensorDict:
    """Ragged prompts, with a regex of their own where one is given."""
    made = []
    for prompt in ids:
        row = TensorDict(tokens=Tokens(prompt=torch.tensor(prompt), batch_size=()), batch_size=())
        if regex is not None:
            row.set("sampling", TensorDict(regex=NonTensorData(regex)))
        made.append(row)
    return lazy_stack(made)


def batching_policy(service: AsyncSGLang, **kwargs: Any) -> SGLangWrapper:
    return SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=GREEDY, inplace=False, **kwargs
    )


@pytest.fixture
def grouped(service: AsyncSGLang, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests went out together, one number per shared call."""
    sizes: list[int] = []
    complete_each = type(service).complete_each

    def record(self: AsyncSGLang, batch: Sequence[Any], *args: Any) -> Any:
        sizes.append(len(batch))
        return complete_each(self, batch, *args)

    monkeypatch.setattr(type(service), "complete_each", record)
    return sizes


def responses(out: Any) -> list[list[int]]:
    return [row["tokens"].response.tolist() for row in out.unbind(0)]


def test_threads_with_one_row_each_share_requests(service: AsyncSGLang, grouped: list[int]) -> None:
    policy = batching_policy(service, min_batch_size=8, batching_timeout=30.0)
    plain = batching_policy(service)
    prompts = [[5, 6, 7 + index] for index in range(16)]
    expected = responses(plain(rows(*prompts)))
    grouped.clear()
    futures = in_threads([lambda p=prompt: policy(rows(p)) for prompt in prompts])
    assert grouped == [8, 8]
    assert [responses(future.result())[0] for future in futures] == expected
    assert policy.get_batching_state()["queue_size"] == 0


def test_the_largest_size_is_kept(service: AsyncSGLang, grouped: list[int]) -> None:
    policy = batching_policy(service, min_batch_size=3, max_batch_size=4, batching_timeout=0.3)
    calls = [lambda i=i: policy(rows(*[[5, 6, 7, i]] * 2)) for i in range(9, 14)]
    for future in in_threads(calls):
        assert len(responses(future.result())) == 2
    assert sum(grouped) == 10
    assert max(grouped) == 4


def test_what_does_not_fit_waits_for_the_next(service: AsyncSGLang, grouped: list[int]) -> None:
    policy = batching_policy(service, min_batch_size=3, max_batch_size=4, batching_timeout=2.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(policy, rows([5, 6, 7], [5, 6, 8]))
        wait_until(lambda: policy.get_batching_state()["queue_size"] == 1)
        assert len(responses(policy(rows(*[[5, 6]] * 3)))) == 3
        assert len(responses(first.result(30.0))) == 2
    assert grouped == [3, 2]


def test_uneven_sizes(service: AsyncSGLang, grouped: list[int]) -> None:
    """One call's rows are never divided, and every caller gets its own."""
    policy = batching_policy(service, min_batch_size=10, batching_timeout=30.0)
    batches = [[[40 + size, 41 + i, 42] for i in range(size)] for size in (1, 2, 3, 4)]
    futures = in_threads([lambda b=batch: policy(rows(*b)) for batch in batches])
    assert grouped == [10]
    for batch, future in zip(batches, futures, strict=True):
        out = future.result()
        assert [row["tokens"].prompt.tolist() for row in out.unbind(0)] == batch
        assert responses(out) == responses(batching_policy(service)(rows(*batch)))


def test_a_call_larger_than_the_largest_size_goes_alone(
    service: AsyncSGLang, grouped: list[int]
) -> None:
    policy = batching_policy(service, min_batch_size=1, max_batch_size=2)
    assert len(responses(policy(rows(*[[5, 6]] * 5)))) == 5
    assert grouped == [5]


def test_the_timeout_is_honoured(service: AsyncSGLang, grouped: list[int]) -> None:
    """Too few rows wait as long as was said, together, and then go out."""
    policy = batching_policy(service, min_batch_size=100, batching_timeout=3.0)
    service.generate([5, 6], GREEDY)  # connections are open
    start, ends = time.monotonic(), []

    def call(after_s: float) -> None:
        time.sleep(after_s)
        policy(rows([5, 6, 7]))
        ends.append(time.monotonic() - start)

    in_threads([lambda s=after_s: call(s) for after_s in (0.0, 1.0, 2.0)])
    assert grouped == [3]
    assert min(ends) >= 3.0
    assert max(ends) < 3.9  # nobody waits for his own time to be over


def test_no_waiting_without_a_smallest_size(service: AsyncSGLang, grouped: list[int]) -> None:
    policy = batching_policy(service, batching=True, batching_timeout=30.0)
    start = time.monotonic()
    policy(rows([5, 6, 7]))
    assert time.monotonic() - start < 5.0
    assert grouped == [1]


def test_a_refused_request_fails_its_own_caller_alone(
    service: AsyncSGLang, grouped: list[int]
) -> None:
    policy = batching_policy(service, min_batch_size=6, batching_timeout=30.0)
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(policy, rows([5, 6, 7]))]
        wait_until(lambda: policy.get_batching_state()["queue_size"] == 1)
        bad = pool.submit(policy, rows([5, 6], [7, 8], regex=BROKEN_REGEX))
        wait_until(lambda: policy.get_batching_state()["queue_size"] == 2)
        good += [pool.submit(policy, rows([5, 6, 7 + i], [8, 9])) for i in range(2)]
    assert grouped == [5 + 2]
    for future in good:
        assert len(responses(future.result())[0]) == 4
    error = bad.exception()
    assert isinstance(error, RequestRefusedError)
    assert error.status == 400
    # Of the caller's own batch, wherever its rows were in the shared one.
    assert error.__notes__ == ["prompt 0 of the batch, attempt 1"]
    # The next call works.
    grouped.clear()
    for future in in_threads([lambda i=i: policy(rows([5, 6, 7 + i])) for i in range(6)]):
        assert len(responses(future.result())[0]) == 4
    assert grouped == [6]


@pytest.mark.parametrize(
    ("bad", "error"),
    [([5] * 4000, PromptTooLongError), ([5, 6], UnsupportedOptionError)],
    ids=["too long", "option"],
)
def test_what_is_refused_here_joins_no_batch(
    service: AsyncSGLang, grouped: list[int], bad: list[int], error: type[Exception]
) -> None:
    policy = batching_policy(service, min_batch_size=2, batching_timeout=0.2)
    kwargs = {} if error is PromptTooLongError else {"temperatur": 1.0}
    with pytest.raises(error):
        policy(rows(bad), **kwargs)
    assert policy.get_batching_state()["queue_size"] == 0
    assert grouped == []


def test_a_server_that_fails_for_all_fails_all(
    proxied: AsyncSGLang, proxy: FaultProxy, grouped: list[int]
) -> None:
    policy = batching_policy(proxied, min_batch_size=3, batching_timeout=30.0)
    proxy.faults["/generate"] = Fault(status=400)
    futures = in_threads([lambda i=i: policy(rows([5, 6, i])) for i in range(3)])
    for future in futures:
        assert isinstance(future.exception(), RequestRefusedError)
    proxy.faults.clear()
    futures = in_threads([lambda i=i: policy(rows([5, 6, i])) for i in range(3)])
    assert [len(responses(future.result())[0]) for future in futures] == [4, 4, 4]
    assert grouped == [3, 3]


def named(service: AsyncSGLang, ids: list[int], **options: Any) -> TensorDict:
    """One row with options of its own."""
    td = rows(ids)
    values = {name: NonTensorData(value) for name, value in options.items()}
    td[0].set("sampling", TensorDict(values))
    return td


def test_a_session_that_can_not_go_on_fails_its_own_caller_alone(service: AsyncSGLang) -> None:
    """One that two callers go on with at once, and one that was closed while its row waited."""
    needs(service, "sessions")
    policy = batching_policy(service, min_batch_size=4, batching_timeout=30.0)
    busy, closed = service.open_session(), service.open_session()
    with busy, ThreadPoolExecutor(4) as pool:
        twice = [
            pool.submit(policy, named(service, [5, 6, i], session=busy.session_id)) for i in (1, 2)
        ]
        gone = pool.submit(policy, named(service, [5, 6], session=closed.session_id))
        wait_until(lambda: policy.get_batching_state()["queue_size"] == 3)
        closed.close()
        plain = pool.submit(policy, rows([5, 6, 7]))
        assert len(responses(plain.result(30.0))[0]) == 4
        assert isinstance(gone.exception(30.0), InputError | ConfigError)
        errors = [future.exception(30.0) for future in twice]
        assert sorted(map(bool, errors)) == [False, True]
        assert any(isinstance(e, ConfigError) and "under way" in str(e) for e in errors)
        assert len(busy.tokens) == 3 + 4  # whoever was first went on


def test_a_wrong_answer_in_a_session_fails_its_own_caller_alone(
    proxied: AsyncSGLang, proxy: FaultProxy
) -> None:
    needs(proxied, "sessions")

    def longer(answer: bytes) -> bytes:
        read = json.loads(answer)
        read["meta_info"]["prompt_tokens"] += 1 if read["meta_info"]["prompt_tokens"] == 3 else 0
        return json.dumps(read).encode()

    policy = batching_policy(proxied, min_batch_size=2, batching_timeout=30.0)
    proxy.faults["/generate"] = Fault(garble=longer)
    with proxied.open_session() as session, ThreadPoolExecutor(2) as pool:
        bad = pool.submit(policy, named(proxied, [5, 6, 7], session=session.session_id))
        good = pool.submit(policy, rows([5, 6]))
        assert isinstance(bad.exception(30.0), ResponseError)
        assert len(responses(good.result(30.0))[0]) == 4


def test_an_adapter_that_goes_while_its_row_waits(
    special_service: AsyncSGLang, model: Any, tmp_path: Path
) -> None:
    needs(special_service, "lora")
    folder = random_adapter(tmp_path / "adapter", model, seed=1)
    special_service.lora.load("passing", str(folder))
    policy = batching_policy(special_service, min_batch_size=2, batching_timeout=30.0)
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(policy, rows([5, 6]), lora="passing")
        wait_until(lambda: policy.get_batching_state()["queue_size"] == 1)
        special_service.lora.unload("passing")
        good = pool.submit(policy, rows([5, 6, 7]))
        assert len(responses(good.result(30.0))[0]) == 4
        error = bad.exception(30.0)
    assert isinstance(error, InputError)
    assert "not loaded" in str(error)
    assert error.__notes__ == ["prompt 0 of the batch"]


def test_what_was_finished_in_time_is_not_lost_to_what_was_not(
    proxy: FaultProxy, service: AsyncSGLang
) -> None:
    timeouts = Timeouts(request_s=3.0)
    with AsyncSGLang.connect(proxy.url, api_key=service.api_key, timeouts=timeouts) as external:
        policy = batching_policy(external, min_batch_size=3, batching_timeout=30.0)
        proxy.faults["/generate"] = Fault(delay_s=20.0, times=1)
        futures = in_threads([lambda i=i: policy(rows([5, 6, i])) for i in range(3)])
    errors = [future.exception() for future in futures]
    (late,) = filter(None, errors)
    assert isinstance(late, RequestTimeoutError)
    assert late.__notes__ == ["prompt 0 of the batch"]
    assert [len(responses(f.result())[0]) for f in futures if f.exception() is None] == [4, 4]


@pytest.mark.slow
def test_a_caller_has_his_rows_as_soon_as_they_are_done(
    proxied: AsyncSGLang, proxy: FaultProxy
) -> None:
    """Whoever runs the batch waits for all of it."""
    policy = batching_policy(proxied, min_batch_size=2, batching_timeout=30.0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(policy, rows([5, 6, 7]))
        wait_until(lambda: policy.get_batching_state()["queue_size"] == 1)
        last = pool.submit(policy, rows([5, 6, 8]), max_new_tokens=1200)
        assert len(responses(first.result(30.0))[0]) == 4
        assert not last.done()
        assert len(responses(last.result(60.0))[0]) == 1200


# A copy


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda policy: pickle.loads(pickle.dumps(policy)),
        lambda policy: cloudpickle.loads(cloudpickle.dumps(policy)),
    ],
    ids=["deepcopy", "pickle", "cloudpickle"],
)
def test_a_copy_shares_requests_too(
    attached: AsyncSGLang, copied: Callable[[SGLangWrapper], SGLangWrapper]
) -> None:
    policy = batching_policy(attached, min_batch_size=2, max_batch_size=9, batching_timeout=30.0)
    expected = [responses(f.result()) for f in in_threads([lambda: policy(rows([5, 6]))] * 2)]
    made = copied(policy)
    assert made.get_batching_state() == policy.get_batching_state()
    assert made._batcher is not policy._batcher
    with made.service:
        assert made._batcher._run.service is made.service
        outs = in_threads([lambda: made(rows([5, 6]))] * 2)
        assert [responses(future.result()) for future in outs] == expected
    assert responses(batching_policy(attached)(rows([5, 6]))) == expected[0]  # still open


@pytest.mark.slow
def test_the_state_says_what_waits_and_what_is_generated(service: AsyncSGLang) -> None:
    policy = batching_policy(service, min_batch_size=3, batching_timeout=60.0)
    idle = {"queue_size": 0, "pending_futures": 0, "processing": False, "lock_state": "unlocked"}

    def state() -> dict[str, Any]:
        return {name: policy.get_batching_state()[name] for name in idle}

    assert state() == idle
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(policy, rows([20, 21]))
        wait_until(lambda: state() == {**idle, "queue_size": 1, "pending_futures": 1})
        policy.cleanup_batching()
        assert isinstance(first.exception(5.0), ServiceError)
        wait_until(lambda: state() == idle)
        long = policy.get_new_version(generate_kwargs={"max_new_tokens": 1000, "ignore_eos": True})
        second = pool.submit(long, rows([20, 21]))
        wait_until(lambda: long.get_batching_state()["queue_size"] == 1)
        long.cleanup_batching(flush=True)
        busy = {"queue_size": 0, "pending_futures": 1, "processing": True, "lock_state": "locked"}
        wait_until(lambda: {name: long.get_batching_state()[name] for name in busy} == busy)
        assert second.result(60.0)["tokens"].get("response", as_list=True)[0].numel() == 1000
    assert {name: long.get_batching_state()[name] for name in idle} == idle


@pytest.mark.parametrize(
    "kwargs",
    [
        {"min_batch_size": 0},
        {"max_batch_size": 0},
        {"min_batch_size": 1.5},
        {"min_batch_size": True},
        {"min_batch_size": 4, "max_batch_size": 2},
        {"batching": False, "min_batch_size": 2},
        {"batching": True, "batching_timeout": -1.0},
        {"batching": True, "batching_timeout": float("nan")},
    ],
    ids=str,
)
def test_sizes_and_timeouts_that_can_not_be(service: AsyncSGLang, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        batching_policy(service, **kwargs)
