"""What is sent again, for how long, and what is never trained on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import connect_like, needs, told
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, Timeouts
from torchrl_sglang.errors import (
    ConnectError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServerFailedError,
)
from torchrl_sglang.generate.request import Returns

SHORT = {"max_new_tokens": 3, "ignore_eos": True}

RETRY_S = 0.5  # attempts at 0 and 0.2 s; the next would be at 0.6 s


@pytest.fixture
def retrying(proxy: FaultProxy, service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    """A service behind the proxy that gives up soon."""
    timeouts = Timeouts(request_s=20.0, retry_s=RETRY_S, connect_s=5.0)
    with connect_like(service, proxy.url, timeouts=timeouts) as external:
        proxy.seen.clear()
        yield external


def sent(proxy: FaultProxy) -> list[dict[str, Any]]:
    """The bodies of the generation requests so far."""
    return [json.loads(body) for path, body in proxy.seen if path == "/generate"]


def cut() -> Fault:
    return Fault(cut=True)


def garbled() -> Fault:
    return Fault(garble=lambda content: content[: len(content) // 2])


TRANSIENT: dict[str, Callable[[], Fault]] = {
    "500": lambda: Fault(status=500),
    "502": lambda: Fault(status=502, body="<html>bad gateway</html>"),
    "503": lambda: Fault(status=503),
    "429": lambda: Fault(status=429),
    "408": lambda: Fault(status=408),
    "cut": cut,
    "garbled": garbled,
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_passing_failure_is_not_noticed(
    retrying: AsyncSGLang, proxy: FaultProxy, fault: str
) -> None:
    proxy.faults["/generate"] = TRANSIENT[fault]()
    proxy.faults["/generate"].times = 1
    completion = retrying.generate([5, 6], SHORT)
    assert len(completion.output_ids) == 3
    first, second = sent(proxy)
    # A server may still run the first attempt: the second needs an id of its own.
    assert first.pop("rid") != second["rid"]
    assert completion.rid == second.pop("rid")
    assert first == second


def test_an_abort_of_the_attempt_before_leaves_the_next_alone(
    retrying: AsyncSGLang, proxy: FaultProxy
) -> None:
    """A server aborts one whose connection is gone seconds later, and all ids that begin so."""
    proxy.faults["/generate"] = Fault(status=500, times=1)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(retrying.generate, [5, 6], {**SHORT, "max_new_tokens": 300})
        deadline = time.monotonic() + 20.0
        while len(sent(proxy)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        first, second = sent(proxy)
        time.sleep(0.2)  # until it generates
        told(retrying.workers[0], "/abort_request", {"rid": first["rid"]})
        assert answer.result(60.0).rid == second["rid"]
    assert len(answer.result().output_ids) == 300
    assert not second["rid"].startswith(first["rid"])


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_failure_that_stays_is_raised(
    retrying: AsyncSGLang, proxy: FaultProxy, fault: str
) -> None:
    proxy.faults["/generate"] = TRANSIENT[fault]()
    start = time.monotonic()
    with pytest.raises(ServerFailedError) as caught:
        retrying.generate([5, 6], SHORT)
    assert 0.2 <= time.monotonic() - start < RETRY_S + 1.0
    assert len(sent(proxy)) == 2
    assert caught.value.__notes__ == ["prompt 0 of the batch, attempt 2"]
    status = caught.value.status
    assert status == (int(fault) if fault.isdecimal() else None)
    if fault.isdecimal():
        assert fault in str(caught.value)
        assert ("bad gateway" if fault == "502" else "injected fault") in caught.value.body


def test_the_error_names_the_prompt(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    """Whichever of many it is; the others do not go on."""
    target = GenerateRequest(input_ids=(41, 42), sampling=SamplingParams(max_new_tokens=3))
    others = [
        GenerateRequest(input_ids=(5, 6, i), sampling=SamplingParams(max_new_tokens=3))
        for i in range(7, 11)
    ]

    def only_the_target(content: bytes) -> bytes:
        return b"{" if target.rid in content.decode() else content

    proxy.faults["/generate"] = Fault(garble=only_the_target)
    with pytest.raises(ServerFailedError) as caught:
        retrying.generate([*others[:3], target, *others[3:]])
    assert caught.value.__notes__ == ["prompt 3 of the batch, attempt 2"]
    assert len(sent(proxy)) == 4 + 2  # nobody else was sent twice


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 422])
def test_4xx_is_never_sent_again(retrying: AsyncSGLang, proxy: FaultProxy, status: int) -> None:
    proxy.faults["/generate"] = Fault(status=status)
    start = time.monotonic()
    with pytest.raises(RequestRefusedError, match="injected fault") as caught:
        retrying.generate([5, 6], SHORT)
    assert caught.value.status == status
    assert len(sent(proxy)) == 1
    assert caught.value.__notes__ == ["prompt 0 of the batch, attempt 1"]
    assert time.monotonic() - start < 1.0
    if status in (401, 403):
        assert "api_key" in str(caught.value)


def test_the_servers_own_refusal_is_passed_on(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    sampling = SamplingParams(max_new_tokens=3)
    prompts = [GenerateRequest(input_ids=(5, 6, i), sampling=sampling) for i in (7, 8)]
    bad = GenerateRequest(input_ids=(5, 6), sampling=SamplingParams(max_new_tokens=3, regex="(["))
    with pytest.raises(RequestRefusedError) as caught:
        retrying.generate([*prompts, bad])
    assert caught.value.status == 400
    assert caught.value.body
    assert caught.value.__notes__ == ["prompt 2 of the batch, attempt 1"]
    assert len(sent(proxy)) == 3


@pytest.mark.parametrize("pushed", [False, True], ids=["attached", "pushed"])
def test_a_server_that_is_gone(proxy: FaultProxy, service: AsyncSGLang, pushed: bool) -> None:
    """Also where the service asks the server for its version first."""
    timeouts = Timeouts(retry_s=RETRY_S, connect_s=5.0)
    with AsyncSGLang.connect(proxy.url, api_key=service.api_key, timeouts=timeouts) as external:
        external.generate([5, 6], SHORT)
        if pushed:
            external.servers.versions.set_pushed(1)
        proxy.__exit__()
        start = time.monotonic()
        try:
            with pytest.raises(ConnectError, match="nothing answers") as caught:
                external.generate([5, 6], SHORT)
        finally:
            proxy.__enter__()
        assert 0.2 <= time.monotonic() - start < RETRY_S + 1.5
        if pushed:
            assert caught.value.__notes__ == ["prompt 0 of the batch, attempt 2"]


def test_a_server_that_comes_back(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/generate"] = Fault(status=503)
    prompts = [[5, 6], [7, 8], [9, 10]]
    with pytest.raises(ServerFailedError):
        retrying.generate(prompts, SHORT)
    proxy.faults.clear()
    assert [len(c.output_ids) for c in retrying.generate(prompts, SHORT)] == [3, 3, 3]


@pytest.mark.parametrize("retry_s", [30.0, 0.3])
def test_the_whole_call_is_bounded(proxy: FaultProxy, service: AsyncSGLang, retry_s: float) -> None:
    """By ``request_s``, whatever ``retry_s`` says, slow attempts and waits together."""
    request_s = 1.5 if retry_s > 1.5 else 20.0
    timeouts = Timeouts(request_s=request_s, retry_s=retry_s)
    with AsyncSGLang.connect(proxy.url, api_key=service.api_key, timeouts=timeouts) as external:
        proxy.faults["/generate"] = Fault(status=503, delay_s=0.4)
        start = time.monotonic()
        kind = RequestTimeoutError if retry_s > 1.5 else ServerFailedError
        with pytest.raises(kind) as caught:
            external.generate([[5, 6], [7, 8]], SHORT)
        assert time.monotonic() - start < 2.5
        if kind is RequestTimeoutError:
            assert time.monotonic() - start >= 1.5
            assert "2 prompts" in str(caught.value)
            assert "request_s" in str(caught.value)


def test_a_slow_answer_is_no_failure(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/generate"] = Fault(delay_s=RETRY_S + 0.5)
    assert len(retrying.generate([5, 6], SHORT).output_ids) == 3
    assert len(sent(proxy)) == 1


def test_asynchronous_calls_are_retried_too(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/generate"] = Fault(status=503, times=1)
    assert len(asyncio.run(retrying.agenerate([5, 6], SHORT)).output_ids) == 3
    assert len(sent(proxy)) == 2


def test_asking_for_the_version_is_retried_too(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    """A service that did not push itself asks before it generates."""
    proxy.faults["/model_info"] = Fault(status=503, times=1)
    assert len(retrying.generate([5, 6], SHORT).output_ids) == 3
    assert [path for path, _ in proxy.seen] == ["/model_info"] * 2 + ["/generate"]
    proxy.faults["/model_info"] = Fault(status=400)
    with pytest.raises(RequestRefusedError):
        retrying.generate([5, 6], SHORT)
    assert [path for path, _ in proxy.seen][3:] == ["/model_info"]


def test_a_call_that_waits_for_a_push_is_bounded_as_a_whole(
    proxy: FaultProxy, service: AsyncSGLang
) -> None:
    timeouts = Timeouts(request_s=3.0)
    with AsyncSGLang.connect(proxy.url, api_key=service.api_key, timeouts=timeouts) as external:
        proxy.faults["/generate"] = Fault(delay_s=30.0)
        external.gate.begin()
        opener = threading.Timer(2.0, external.gate.commit)
        opener.start()
        start = time.monotonic()
        with pytest.raises(RequestTimeoutError, match="request_s"):
            external.generate([5, 6], SHORT)
        assert 3.0 <= time.monotonic() - start < 4.8
        opener.join()


def test_control_requests_are_not_retried(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/flush_cache"] = Fault(status=500)
    with pytest.raises(ServerFailedError):
        retrying.flush_cache()
    assert [path for path, _ in proxy.seen] == ["/flush_cache"]


# Answers that must not be trained on


def edited(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """A fault that changes the JSON of a completion."""

    def garble(content: bytes) -> bytes:
        answer = json.loads(content)
        replaced = change(answer)
        return json.dumps(answer if replaced is None else replaced).encode()

    return Fault(garble=garble)


def meta(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer["meta_info"].update({name: value})


def log_prob(position: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(answer: dict[str, Any]) -> None:
        answer["meta_info"]["output_token_logprobs"][position][0] = value

    return change


def other_token(answer: dict[str, Any]) -> None:
    answer["meta_info"]["output_token_logprobs"][1][1] += 1


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no ids": lambda answer: answer.pop("output_ids") and None,
    "ids are null": lambda answer: answer.update(output_ids=None),
    "ids are text": lambda answer: answer.update(output_ids="5 6 7"),
    "an id is text": lambda answer: answer["output_ids"].__setitem__(0, "5"),
    "an id is a float": lambda answer: answer["output_ids"].__setitem__(0, 5.0),
    "an id is true": lambda answer: answer["output_ids"].__setitem__(0, True),
    "an id less": lambda answer: answer["output_ids"].pop() and None,
    "an id more": lambda answer: answer["output_ids"].append(5),
    "no tokens": lambda answer: answer.update(output_ids=[]),
    "a log-prob less": lambda answer: answer["meta_info"]["output_token_logprobs"].pop() and None,
    "a log-prob more": lambda answer: answer["meta_info"]["output_token_logprobs"].append(
        [-1.0, 5, None]
    ),
    "no log-probs": lambda answer: answer["meta_info"].pop("output_token_logprobs") and None,
    "log-probs are null": meta("output_token_logprobs", None),
    "log-probs of other tokens": other_token,
    "a log-prob is null": log_prob(1, None),
    "a log-prob is text": log_prob(0, "-1.0"),
    "another request": meta("id", "somebody-else"),
    "no request": meta("id", None),
    "another prompt": meta("prompt_tokens", 17),
    "another count": meta("completion_tokens", 17),
    "no finish reason": meta("finish_reason", None),
    "an unknown finish reason": meta("finish_reason", {"type": "tired"}),
    "no meta_info": lambda answer: answer.pop("meta_info") and None,
    "versions of other tokens": meta("weight_versions", [{"version": "1", "start": 0, "end": 2}]),
    "versions with a gap": meta(
        "weight_versions",
        [{"version": "1", "start": 0, "end": 1}, {"version": "2", "start": 2, "end": 3}],
    ),
    "a list": lambda answer: [answer],
    "null": lambda answer: [],
    "an error": lambda answer: {"error": {"message": "sorry"}},
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_answer_raises_at_once(
    retrying: AsyncSGLang, proxy: FaultProxy, change: str
) -> None:
    proxy.faults["/generate"] = edited(WRONG[change])
    with pytest.raises(ResponseError) as caught:
        retrying.generate([5, 6], SHORT)
    assert len(sent(proxy)) == 1
    assert sent(proxy)[0]["rid"] in str(caught.value)
    assert caught.value.__notes__ == ["prompt 0 of the batch, attempt 1"]


def nothing_came(answer: dict[str, Any]) -> None:
    answer["output_ids"] = []
    answer["meta_info"]["completion_tokens"] = 0


@pytest.mark.parametrize(
    "change",
    [
        *(WRONG[name] for name in WRONG if "id" in name.split()),
        WRONG["ids are text"],
        WRONG["ids are null"],
        nothing_came,
    ],
)
def test_wrong_ids_without_log_probs_to_compare_with(
    retrying: AsyncSGLang, proxy: FaultProxy, change: Callable[[dict[str, Any]], Any]
) -> None:
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True)
    request = GenerateRequest(input_ids=(5, 6), sampling=sampling, return_log_probs=False)
    assert retrying.complete([request])[0].log_probs is None
    proxy.faults["/generate"] = edited(change)
    with pytest.raises(ResponseError):
        retrying.complete([request])


def test_answers_that_are_exchanged(retrying: AsyncSGLang, proxy: FaultProxy) -> None:
    """Two prompts of equal length, each answered with the other's completion."""
    answers: list[bytes] = []

    def exchange(content: bytes) -> bytes:
        answers.append(content)
        return answers[0]

    proxy.faults["/generate"] = Fault(garble=exchange)
    with pytest.raises(ResponseError, match="got the answer of request"):
        retrying.generate([[5, 6], [7, 8]], SHORT)


