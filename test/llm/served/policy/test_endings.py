"""What ends a turn: it is in the tokens once, whatever it is and whoever writes it again."""

from __future__ import annotations

from typing import Any

import pytest
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from helpers.tokenizers import without_names
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.policy.tokenizers import special_tokens

HI, GO = {"role": "user", "content": "hi"}, {"role": "user", "content": "go"}


@pytest.fixture(scope="module")
def unnamed(model_path: Any) -> Any:
    return without_names(model_path)


def asked(*chats: list[dict[str, Any]]) -> TensorDict:
    history = ChatHistory(prompt=History.from_chats(list(chats)), batch_size=len(chats))
    return TensorDict(history=history, batch_size=len(chats))


@pytest.mark.parametrize("carried", [False, True], ids=["remembered", "carried"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {2: 100.0}},
        {"logit_bias": {2: 100.0}, "stop": ["end"]},
        {"logit_bias": {2: 100.0}, "stop": ["<|im_end|>"], "ignore_eos": True},
        {"logit_bias": {2: 100.0}, "stop_token_ids": [2]},
        {"logit_bias": {2: 100.0}, "skip_special_tokens": True},
        {"logit_bias": {2: 100.0}, "no_stop_trim": False},
    ],
    ids=["eos", "stop in it", "stop is it", "stop id", "specials left out", "left out"],
)
def test_an_ending_without_a_name(
    service: AsyncSGLang, unnamed: Any, sampling: dict[str, Any], carried: bool
) -> None:
    policy = SGLangWrapper(
        service, tokenizer=unnamed, generate_kwargs={"max_new_tokens": 8, **sampling}
    )
    first = policy(asked([HI]))
    tokens = first[0]["tokens"].full.tolist()
    assert tokens[-1] == 2
    answer = first[0]["history"].response.content[0]
    assert answer == ""
    chat = [HI, {"role": "assistant", "content": answer}, GO]
    td = asked(chat)
    if carried:
        policy = policy.get_new_version()  # it remembers nothing
        td = first.set("history", td["history"])
    prompt = policy(td)[0]["tokens"].prompt.tolist()
    assert prompt[: len(tokens)] == tokens
    after = "\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    assert unnamed.decode(prompt[len(tokens) :]) == after


@pytest.mark.parametrize("carried", [False, True], ids=["remembered", "carried"])
def test_an_answer_that_begins_like_the_one_that_was_sampled(
    service: AsyncSGLang, tokenizer: Any, carried: bool
) -> None:
    """The user has put another in its place: the tokens are those of what the chat says."""
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        generate_kwargs={"max_new_tokens": 3, "ignore_eos": True, "logit_bias": {2: -100.0}},
    )
    first = policy(asked([HI]))
    answer = first[0]["history"].response.content[0]
    for other in (answer + "oo", answer[:-1], ""):
        chat = [HI, {"role": "assistant", "content": other}, GO]
        td = asked(chat)
        if carried:
            td = first.clone().set("history", td["history"])
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = policy(td)[0]["tokens"].prompt.tolist()
        assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("stop", ["e", "o", " ", "th"])
def test_messages_say_what_the_server_says(service: AsyncSGLang, tokenizer: Any, stop: str) -> None:
    """SGLang's own text, stops left out, for every row.

    Bytes that are no whole character are not sampled: SGLang, which decodes piece by piece, makes
    more or fewer replacement characters of them, and joins those with a special token between.
    """
    broken = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    # And what the stop is made of is sampled often enough to stop some rows.
    likely = dict.fromkeys(tokenizer(stop, add_special_tokens=False)["input_ids"], 3.0)
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        generate_kwargs={
            "max_new_tokens": 24,
            "stop": stop,
            "ignore_eos": True,
            "logit_bias": {**dict.fromkeys(broken, -100.0), **likely},
        },
        inplace=False,
    )
    own: list[Any] = []
    complete = service.complete

    def recorded(*args: Any) -> Any:
        own.extend(complete(*args))
        return own

    policy.service = type(
        "Recording", (), {"complete": staticmethod(recorded), "info": service.info}
    )()
    out = policy(asked(*[[{"role": "user", "content": f"say {i}"}] for i in range(12)]))
    special = special_tokens(tokenizer)
    for row, completion in zip(out.unbind(0), own, strict=True):
        said = row["history"].response.content[0]
        assert special.left_out(said)[0] == completion.text
    stopped = [isinstance(completion.matched_stop, str) for completion in own]
    assert any(stopped)
    assert any(completion.text for completion in own)
