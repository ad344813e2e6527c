"""Sessions: conversations that a server holds."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import (
    connect_like,
    hf_log_probs,
    needs,
    num_running,
    perturb,
    told,
    wait_until,
    worst_error,
)
from torchrl_sglang import (
    AsyncSGLang,
    GenerateRequest,
    SamplingParams,
    Session,
    SGLangWeightSyncScheme,
    SGLangWrapper,
    Timeouts,
)
from torchrl_sglang.errors import (
    ConfigError,
    InputError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServerFailedError,
    ServiceClosedError,
)
from torchrl_sglang.generate.request import SessionTurn, new_rid

SHORT = SamplingParams(max_new_tokens=5, ignore_eos=True)

LONG = SamplingParams(max_new_tokens=1500, ignore_eos=True)


@pytest.fixture(autouse=True)
def sessions_are_there(service: AsyncSGLang) -> None:
    needs(service, "sessions")


def held(service: AsyncSGLang, session_id: str) -> bool:
    """Whether the server still holds a session: it opens no second one of that name."""
    worker = service.workers[0]
    body = {"capacity_of_str_len": 100, "session_id": session_id}
    try:
        told(worker, "/open_session", body)
    except RequestRefusedError:
        return True
    told(worker, "/close_session", {"session_id": session_id})
    return False


def turn(service: AsyncSGLang, session: Session, new: list[int], **fields: Any) -> Any:
    """One turn of a session, whose prompt is everything so far and ``new``."""
    request = session.request([*session.tokens, *new], **{"sampling": SHORT, **fields})
    return service.complete([request])[0]


def test_a_conversation(service: AsyncSGLang, model: Any) -> None:
    """Only what is new is sent, and everything before it counts."""
    with service.open_session() as session:
        expected: list[int] = []
        for new in ([5, 6, 7], [8, 9], [10]):
            request = session.request([*session.tokens, *new], sampling=SHORT)
            assert list(request.input_ids or ()) == new
            completion = service.complete([request])[0]
            prompt = [*expected, *new]
            assert completion.prompt_tokens == len(prompt)
            scores = hf_log_probs(model, prompt, completion.output_ids)
            assert completion.log_probs == pytest.approx(scores, abs=0.02)
            expected = [*prompt, *completion.output_ids]
            assert session.tokens == expected


def test_it_goes_on_as_the_whole_prompt_would(service: AsyncSGLang) -> None:
    greedy = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    with service.open_session() as session:
        turn(service, session, [5, 6, 7], sampling=greedy)
        prompt = [*session.tokens, 8, 9]
        assert turn(service, session, [8, 9], sampling=greedy).output_ids == (
            service.generate(prompt, greedy).output_ids
        )


def test_it_goes_on_under_new_weights(
    service: AsyncSGLang, model: Any, connected: Callable[..., SGLangWeightSyncScheme]
) -> None:
    """What the server holds are tokens: nothing that old weights computed is used again."""
    scheme = connected()
    with service.open_session() as session:
        turn(service, session, list(range(100, 140)))
        scheme.send(perturb(model, seed=31))
        prompt = [*session.tokens, 8, 9]
        completion = turn(service, session, [8, 9])
        assert completion.cached_tokens == 0
        scores = hf_log_probs(model, prompt, completion.output_ids)
        assert completion.log_probs == pytest.approx(scores, abs=0.02)


@pytest.mark.parametrize("ending", ["stop string", "stop token", "length"])
def test_every_token_of_a_turn_is_in_the_next(
    service: AsyncSGLang, tokenizer: Any, ending: str
) -> None:
    """The server's tokens stay those that came back, whatever ended the turn."""
    free = service.generate([5, 6, 7], {"max_new_tokens": 6, "temperature": 0.0}).output_ids
    options = {
        "stop string": {"stop": tokenizer.decode(free[1:3])},
        "stop token": {"stop_token_ids": [free[2]]},
        "length": {"max_new_tokens": 3},
    }[ending]
    sampling = SamplingParams(max_new_tokens=6, temperature=0.0).updated(options)
    with service.open_session() as session:
        first = turn(service, session, [5, 6, 7], sampling=sampling)
        assert first.finish_type == ("length" if ending == "length" else "stop")
        assert session.tokens == [5, 6, 7, *first.output_ids]
        second = turn(service, session, [8])
        assert second.prompt_tokens == 3 + len(first.output_ids) + 1


