"""`AsyncSGLang.generate` and what it says of the servers."""

from __future__ import annotations

from helpers.servers import connect_like
import json
import multiprocessing
import pickle
import sys
import threading
import time
from typing import Any

import pytest
from helpers.fault_proxy import BASE_PATH, Fault, FaultProxy
from packaging.version import Version
from helpers.servers import CPU_SERVER_ARGS, worst_error

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, Timeouts
from torchrl_sglang.errors import (
    ConnectError,
    EmptyBatchError,
    EmptyPromptError,
    PromptTooLongError,
    RequestAbortedError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServerFailedError,
    ServiceClosedError,
    UnsupportedOptionError,
)
from torchrl_sglang.launch.process import installed_version

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


def test_what_a_server_says_of_itself(service: AsyncSGLang, model_path: Any) -> None:
    info = service.info
    assert service.model_path == str(model_path)
    assert (service.get_tp_size(), service.get_dp_size()) == (1, 1)
    python = CPU_SERVER_ARGS["server_python"] or sys.executable
    assert service.sglang_version == installed_version(python, "sglang")
    assert service.router_version == "0.3.2"
    assert info.device == "cpu"
    assert info.capabilities.update_session == (Version(service.sglang_version) > Version("0.5.20"))
    assert info.capabilities.checksum
    assert info.capabilities.cache_salt
    service.flush_cache()


def test_managed_servers_ask_for_their_key(service: AsyncSGLang) -> None:
    for url in (service.server_url, service.workers[0].url):
        with pytest.raises(ConnectError, match=r"401|api_key"):
            AsyncSGLang.connect(url)


def test_managed_servers_listen_on_loopback(service: AsyncSGLang) -> None:
    assert all("//127.0.0.1:" in worker.url for worker in service.workers)


@pytest.mark.parametrize("ending", ["", "/"])
def test_connect_to_a_single_server(service: AsyncSGLang, ending: str, timeouts: Timeouts) -> None:
    url = service.workers[0].url
    with connect_like(service, url + ending, timeouts=timeouts
    ) as external:
        assert external.server_url == url
        assert not external.cluster.behind_router
        assert external.generate([5, 6], {"max_new_tokens": 2}).output_ids
    # It owned nothing: the server is still there.
    assert service.generate([5, 6], {"max_new_tokens": 2}).output_ids


def test_connect_under_a_base_path(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.seen.clear()
    with connect_like(proxied, f"{proxy.url}{BASE_PATH}/") as external:
        assert external.generate([5, 6], {"max_new_tokens": 2}).output_ids
        external.flush_cache()
    paths = {path for path, _ in proxy.seen}
    assert paths >= {f"{BASE_PATH}/generate", f"{BASE_PATH}/flush_cache"}
    assert all(path.startswith(BASE_PATH) for path in paths)


def test_connect_to_the_router(service: AsyncSGLang) -> None:
    with connect_like(service, service.server_url) as external:
        assert external.cluster.behind_router
        assert [worker.url for worker in external.workers] == [
            worker.url for worker in service.workers
        ]
        assert external.generate([5, 6], {"max_new_tokens": 2}).output_ids


def _generate_in_child(payload: bytes, answers: Any) -> None:
    external = pickle.loads(payload)
    sampling = {"max_new_tokens": 8, "temperature": 0.0}
    answers.put((external.generate([9, 8, 7], sampling).output_ids, repr(external)))
    external.shutdown()


def test_a_pickled_copy_works_in_another_process(service: AsyncSGLang) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_generate_in_child, args=(pickle.dumps(service), answers))
    child.start()
    ids, shown = answers.get(timeout=120.0)
    child.join(60.0)
    assert child.exitcode == 0
    assert "external" in shown
    assert ids == service.generate([9, 8, 7], {"max_new_tokens": 8, "temperature": 0.0}).output_ids


def test_a_forked_copy_works_too(service: AsyncSGLang) -> None:
    service.generate([5, 6], {"max_new_tokens": 2})  # the parent's event loop runs by now
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(
        target=lambda: answers.put(service.generate([5, 6], {"max_new_tokens": 2}).prompt_tokens)
    )
    child.start()
    assert answers.get(timeout=60.0) == 2
    child.join(60.0)
    assert service.generate([5, 6], {"max_new_tokens": 2}).output_ids


def test_use_after_shutdown(attached: AsyncSGLang) -> None:
    attached.generate([5, 6], {"max_new_tokens": 2})
    attached.shutdown()
    attached.shutdown()
    with pytest.raises(ServiceClosedError):
        attached.generate([5, 6], {"max_new_tokens": 2})


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
    impatient = connect_like(
        service, proxy.url, admin_api_key=None, timeouts=Timeouts(retry_s=2.0)
    )
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


def test_nothing_answers() -> None:
    with pytest.raises(ConnectError, match="nothing answers"):
        AsyncSGLang.connect("http://127.0.0.1:9")


def test_a_server_of_another_kind(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/server_info"] = Fault(garble=lambda _: b'{"some": "thing"}')
    with pytest.raises(ConnectError, match="not as an SGLang server"):
        AsyncSGLang.connect(proxy.url, api_key=proxied.api_key)


def test_a_router_without_workers(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/workers"] = Fault(status=200, body='{"workers": []}')
    with pytest.raises(ConnectError, match="has no workers"):
        AsyncSGLang.connect(proxy.url, api_key=proxied.api_key)