@pytest.mark.parametrize(
    "change",
    [
        lambda answers: answers[:1],
        lambda answers: [*answers, answers[0]],
        lambda answers: answers[0],
        lambda answers: [
            answers[0],
            {**answers[1], "meta_info": {**answers[1]["meta_info"], "id": 5}},
        ],
    ],
    ids=["fewer", "more", "one", "without an id"],
)
def test_another_number_of_samples(
    retrying: AsyncSGLang, proxy: FaultProxy, change: Callable[[Any], Any]
) -> None:
    proxy.faults["/generate"] = edited(change)
    with pytest.raises(ResponseError):
        retrying.generate([5, 6], {**SHORT, "n": 2})


def extra(name: str, change: Callable[[Any], Any]) -> Fault:
    def edit(answer: dict[str, Any]) -> None:
        answer["meta_info"][name] = change(answer["meta_info"][name])

    return edited(edit)


@pytest.mark.parametrize(
    ("returns", "name", "change"),
    [
        (Returns(top_log_probs=2), "output_top_logprobs", lambda rows: rows[:-1]),
        (Returns(top_log_probs=2), "output_top_logprobs", lambda rows: None),
        (Returns(input_log_probs=True), "input_token_logprobs", lambda rows: rows[:-1]),
        (Returns(input_log_probs=True), "input_token_logprobs", lambda rows: []),
        (
            Returns(input_log_probs=True),
            "input_token_logprobs",
            lambda rows: [rows[0], [None, *rows[1][1:]]],
        ),
        (
            Returns(input_log_probs=True),
            "input_token_logprobs",
            lambda rows: [rows[0], [rows[1][0], 77, None]],
        ),
        (Returns(sampling_mask=True), "output_token_sampling_mask", lambda rows: rows[:-1]),
        (
            Returns(sampling_mask=True),
            "output_token_sampling_mask",
            lambda rows: [[] for _ in rows],
        ),
        (Returns(sampling_mask=True), "output_token_sampling_logprobs", lambda rows: rows[:-1]),
        (
            Returns(sampling_mask=True),
            "output_token_sampling_logprobs",
            lambda rows: [None for _ in rows],
        ),
    ],
)
def test_wrong_extras(
    retrying: AsyncSGLang,
    proxy: FaultProxy,
    returns: Returns,
    name: str,
    change: Callable[[Any], Any],
) -> None:
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True, top_k=5)
    request = GenerateRequest(input_ids=(5, 6), sampling=sampling, returns=returns)
    needs(retrying, *(["sampling_mask_tokens"] if returns.sampling_mask else []))
    assert retrying.complete([request])  # right as it is
    proxy.faults["/generate"] = extra(name, change)
    with pytest.raises(ResponseError):
        retrying.complete([request])