def test_closing_frees_it(service: AsyncSGLang) -> None:
    session = service.open_session()
    assert held(service, session.session_id)
    session.close()
    assert not held(service, session.session_id)
    session.close()
    with pytest.raises(ConfigError, match="was closed"):
        session.request([5, 6])


def test_the_context_manager_closes_it(service: AsyncSGLang) -> None:
    with pytest.raises(KeyError), service.open_session() as session:  # noqa: PT012
        turn(service, session, [5, 6])
        raise KeyError
    assert not held(service, session.session_id)


def test_shutdown_closes_every_session(attached: AsyncSGLang, service: AsyncSGLang) -> None:
    sessions = [attached.open_session() for _ in range(3)]
    turn(attached, sessions[1], [5, 6])
    sessions[2].close()
    assert [held(service, s.session_id) for s in sessions] == [True, True, False]
    attached.shutdown()
    assert [held(service, s.session_id) for s in sessions] == [False, False, False]


def test_a_copy_knows_nothing_of_the_sessions(attached: AsyncSGLang) -> None:
    import pickle

    with attached.open_session() as session, pickle.loads(pickle.dumps(attached)) as copy:
        request = session.request([5, 6], sampling=SHORT)
        with pytest.raises(InputError, match="not opened here"):
            copy.complete([request])
        assert len(attached.complete([request])[0].output_ids) == 5


def test_sessions_that_are_not_used_time_out(service: AsyncSGLang) -> None:
    session = service.open_session(timeout_s=2.0)
    assert held(service, session.session_id)
    wait_until(lambda: not held(service, session.session_id))
    with pytest.raises(RequestRefusedError, match="does not exist"):
        turn(service, session, [5, 6])
    session.close()


@pytest.mark.parametrize(
    ("given", "sent"), [({}, 3600.0), ({"timeout_s": 9.0}, 9.0), ({"timeout_s": None}, None)]
)
def test_a_killed_client_leaves_no_session_for_good(
    proxied: AsyncSGLang, proxy: FaultProxy, given: dict[str, Any], sent: float | None
) -> None:
    """Unless it asks for one that never ends."""
    proxied.open_session(**given).close()
    (body,) = [body for path, body in proxy.seen if path == "/open_session"]
    assert json.loads(body).get("timeout") == sent


def test_closing_that_fails_can_be_tried_again(
    proxied: AsyncSGLang, proxy: FaultProxy, service: AsyncSGLang
) -> None:
    session = proxied.open_session()
    proxy.faults["/close_session"] = Fault(status=500, times=1)
    with pytest.raises(ServerFailedError):
        session.close()
    assert held(service, session.session_id)
    session.close()
    assert not held(service, session.session_id)


def test_a_silent_server_does_not_hold_shutdown_up(proxy: FaultProxy, service: AsyncSGLang) -> None:
    external = connect_like(
        service, proxy.url, admin_api_key=None, timeouts=Timeouts(control_s=2.0)
    )
    sessions = [external.open_session() for _ in range(5)]
    proxy.faults["/close_session"] = Fault(delay_s=30.0)
    start = time.monotonic()
    external.shutdown()
    assert time.monotonic() - start < 6.0  # one bound, not five
    for session in sessions:
        told(service.workers[0], "/close_session", {"session_id": session.session_id})


@pytest.mark.parametrize("answer", ["null", '""', "17"])
def test_a_server_that_opens_none(proxied: AsyncSGLang, proxy: FaultProxy, answer: str) -> None:
    proxy.faults["/open_session"] = Fault(status=200, body=answer)
    with pytest.raises(RequestRefusedError, match="opened no session"):
        proxied.open_session()


# What is refused


@pytest.mark.parametrize(
    "prompt",
    [[5, 6], [5, 6, 8, 9, 10, 11, 12, 13, 14], [9]],
    ids=["too short", "others", "another beginning"],
)
def test_a_prompt_that_does_not_go_on(service: AsyncSGLang, prompt: list[int]) -> None:
    with service.open_session() as session:
        turn(service, session, [5, 6, 7])
        with pytest.raises(InputError, match="does not begin with them and go on"):
            session.request(prompt)
        with pytest.raises(InputError, match="does not begin with them and go on"):
            session.request(session.tokens)
        assert turn(service, session, [8]).prompt_tokens == 3 + 5 + 1


