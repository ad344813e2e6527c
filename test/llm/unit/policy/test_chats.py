"""Templates as models really have them: calls of tools, thoughts, spaces and parts."""

from __future__ import annotations

from typing import Any

import pytest
from tensordict import lazy_stack
from tiny_model import make_tokenizer
from torchrl.data.llm import History

from helpers.templates import says
from helpers.tokenizers import metaspace
from torchrl_sglang.errors import InputError
from torchrl_sglang.policy.prompts.chats import ChatFormat, Chats
from torchrl_sglang.policy.prompts.spans import assistant_spans
from torchrl_sglang.policy.prompts.turn_memory import (
    SENTINEL,
    Turn,
    after_answer,
    chat_key,
    continued,
    sentinel_for,
)
from torchrl_sglang.policy.tokenizers import special_tokens

TOKENIZER = make_tokenizer(vocab_size=300)

OPEN, CLOSE = "{{ '<|im_start|>' ~ m.role ~ '\\n' }}", "{{ '<|im_end|>\\n' }}"

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

LOOP, END = "{% for m in messages %}", "{% endfor %}"

CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function.name ~ c.function.arguments ~ "

# An answer of a tool has to follow a call, and says which: the call's name is in what others wrote.
STRICT = (
    "{% set ns = namespace(name=none, last=-1) %}"
    + "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    + "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + LOOP
    + "{% if m.role == 'tool' %}{% if ns.name is none %}{{ raise_exception('no call') }}{% endif %}"
    + "{{ '<|im_start|>' ~ ns.name ~ '\\n' ~ m.content }}{% else %}"
    + OPEN
    # Thoughts before a final answer are left out, as soon as there is one.
    + "{% if m.content and not (m.tool_calls and ns.last > loop.index0) %}"
    + "{{ m.content }}{% endif %}"
    + CALLS
    + "'</call>' }}{% set ns.name = c.function.name %}{% endfor %}{% endif %}"
    + CLOSE
    + END
    + ASK
)

# A call is written where there is no content, as by DeepSeek's first.
NONE_ASKS = (
    LOOP
    + OPEN
    + "{% if m.content is none %}"
    + CALLS
    + "'</call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    + CLOSE
    + END
    + ASK
)

WRITES_NONE = (
    LOOP + OPEN + "{{ m.content }}" + CALLS + "'</call>' }}{% endfor %}" + CLOSE + END + ASK
)

SPACED = (
    LOOP
    + "{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}{% else %}"
    + "{{ ' ' ~ m.content ~ '<|im_end|>' }}{% endif %}"
    + END
)


def call(name: str = "add", arguments: str = "(1)") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


HI, TWO = says("user", "hi"), says("tool", "2")


def how(template: str, tokenizer: Any = TOKENIZER, **options: Any) -> ChatFormat:
    return ChatFormat(
        tokenizer=tokenizer, template=template, special=special_tokens(tokenizer), **options
    )


def spans(template: str, *messages: dict[str, Any]) -> list[str]:
    form = how(template)
    text = form.render(messages, False)
    return [text[a:b] for a, b in assistant_spans(messages, text, form.render, form.special)]


def chats(template: str, *messages: dict[str, Any], **options: Any) -> Chats:
    return Chats(lazy_stack([History.from_chats([[*messages]])[0]]), how(template, **options))


@pytest.mark.parametrize(
    ("messages", "marked"),
    [
        ([HI, says("assistant", "c", call())], ["c<call>add(1)</call><|im_end|>"]),
        ([HI, says("assistant", "c", call()), TWO], ["c<call>add(1)</call><|im_end|>"]),
        ([HI, says("assistant", None, call()), TWO], ["<call>add(1)</call><|im_end|>"]),
        (
            [HI, says("assistant", None, call()), TWO, says("assistant", "43")],
            ["<call>add(1)</call><|im_end|>", "43<|im_end|>"],
        ),
        (
            [HI, says("assistant", "hm", call()), TWO, says("assistant", "so", call("sub"))],
            ["hm<call>add(1)</call><|im_end|>", "so<call>sub(1)</call><|im_end|>"],
        ),
        (
            [HI, says("assistant", "hm", call(), call("sub"))],
            ["hm<call>add(1)</call><call>sub(1)</call><|im_end|>"],
        ),
    ],
)
def test_calls_are_the_assistants(messages: list[dict[str, Any]], marked: list[str]) -> None:
    """All of them, and nothing of what the tool said, though it names the call."""
    assert spans(STRICT, *messages) == marked


def test_a_call_that_the_template_leaves_out_is_an_error() -> None:
    drops = LOOP + OPEN + "{{ m.content or '' }}" + CLOSE + END + ASK
    with pytest.raises(InputError, match="message 1"):
        spans(LOOP + "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}" + END, HI, HI | {
            "role": "assistant"
        })  # fmt: skip
    assert spans(drops, HI, says("assistant", "c", call())) == ["c<|im_end|>"]


@pytest.mark.parametrize("answer", ["the answer", "the", "<think>x"])
def test_the_space_before_an_answer_is_sampled_too(answer: str) -> None:
    assert spans(SPACED, HI, says("assistant", answer)) == [f" {answer}<|im_end|>"]
    assert how(SPACED).prompt([HI]).endswith("[/INST]")


