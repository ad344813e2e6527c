"""Answers behind a space, and chats that another process began."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text

from helpers.templates import says
from helpers.tokenizers import metaspace
from torchrl_sglang import AsyncSGLang, SGLangWrapper


@pytest.fixture(scope="module", params=["first", "always"])
def spaced(request: pytest.FixtureRequest) -> Any:
    return metaspace(request.param)


def policy_of(
    service: AsyncSGLang, spaced: Any, skip_special_tokens: bool = False, **options: Any
) -> SGLangWrapper:
    """Samples words that begin with a space."""
    words = spaced.convert_tokens_to_ids(["\u2581quick", "\u2581fox"])
    sampling = {
        "max_new_tokens": 3,
        "logit_bias": dict.fromkeys(words, 100.0),
        "skip_special_tokens": skip_special_tokens,
    }
    return SGLangWrapper(service, tokenizer=spaced, generate_kwargs=sampling, **options)


@pytest.mark.parametrize("skips", [False, True])
def test_an_answer_behind_a_space(service: AsyncSGLang, spaced: Any, skips: bool) -> None:
    options = {"skip_special_tokens": skips}
    policy = policy_of(service, spaced, input_mode="text", pad_output=False, **options)
    texts = Text(prompt=["the", "jumps quick"], batch_size=2)
    out = policy(TensorDict(text=texts, batch_size=2))
    for row in out.unbind(0):
        assert row["text"].full == spaced.decode(row["tokens"].full)
        assert row["text"].response.startswith(" ")
    longer = Text(prompt=[row["text"].full + " fox" for row in out.unbind(0)], batch_size=2)
    again = policy(TensorDict(text=longer, tokens=out["tokens"], batch_size=2))
    for row, before in zip(again.unbind(0), out.unbind(0), strict=True):
        sampled = before["tokens"].full
        assert torch.equal(row["tokens"].prompt[: len(sampled)], sampled)
        assert spaced.decode(row["tokens"].prompt) == row["text"].prompt


@pytest.mark.parametrize("continues", [False, True])
def test_a_message_begins_with_no_space(service: AsyncSGLang, spaced: Any, continues: bool) -> None:
    """But one that goes on does so behind it."""
    template = (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
    )
    policy = policy_of(
        service,
        spaced,
        chat_template=template,
        pad_output=False,
        continue_final_message=continues,
    )
    chat = [says("user", "jumps"), says("assistant", "the")]
    history = ChatHistory(prompt=History.from_chats([chat]))
    out = policy(TensorDict(history=history, batch_size=1))[0]
    said = out["history"].response[-1].content
    assert out["text"].full == spaced.decode(out["tokens"].full)
    assert said == ("the" if continues else "") + out["text"].response[0 if continues else 1 :]


@pytest.mark.parametrize("space", ["", " "])
def test_a_chat_that_another_process_began(service: AsyncSGLang, spaced: Any, space: str) -> None:
    """Which knows it from its TensorDict alone, whatever its template writes before an answer."""
    template = "{% for m in messages %}" + (
        "{% if m.role == 'user' %}{{ m.content }}</s>{% else %}"
        + space
        + "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    options = {"chat_template": template, "pad_output": False}
    first = [says("user", "jumps")]
    td = TensorDict(history=ChatHistory(prompt=History.from_chats([first])), batch_size=1)
    out = policy_of(service, spaced, **options)(td)
    sampled, said = out[0]["tokens"].full, out[0]["history"].response[-1].content
    assert not said.startswith(" ")
    chat = [*first, says("assistant", said), says("user", "the")]
    again = TensorDict(history=ChatHistory(prompt=History.from_chats([chat])), batch_size=1)
    for key in ("tokens", "masks", "text"):
        again[key] = out[key]
    row = policy_of(service, spaced, **options)(again)[0]
    assert torch.equal(row["tokens"].prompt[: len(sampled)], sampled)
    assert row["tokens"].prompt[len(sampled) :].tolist()[0] == 2