def test_several_samples_are_refused(service: AsyncSGLang) -> None:
    with service.open_session() as session:
        with pytest.raises(ConfigError, match="n must be 1"):
            session.request([5, 6], sampling=SamplingParams(n=2))
        turn(service, session, [5, 6])


def test_an_unknown_session(service: AsyncSGLang) -> None:
    name = uuid.uuid4().hex
    made_up = SessionTurn(session_id=name, worker_url=service.workers[0].url)
    request = GenerateRequest(input_ids=(5, 6), sampling=SHORT, session=made_up)
    with pytest.raises(InputError, match=name):
        service.complete([request])


def test_one_request_at_a_time(service: AsyncSGLang) -> None:
    with service.open_session() as session, ThreadPoolExecutor(1) as pool:
        first = session.request([5, 6], sampling=LONG, partial_allowed=True)
        second = session.request([5, 6, 7], sampling=SHORT)
        under_way = pool.submit(service.complete, [first])
        wait_until(lambda: num_running(service))
        with pytest.raises(ConfigError, match="one at a time"):
            session.request([5, 6])
        with pytest.raises(ConfigError, match="one at a time"):
            service.complete([second])
        service.abort(first.rid)
        assert under_way.result(30.0)[0].finish_type == "abort"
        # An aborted request does not count: the session is where it was.
        assert session.tokens == []
        assert service.complete([second])[0].prompt_tokens == 3


def test_two_requests_of_one_session_in_one_batch(service: AsyncSGLang) -> None:
    with service.open_session() as session:
        requests = [session.request([5, 6, i], sampling=SHORT) for i in (7, 8)]
        with pytest.raises(ConfigError, match="one at a time"):
            service.complete(requests)
        assert service.complete(requests[1:])[0].prompt_tokens == 3


def test_a_request_that_was_overtaken(service: AsyncSGLang) -> None:
    with service.open_session() as session:
        late = session.request([5, 6, 7], sampling=SHORT)
        turn(service, session, [5, 6])
        with pytest.raises(ConfigError, match="gone on"):
            service.complete([late])
        turn(service, session, [7])


def test_a_request_that_is_never_sent_blocks_nothing(service: AsyncSGLang) -> None:
    with service.open_session() as session:
        session.request([5, 6], sampling=SHORT)
        turn(service, session, [7, 8])


# Failures


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=400), RequestRefusedError),
        (Fault(garble=lambda content: content.replace(b'"id"', b'"other"')), ResponseError),
        (Fault(delay_s=30.0), RequestTimeoutError),
    ],
    ids=["400", "wrong answer", "timeout"],
)
def test_a_request_that_fails_leaves_the_session_as_it_was(
    proxy: FaultProxy, service: AsyncSGLang, fault: Fault, error: type[Exception]
) -> None:
    timeouts = Timeouts(request_s=1.0)
    with (
        AsyncSGLang.connect(proxy.url, api_key=service.api_key, timeouts=timeouts) as external,
        external.open_session() as session,
    ):
        turn(external, session, [5, 6])
        before = session.tokens
        proxy.faults["/generate"] = fault
        with pytest.raises(error):
            turn(external, session, [7])
        proxy.faults.clear()
        assert session.tokens == before
        assert turn(external, session, [7]).prompt_tokens == len(before) + 1