def test_a_call_without_words() -> None:
    """It is without a content for the template, as it is for the tokenizer itself."""
    messages = [HI, says("assistant", None, call()), TWO]
    [text] = chats(NONE_ASKS, *messages).texts(add_generation_prompt=True)
    assert text == TOKENIZER.apply_chat_template(
        messages, chat_template=NONE_ASKS, tokenize=False, add_generation_prompt=True
    )
    [text] = chats(WRITES_NONE, *messages).texts(add_generation_prompt=True)
    assert "<call>add(1)</call>" in text
    assert "None" not in text


def test_no_words_and_empty_ones_are_one_chat() -> None:
    keys = {chat_key([HI, says("assistant", content, call())]) for content in (None, "")}
    assert len(keys) == 1
    assert chat_key([HI, says("assistant", "c", call())]) not in keys


@pytest.mark.parametrize(
    "answer", ["<|im_end|>", "\n<|im_end|>", "hm</think>ok<|im_end|>"], ids=repr
)
def test_the_end_of_an_answer_is_written_once(answer: str) -> None:
    """The template writes a thought around what was sampled within one that it had begun."""
    thinks = (
        LOOP
        + OPEN
        + "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
        + "{{ '<think>\\n' ~ (parts[0] if parts | length > 1 else '') ~ '\\n</think>\\n\\n' ~ "
        + "parts[-1] }}{% else %}{{ m.content }}{% endif %}"
        + CLOSE
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    form = how(thinks)
    prompt = form.prompt([HI])
    content = answer.removesuffix("<|im_end|>")
    turn = Turn(
        ids=form.encode(prompt + answer),
        text=prompt + content,
        cut="<|im_end|>",
        answered=bool(content),
    )
    messages = [HI, says("assistant", content), says("user", "go")]
    ids = continued(
        turn,
        messages,
        1,
        form.prompt(messages),
        render=form.render,
        encode=form.encode,
        after=form.after,
        special=form.special,
    )
    follows = "\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert TOKENIZER.decode(ids) == prompt + answer + follows


def test_a_template_that_fails_without_calls_is_no_error() -> None:
    form = how(STRICT)
    chat = [HI, says("assistant", None, call()), TWO]
    assert after_answer(chat, 1, form.render) is None
    assert form.closing(chat[:2]) == "<|im_end|>\n"


@pytest.mark.parametrize(
    "broken", ["{{ 1 // (messages | length - 1) }}", "{% for i in range(1000000) %}{% endfor %}"]
)
def test_whatever_a_template_fails_with(broken: str) -> None:
    with pytest.raises(InputError, match="can't write the chat of row 0"):
        chats(broken + LOOP + END, HI).texts(add_generation_prompt=True)


def test_parts_where_one_role_takes_strings() -> None:
    template = (
        LOOP
        + "{% if m.role == 'system' %}{{ m.content | trim }}{% elif m.content is string %}"
        + "{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
        + END
    )
    parts = [{"type": "text", "text": "be kind"}]
    assert chats(template, says("user", parts)).texts(add_generation_prompt=True) == ["be kind"]
    with pytest.raises(InputError, match=r"\(system\) is a list of parts"):
        chats(template, says("system", parts), says("user", parts))


def test_an_answer_in_parts_is_continued() -> None:
    template = (
        LOOP
        + OPEN
        + "{% if m.content is string %}{{ m.content }}{% else %}"
        + "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
        + CLOSE
        + END
        + ASK
    )
    sure = says("assistant", [{"type": "text", "text": "Sure"}])
    made = chats(template, HI, sure, continue_final=True)
    assert made.begun == ["Sure"]
    assert made.texts(add_generation_prompt=True)[0].endswith("assistant\nSure")
    empty = chats(template, HI, says("assistant", ""), continue_final=True)
    assert empty.begun == [""]
    assert empty.texts(add_generation_prompt=True) == chats(template, HI).texts(
        add_generation_prompt=True
    )


def test_what_stands_for_an_answer_is_in_no_message() -> None:
    user = says("user", f"what is {SENTINEL} here?")
    template = LOOP + OPEN + "{{ m.content | trim }}" + CLOSE + END + ASK
    form, chat = how(template), [HI, says("assistant", "hm \n"), user]
    assert sentinel_for(chat) not in repr(chat)
    rest = after_answer(chat, 1, form.render)
    assert rest is not None
    assert rest.startswith("<|im_end|>\n<|im_start|>user\nwhat is ")
    assert spans(template, *chat[:2]) == ["hm<|im_end|>"]


@pytest.fixture(scope="module", params=["first", "always"])
def spaced(request: pytest.FixtureRequest) -> Any:
    return metaspace(request.param)


def test_what_goes_on_begins_with_no_space(spaced: Any) -> None:
    form = how("", spaced)
    ids = form.encode("the quick")
    assert spaced.decode([*ids, *form.after(ids, "ly jumps")]) == "the quickly jumps"
    assert spaced.decode([*ids, *form.after(ids, " brown")]) == "the quick brown"
    assert form.after(ids, "") == []
    whole = form.encode("the</s> fox")
    head = form.encode("the</s>")
    assert whole == [*head, *form.after(head, " fox")]
    assert how("").after(TOKENIZER.encode("ab"), "c d") == how("").encode("c d")
