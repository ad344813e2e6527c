"""OpenAI's own client on the service: the same server, key and tokens as `generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from torchrl_sglang import AsyncSGLang, Completion

MESSAGES: Any = [{"role": "user", "content": "what is the answer?"}]

COUNT = 12


@pytest.fixture
def client(service: AsyncSGLang) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=service.openai_base_url, api_key=service.api_key, max_retries=0, timeout=30.0
    ) as client:
        yield client


@pytest.fixture
def chat_ids(tokenizer: Any) -> list[int]:
    """The same chat as `MESSAGES`, as the ids that the server makes of it."""
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(service: AsyncSGLang, ids: list[int], count: int = COUNT) -> Completion:
    return service.generate(ids, {"max_new_tokens": count, "temperature": 0.0})


def asked(service: AsyncSGLang, **kwargs: Any) -> Any:
    """What both forms of a request have in common."""
    return {"model": service.info.model_path, "temperature": 0.0, "max_tokens": COUNT, **kwargs}


def check_chat(answer: Any, expected: Completion) -> None:
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_type
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.output_ids)
    scores = [token.logprob for token in choice.logprobs.content]
    assert scores == pytest.approx(expected.log_probs, abs=0.01)


def test_it_goes_through_the_router(service: AsyncSGLang) -> None:
    assert service.openai_base_url == service.server_url + "/v1"
    assert service.server_url not in [worker.url for worker in service.workers]


def test_chat(service: AsyncSGLang, client: openai.OpenAI, chat_ids: list[int]) -> None:
    answer = client.chat.completions.create(
        messages=MESSAGES, **asked(service, logprobs=True, top_logprobs=2)
    )
    check_chat(answer, greedy(service, chat_ids))
    for token in answer.choices[0].logprobs.content:
        # Greedy: nothing is likelier than the token that was taken.
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2


def test_completion_of_text(service: AsyncSGLang, client: openai.OpenAI, tokenizer: Any) -> None:
    answer = client.completions.create(prompt="the quick", **asked(service, logprobs=1))
    check_completion(answer, greedy(service, tokenizer("the quick")["input_ids"]))


def check_completion(answer: Any, expected: Completion) -> None:
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_type
    assert answer.usage.completion_tokens == len(expected.output_ids)
    assert choice.logprobs.token_logprobs == pytest.approx(expected.log_probs, abs=0.01)


def test_completion_of_ids(
    service: AsyncSGLang, client: openai.OpenAI, chat_ids: list[int]
) -> None:
    """The router takes text alone (sglang-router 0.3.2); a server takes ids as well."""
    with pytest.raises(openai.UnprocessableEntityError, match="prompt"):
        client.completions.create(prompt=chat_ids, **asked(service))
    with client.with_options(base_url=service.workers[0].url + "/v1") as direct:
        answer = direct.completions.create(prompt=chat_ids, **asked(service, logprobs=1))
    check_completion(answer, greedy(service, chat_ids))


def test_several_samples(service: AsyncSGLang, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=MESSAGES, **asked(service, temperature=1.5, n=4, logprobs=True)
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_streams(
    service: AsyncSGLang, client: openai.OpenAI, tokenizer: Any, chat_ids: list[int]
) -> None:
    expected = greedy(service, chat_ids, 100)  # a slow reader gets several tokens at once
    wanted = asked(service, stream=True, logprobs=True, max_tokens=100)
    chunks = list(client.chat.completions.create(messages=MESSAGES, **wanted))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == expected.text
    assert len([choice for choice in choices if choice.delta.content]) > 1
    assert [c.finish_reason for c in choices if c.finish_reason] == [expected.finish_type]
    scores = [token.logprob for c in choices if c.logprobs for token in c.logprobs.content or ()]
    assert scores == pytest.approx(expected.log_probs, abs=0.01)

    pieces = client.completions.create(prompt="the quick", **asked(service, stream=True))
    expected = greedy(service, tokenizer("the quick")["input_ids"])
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text


def test_the_async_client(service: AsyncSGLang, tokenizer: Any, chat_ids: list[int]) -> None:
    """Several requests at once, on the event loop of the caller."""

    async def ask() -> tuple[list[Any], str]:
        async with openai.AsyncOpenAI(
            base_url=service.openai_base_url, api_key=service.api_key, max_retries=0, timeout=30.0
        ) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        messages=MESSAGES, **asked(service, logprobs=True)
                    )
                    for _ in range(8)
                )
            )
            stream = await client.completions.create(
                prompt="the quick", **asked(service, stream=True)
            )
            return answers, "".join([piece.choices[0].text async for piece in stream])

    answers, streamed = asyncio.run(ask())
    expected = greedy(service, chat_ids)
    for answer in answers:
        check_chat(answer, expected)
    assert streamed == greedy(service, tokenizer("the quick")["input_ids"]).text


@pytest.mark.parametrize("key", ["wrong", ""], ids=["wrong", "none"])
def test_another_key_is_refused(service: AsyncSGLang, key: str) -> None:
    with openai.OpenAI(base_url=service.openai_base_url, api_key=key, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(messages=MESSAGES, **asked(service))
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(prompt="the quick", **asked(service))


def test_a_wrong_request_is_refused(service: AsyncSGLang, client: openai.OpenAI) -> None:
    """What the server says of it reaches the caller through the router."""
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(prompt="the quick", **asked(service, temperature=-1.0))