def test_a_retried_request_of_a_session(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """The server may have run the first attempt: the second starts from the turn before."""
    with proxied.open_session() as session:
        turn(proxied, session, [5, 6])
        proxy.faults["/generate"] = Fault(garble=lambda _: b"{", times=1)
        assert turn(proxied, session, [7]).prompt_tokens == 2 + 5 + 1
        assert turn(proxied, session, [8]).prompt_tokens == 2 + 5 + 1 + 5 + 1


def test_other_rows_of_the_batch_that_fail(service: AsyncSGLang) -> None:
    with service.open_session() as session:
        request = session.request([5, 6], sampling=SHORT)
        bad = GenerateRequest(input_ids=(5, 6), sampling=SamplingParams(regex="(["))
        with pytest.raises(RequestRefusedError):
            service.complete([request, bad])
        assert session.tokens == []
        turn(service, session, [5, 6])


def test_a_server_that_holds_other_tokens(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """Such as one that takes a BOS off what it appends."""

    def one_token_less(content: bytes) -> bytes:
        answer = json.loads(content)
        answer["meta_info"]["prompt_tokens"] -= 1
        return json.dumps(answer).encode()

    with proxied.open_session() as session:
        turn(proxied, session, [5, 6])
        before = session.tokens
        proxy.faults["/generate"] = Fault(garble=one_token_less)
        with pytest.raises(ResponseError, match="not of 8"):
            turn(proxied, session, [7])
        assert session.tokens == before
        proxy.faults.clear()
        turn(proxied, session, [7])


def test_shutdown_while_a_session_generates(attached: AsyncSGLang, service: AsyncSGLang) -> None:
    session = attached.open_session()
    with ThreadPoolExecutor(1) as pool:
        request = session.request([5, 6], sampling=LONG)
        under_way = pool.submit(attached.complete, [request])
        wait_until(lambda: num_running(service))
        attached.shutdown()
        assert isinstance(under_way.exception(10.0), ServiceClosedError)
    assert not held(service, session.session_id)
    wait_until(lambda: not num_running(service))


def test_every_way_to_generate_moves_the_session_on(service: AsyncSGLang) -> None:
    async def drained(requests: list[GenerateRequest]) -> list[Any]:
        return [group[0] async for _, group in service.aas_completed(requests)]

    ways: list[Callable[[list[GenerateRequest]], Any]] = [
        lambda requests: service.complete(requests)[0],
        lambda requests: service.complete_each(requests)[0][0],
        lambda requests: asyncio.run(service.acomplete(requests))[0],
        lambda requests: next(iter(service.as_completed(requests)))[1][0],
        lambda requests: asyncio.run(drained(requests))[0],
    ]
    with service.open_session() as session:
        for number, way in enumerate(ways):
            request = session.request([*session.tokens, 7], sampling=SHORT)
            assert way([request]).prompt_tokens == 6 * number + 1
            assert len(session.tokens) == 6 * (number + 1)


def test_many_sessions_at_once(service: AsyncSGLang, model: Any) -> None:
    sessions = [service.open_session() for _ in range(6)]
    try:
        for new in (5, 6, 7):
            requests = [
                session.request([*session.tokens, new, 20 + index], sampling=SHORT)
                for index, session in enumerate(sessions)
            ]
            plain = GenerateRequest(input_ids=(5, 6), sampling=SHORT.updated({"n": 2}))
            before = [session.tokens for session in sessions]
            completions = service.complete([plain, *requests])[2:]
            for index, (tokens, completion) in enumerate(zip(before, completions, strict=True)):
                prompt = [*tokens, new, 20 + index]
                scores = hf_log_probs(model, prompt, completion.output_ids)
                assert completion.log_probs == pytest.approx(scores, abs=0.02)
                assert sessions[index].tokens == [*prompt, *completion.output_ids]
    finally:
        for session in sessions:
            session.close()


# Through the policy


def rows(prompts: list[list[int]], names: list[str | None]) -> TensorDict:
    """Token prompts, each with the session that it belongs to."""
    made = []
    for prompt, name in zip(prompts, names, strict=True):
        row = TensorDict(tokens=Tokens(prompt=torch.tensor(prompt), batch_size=()), batch_size=())
        row.set("sampling", TensorDict(session=NonTensorData(name)))
        made.append(row)
    return lazy_stack(made)


@pytest.mark.parametrize("batching", [None, True])
def test_a_session_per_row(service: AsyncSGLang, batching: bool | None) -> None:
    """Rows with and without one; full tokens of a turn begin the next one's prompt."""
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={"max_new_tokens": 5, "ignore_eos": True},
        extras=["cached_tokens"],
        batching=batching,
        inplace=False,
    )
    sessions = [service.open_session() for _ in range(2)]
    names = [sessions[0].session_id, None, sessions[1].session_id]
    try:
        prompts = [[5, 6, 7], [8, 9], [10, 11]]
        for _ in range(3):
            out = policy(rows(prompts, names))
            full = [row["tokens"].full.tolist() for row in out.unbind(0)]
            assert [ids[: len(p)] for ids, p in zip(full, prompts, strict=True)] == prompts
            assert [session.tokens for session in sessions] == [full[0], full[2]]
            prompts = [[*ids, 20 + i] for i, ids in enumerate(full)]
    finally:
        for session in sessions:
            session.close()


def test_what_the_policy_refuses_leaves_sessions_usable(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs={"max_new_tokens": 5}, inplace=False
    )
    with service.open_session() as session:
        name = session.session_id
        with pytest.raises(InputError, match="was not opened here"):
            policy(rows([[5, 6], [7, 8]], [name, "unheard-of"]))
        with pytest.raises(ConfigError, match="one at a time"):
            policy(rows([[5, 6], [7, 8]], [name, name]))
        with pytest.raises(InputError, match="tokens"):
            policy(rows([[5, 6], [7] * 4000], [name, None]))
        policy(rows([[5, 6]], [name]))
        assert session.tokens[:2] == [5, 6]
        with pytest.raises(InputError, match="does not begin"):
            policy(rows([[6, 5, 7, 8, 9, 10, 11, 12]], [name]))


def test_threads_with_a_session_each(service: AsyncSGLang) -> None:
    """Opening, talking and closing at once; none is left on the server."""
    names: list[str] = []
    lock = threading.Lock()

    def talk(index: int) -> int:
        with service.open_session() as session:
            with lock:
                names.append(session.session_id)
            for _ in range(3):
                turn(service, session, [30 + index])
            return len(session.tokens)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(talk, range(6))) == [18] * 6
    assert len(set(names)) == 6
    assert not any(held(service, name) for name in names)


