"""What fits into the context is answered in full; what does not fit is refused by its numbers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack

from helpers.fault_proxy import FaultProxy
from helpers.seeds import cut, rows
from helpers.servers import needs, told
from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper
from torchrl_sglang.errors import InputError, PromptTooLongError, RequestRefusedError
from torchrl_sglang.generate.room import BEYOND_LONGEST_INPUT, room_for

ON = {"ignore_eos": True, "max_new_tokens": 64}


def full_after(service: AsyncSGLang, room: int) -> list[int]:
    """A prompt that leaves room for so many tokens."""
    assert service.max_input_len is not None
    return [5] * (service.max_input_len + BEYOND_LONGEST_INPUT - room)


@pytest.mark.parametrize("room", [5, 6, 63, 64])
def test_the_server_gives_what_is_said_to_fit(service: AsyncSGLang, room: int) -> None:
    """Of one token more it says nothing; a prompt that leaves less it refuses."""
    completion = service.generate(full_after(service, room), ON)
    assert (len(completion.output_ids), completion.finish_reason) == (room, "length")
    body = {
        "input_ids": full_after(service, room),
        "sampling_params": {"max_new_tokens": room + 1, "ignore_eos": True},
    }
    answer = told(service.workers[0], "/generate", body)
    assert len(answer["output_ids"]) == room
    with pytest.raises(RequestRefusedError):
        told(service.workers[0], "/generate", {**body, "input_ids": full_after(service, 4)})


def test_the_other_rows_are_not_lost(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", inplace=False, generate_kwargs=ON)
    out = policy(rows([5, 6], full_after(service, 9), full_after(service, 5)))
    assert [len(row["tokens", "response"]) for row in out.unbind(0)] == [64, 9, 5]
    assert [row["rollout", "finish_reason"] for row in out.unbind(0)] == ["length"] * 3


@pytest.mark.parametrize("samples", [None, 2])
def test_it_can_be_refused_instead(
    service: AsyncSGLang, monkeypatch: pytest.MonkeyPatch, samples: int | None
) -> None:
    def sent(*args: Any) -> Any:
        raise AssertionError("something was sent")

    monkeypatch.setattr(service._local.generator, "data_plane", sent)
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        inplace=False,
        generate_kwargs=ON,
        num_samples=samples,
        fit_context=False,
    )
    long = full_after(service, 9)
    says = f"prompt 1 has {len(long)} tokens.*room for 9.*max_new_tokens=64"
    with pytest.raises(PromptTooLongError, match=says):
        policy(rows([5, 6], long))
    with pytest.raises(PromptTooLongError, match=says):
        service.generate([[5, 6], long], ON, fit_context=False)
    with pytest.raises(PromptTooLongError, match=says):
        asyncio.run(service.agenerate([[5, 6], long], ON, fit_context=False))
    with pytest.raises(PromptTooLongError, match="min_new_tokens=10"):
        service.generate([[5, 6], long], ON, min_new_tokens=10)
    with pytest.raises(PromptTooLongError, match="prompt 1 has"):
        service.generate([[5, 6], full_after(service, 4)], ON)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_text_is_counted_by_the_server(service: AsyncSGLang, n: int) -> None:
    text = "a b c " * 395
    completions = service.generate(["hi", text], ON, max_new_tokens=1000, n=n, grouped=True)[1]
    assert len(completions) == n
    for completion in completions:
        assert completion.finish_reason == "length"
        assert completion.prompt_tokens > 1048
        room = room_for(completion.prompt_tokens, service.max_input_len)
        assert len(completion.output_ids) == room
    with pytest.raises(RequestRefusedError, match="context"):
        service.generate([text], ON, max_new_tokens=1000, min_new_tokens=900)


def test_what_a_session_holds_counts(service: AsyncSGLang) -> None:
    needs(service, "sessions")
    with service.open_session() as session:
        sampling = SamplingParams.from_kwargs(ON)
        start = full_after(service, 80)
        (first,) = service.complete([session.request(start, sampling=sampling)])
        assert len(first.output_ids) == 64
        (second,) = service.complete([session.request([*session.tokens, 5], sampling=sampling)])
        assert (len(second.output_ids), second.finish_reason) == (15, "length")
        with pytest.raises(PromptTooLongError, match="prompt 0 has"):
            service.complete([session.request([*session.tokens, 5], sampling=sampling)])


def test_a_prompt_too_long_to_be_scored(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate=False, inplace=False)

    def whole(ids: list[int]) -> Any:
        tokens = TensorDict(full=torch.tensor(ids), batch_size=())
        return lazy_stack([TensorDict(tokens=tokens, batch_size=())])

    fits = full_after(service, 5)
    assert len(policy(whole(fits))[0]["log_probs", "full"]) == len(fits)
    with pytest.raises(InputError, match=f"prompt 0 has {len(fits) + 1} tokens"):
        policy(whole([*fits, 5]))


@pytest.mark.parametrize(("room", "more"), [(9, 8), (6, 5), (5, 0)])
def test_a_row_that_goes_on_to_the_end_of_the_context(
    proxied: AsyncSGLang, proxy: FaultProxy, room: int, more: int
) -> None:
    """After its first token it has room for one less; less than five no prompt may leave."""
    policy = SGLangWrapper(
        proxied, input_mode="tokens", inplace=False, generate_kwargs=ON, partial_rollouts=True
    )
    out = policy(rows([5, 6], full_after(proxied, room)))
    cut(out[1])
    proxy.seen.clear()
    whole = policy.resume(out)[1]
    asked = [
        json.loads(body)["sampling_params"] for path, body in proxy.seen if path == "/generate"
    ]
    assert [sampling["max_new_tokens"] for sampling in asked] == ([more] if more else [])
    assert whole["rollout", "finish_reason"] == "length"
    assert len(whole["log_probs", "full"]) == len(full_after(proxied, room)) + 1 + more
