"""`AsyncSGLang.generate`: its answers, and what must not be trained on."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import connect_like, worst_error
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, Timeouts
from torchrl_sglang.errors import (
    EmptyBatchError,
    EmptyPromptError,
    PromptTooLongError,
    RequestAbortedError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServerFailedError,
    UnsupportedOptionError,
)

PROMPTS = [[5, 6, 7], [20, 21], [40, 41, 42, 43]]


def test_order_lengths_and_ids(service: AsyncSGLang) -> None:
    completions = service.generate(PROMPTS * 8, {"max_new_tokens": 6, "ignore_eos": True})
    assert len(completions) == 24
    for prompt, completion in zip(PROMPTS * 8, completions, strict=True):
        assert completion.prompt_tokens == len(prompt)
        assert len(completion.output_ids) == len(completion.log_probs) == 6
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "single"),
    [
        ([5, 6, 7], True),
        ("hello", True),
        (GenerateRequest(input_ids=(5, 6), sampling=SamplingParams(max_new_tokens=3)), True),
        (["hello", [5, 6]], False),
    ],
)
def test_forms_of_prompts(service: AsyncSGLang, prompt: Any, single: bool) -> None:
    params = None if isinstance(prompt, GenerateRequest) else {"max_new_tokens": 3}
    answer = service.generate(prompt, params)
    completions = [answer] if single else answer
    assert all(1 <= len(completion.output_ids) <= 3 for completion in completions)


def test_greedy_depends_on_the_prompt_alone(service: AsyncSGLang) -> None:
    greedy = {"max_new_tokens": 8, "temperature": 0.0}
    alone = [service.generate(prompt, greedy).output_ids for prompt in PROMPTS]
    together = [completion.output_ids for completion in service.generate(PROMPTS, greedy)]
    assert alone == together


def test_eos_is_kept_in_the_ids(service: AsyncSGLang, tokenizer: Any) -> None:
    first = service.generate([5, 6, 7], {"max_new_tokens": 4, "temperature": 0.0})
    stop = first.output_ids[2]
    completion = service.generate(
        [5, 6, 7], {"max_new_tokens": 4, "temperature": 0.0, "stop_token_ids": [stop]}
    )
    index = first.output_ids.index(stop)
    assert completion.output_ids == first.output_ids[: index + 1]
    assert (completion.finish_reason, completion.matched_stop) == ("stop", stop)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_hugging_face_forward(
    service: AsyncSGLang, model: Any, temperature: float
) -> None:
    sampling = {"max_new_tokens": 16, "temperature": temperature, "ignore_eos": True}
    prompts = [[i, 2 * i + 3, 77, 100 + i] for i in range(8)]
    completions = service.generate(prompts, sampling)
    log_probs = [value for completion in completions for value in completion.log_probs]
    assert len(log_probs) == 128
    # Peaked: a uniform distribution over the vocabulary would put every token at -6.
    assert sum(value > -1 for value in log_probs) > 4
    # The servers' logits differ by bf16 rounding, which a temperature below 1 magnifies.
    assert worst_error(model, prompts, completions, temperature) < 0.02 / temperature


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ([], EmptyBatchError),
        ([[]], EmptyPromptError),
        ("", EmptyPromptError),
        ([[5] * 5000], PromptTooLongError),
    ],
)
def test_bad_prompts(service: AsyncSGLang, prompts: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        service.generate(prompts, {"max_new_tokens": 2})


def test_the_server_refuses_what_does_not_fit(service: AsyncSGLang) -> None:
    """Of a text, which only the server counts."""
    with pytest.raises(RequestRefusedError, match="context") as caught:
        service.generate(["a b c " * 300], {"max_new_tokens": 1500}, fit_context=False)
    assert caught.value.status == 400
    assert "prompt 0" in caught.value.__notes__[0]


def test_unknown_option(service: AsyncSGLang) -> None:
    with pytest.raises(UnsupportedOptionError, match="temperature"):
        service.generate([5, 6], {"temperatur": 0.5})


def test_many_threads_share_one_service(service: AsyncSGLang) -> None:
    greedy = {"max_new_tokens": 8, "temperature": 0.0}
    alone = service.generate([9, 8, 7], greedy).output_ids
    results: list[list[int]] = []

    def call() -> None:
        results.append(service.generate([9, 8, 7], greedy).output_ids)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert results == [alone] * 8


# Faults between our client and the real server


def edited(change: Any) -> Any:
    """A fault that changes the JSON of a completion."""

    def garble(content: bytes) -> bytes:
        answer = json.loads(content)
        change(answer)
        return json.dumps(answer).encode()

    return garble


def drop_ids(answer: dict[str, Any]) -> None:
    del answer["output_ids"]


def drop_one_log_prob(answer: dict[str, Any]) -> None:
    answer["meta_info"]["output_token_logprobs"].pop()


def make_nan(answer: dict[str, Any]) -> None:
    answer["meta_info"]["output_token_logprobs"][0][0] = None


def other_request(answer: dict[str, Any]) -> None:
    answer["meta_info"]["id"] = "somebody-else"


def shorter_ids(answer: dict[str, Any]) -> None:
    answer["output_ids"].pop()


@pytest.mark.parametrize(
    "change", [drop_ids, drop_one_log_prob, make_nan, other_request, shorter_ids]
)
def test_an_answer_that_must_not_be_trained_on(
    proxied: AsyncSGLang, proxy: FaultProxy, change: Any
) -> None:
    proxy.faults["/generate"] = Fault(garble=edited(change))
    with pytest.raises(ResponseError):
        proxied.generate([5, 6], {"max_new_tokens": 4, "ignore_eos": True})


def abort(answer: dict[str, Any]) -> None:
    answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of patience"}


def test_an_aborted_request(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/generate"] = Fault(garble=edited(abort))
    with pytest.raises(RequestAbortedError, match="out of patience"):
        proxied.generate([5, 6], {"max_new_tokens": 4})


@pytest.mark.parametrize(
    "fault", [Fault(cut=True, times=2), Fault(status=503, times=2), Fault(garble=lambda _: b"{")]
)
def test_transport_and_5xx_are_retried(
    proxied: AsyncSGLang, proxy: FaultProxy, fault: Fault
) -> None:
    fault.times = 2
    proxy.faults["/generate"] = fault
    assert proxied.generate([5, 6], {"max_new_tokens": 2}).output_ids
    bodies = [json.loads(body) for path, body in proxy.seen if path == "/generate"]
    assert len({body["rid"] for body in bodies}) == len(bodies) == 3


def test_4xx_is_never_retried(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/generate"] = Fault(status=400)
    with pytest.raises(RequestRefusedError, match="injected fault"):
        proxied.generate([5, 6], {"max_new_tokens": 2})
    assert [path for path, _ in proxy.seen].count("/generate") == 1


def test_5xx_that_stays_is_raised(service: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/generate"] = Fault(status=500)
    impatient = connect_like(service, proxy.url, admin_api_key=None, timeouts=Timeouts(retry_s=2.0))
    with impatient, pytest.raises(ServerFailedError, match="injected fault"):
        impatient.generate([[5, 6], [7, 8]], {"max_new_tokens": 2})


def test_no_answer_in_time(service: AsyncSGLang, proxy: FaultProxy, timeouts: Timeouts) -> None:
    impatient = connect_like(
        service, proxy.url, admin_api_key=None, timeouts=Timeouts(request_s=1.0)
    )
    proxy.faults["/generate"] = Fault(delay_s=30.0)
    start = time.monotonic()
    with impatient, pytest.raises(RequestTimeoutError, match="request_s"):
        impatient.generate([5, 6], {"max_new_tokens": 2})
    assert time.monotonic() - start < 5.0