# Names, and going on from an earlier request


def test_a_name_of_the_users(service: AsyncSGLang, proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    name = f"mine-{new_rid()}"
    with proxied.open_session(session_id=name, capacity_of_str_len=4096) as session:
        (body,) = [json.loads(body) for path, body in proxy.seen if path == "/open_session"]
        assert (body["session_id"], body["capacity_of_str_len"]) == (name, 4096)
        assert session.session_id == name
        with pytest.raises(ConfigError, match="is open here"):
            proxied.open_session(session_id=name)
        with pytest.raises(RequestRefusedError, match="same id"):
            service.open_session(session_id=name)
        (completion,) = proxied.complete([session.request([5, 6], sampling=SHORT)])
        assert session.tokens == [5, 6, *completion.output_ids]
    proxied.open_session(session_id=name).close()


@pytest.mark.parametrize(
    "given",
    [
        {"session_id": ""},
        {"session_id": 5},
        {"session_id": "a\ud83d"},
        {"capacity_of_str_len": 0},
        {"capacity_of_str_len": True},
        {"capacity_of_str_len": "9"},
    ],
    ids=str,
)
def test_what_no_session_is_opened_with(service: AsyncSGLang, given: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        service.open_session(**given)


def test_it_goes_on_from_an_earlier_request(service: AsyncSGLang, model: Any) -> None:
    """Two ways from one turn: each is as the whole prompt would be, and the last one goes on."""
    with service.open_session() as session:
        (first,) = service.complete([session.request([5, 6, 7], sampling=SHORT)])
        start = list(session.tokens)
        ends = []
        for more in ([8], [9, 10]):
            request = session.request([*start, *more], after=first.rid, sampling=SHORT)
            assert request.input_ids == tuple(more)
            (completion,) = service.complete([request])
            assert completion.prompt_tokens == len(start) + len(more)
            assert worst_error(model, [[*start, *more]], [completion]) < 0.02
            ends.append([*start, *more, *completion.output_ids])
            assert session.tokens == ends[-1]
        assert session.request([*ends[1], 5], sampling=SHORT).input_ids == (5,)
        with pytest.raises(InputError, match="does not begin with them"):
            session.request([*ends[0], 5], after=completion.rid, sampling=SHORT)


@pytest.mark.parametrize("rid", ["", "unknown", 5])
def test_no_request_to_go_on_from(service: AsyncSGLang, rid: Any) -> None:
    with service.open_session() as session:
        service.complete([session.request([5, 6], sampling=SHORT)])
        with pytest.raises(InputError, match="no completed request"):
            session.request([5, 6, 7], after=rid, sampling=SHORT)
