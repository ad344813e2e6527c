"""Which tokens of a chat its assistant wrote: all of them and no others, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.servers import hf_log_probs
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory
from transformers import AutoTokenizer

from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.errors import InputError, TokenizerError
from torchrl_sglang.policy.prompts.spans import assistant_spans, marked_tokens
from torchrl_sglang.policy.tokenizers import special_tokens

OPEN = "'<|im_start|>' + m['role'] + '\\n'"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(content: str, before: str = "") -> str:
    return (
        before
        + "{% for m in messages %}{{ "
        + OPEN
        + " + "
        + content
        + " + '<|im_end|>\\n' }}{% endfor %}"
        + ASK
    )


# As Qwen3 does: an empty thought before the last answer, none before earlier ones.
THINKS = (
    "{% for m in messages %}{% set c = m['content'] %}{{ " + OPEN + " }}"
    "{% if m['role'] == 'assistant' %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}{{ c + '<|im_end|>\\n' }}{% endfor %}" + ASK
)
# Calls of tools are written after the words, as JSON.
TOOLS = (
    "{% for m in messages %}{{ " + OPEN + " }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    "plain": chatml("m['content']"),
    "trims": chatml("m['content'] | trim"),
    "upper": chatml("m['content'] | upper"),
    "counts": chatml("m['content']", "{{ messages | length ~ ' messages\\n' }}"),
    "thinks": THINKS,
    "calls": TOOLS,
    "nothing special": PLAIN,
    "alternates": chatml(
        "m['content']",
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
    ),
}
SYSTEM, HI, GO = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "user", "content": "42"},  # what the assistant says too
)


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"name": "add", "arguments": {"a": 1}}


def spoken(template: str, chat: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    def render(messages: Any, ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=ask, tokenize=False
        )
        return text

    text = render(chat, False)
    spans = assistant_spans(chat, text, render, special_tokens(tokenizer))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        ("plain", [HI, says("42")], ["42<|im_end|>"]),
        ("plain", [HI, says("42"), GO, says("42")], ["42<|im_end|>"] * 2),
        ("plain", [says("42"), GO], ["42<|im_end|>"]),
        ("plain", [SYSTEM, says("a"), says("b"), HI], ["a<|im_end|>", "b<|im_end|>"]),
        ("plain", [HI, says("")], ["<|im_end|>"]),
        ("plain", [HI, says("\n")], ["\n<|im_end|>"]),
        ("plain", [HI, says("<|im_start|>user\nhi")], ["<|im_start|>user\nhi<|im_end|>"]),
        ("trims", [HI, says(" 42"), GO, says("42\n")], ["42<|im_end|>"] * 2),
        ("trims", [HI, says("  ")], ["<|im_end|>"]),
        ("upper", [HI, says("yes")], ["YES<|im_end|>"]),
        ("counts", [HI, says("a"), GO, says("b")], ["a<|im_end|>", "b<|im_end|>"]),
        ("thinks", [HI, says("42")], ["42<|im_end|>"]),
        ("thinks", [HI, says("a"), GO, says("b")], ["a<|im_end|>", "b<|im_end|>"]),
        (
            "thinks",
            [HI, says("<think>\nhm\n</think>\n\n42")],
            ["hm\n</think>\n\n42<|im_end|>"],
        ),
        (
            "calls",
            [HI, says(None, tool_calls=[CALL]), {"role": "tool", "content": "2"}, says("2")],
            [
                '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
                "2<|im_end|>",
            ],
        ),
        ("nothing special", [HI, says("a"), GO, says("b")], ["a", "b"]),
        ("alternates", [HI, says("a"), GO, says("b")], ["a<|im_end|>", "b<|im_end|>"]),
    ],
)
def test_spans_of_the_assistant(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], expected: list[str]
) -> None:
    assert spoken(TEMPLATES[template], chat, tokenizer) == expected


def test_a_message_that_is_left_out_is_an_error(tokenizer: Any) -> None:
    silent = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}" + ASK
    with pytest.raises(InputError, match="nothing of message 1"):
        spoken(silent, [HI, says("42")], tokenizer)
    assert spoken(silent, [HI, says("")], tokenizer) == []


def test_tokens_that_hold_a_span() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 9)]
    assert marked_tokens(offsets, [(2, 5)]) == [False, True, False, False]
    assert marked_tokens(offsets, [(3, 4)]) == [False, True, False, False]  # inside one token
    assert marked_tokens(offsets, [(1, 9)]) == [False, True, True, True]
    assert marked_tokens(offsets, []) == [False] * 4


def scored(service: AsyncSGLang, tokenizer: Any, template: str, *chats: Any) -> Any:
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, generate=False, inplace=False, chat_template=template
    )
    history = History.from_chats(list(chats))
    return policy(
        TensorDict(history=ChatHistory(full=history, batch_size=len(chats)), batch_size=len(chats))
    )


def test_masks_of_scored_chats(service: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    """Several rows and templates: what is marked says what the assistant said."""
    for template in ("plain", "trims", "thinks"):
        chats = [[HI, says(" 42")], [says("hello"), GO, says("42\n")]]
        out = scored(service, tokenizer, TEMPLATES[template], *chats)
        for row, chat in zip(out.unbind(0), chats, strict=True):
            ids, mask = row["tokens"].full, row["masks"].all_assistant_mask
            marked = tokenizer.decode(ids[mask])
            said = [m["content"].strip() for m in chat if m["role"] == "assistant"]
            assert marked.replace(" ", "").replace("\n", "") == "".join(
                text + "<|im_end|>" for text in said
            )
            expected = torch.tensor(hf_log_probs(model, ids[:1].tolist(), ids[1:].tolist()))
            torch.testing.assert_close(row["log_probs"].full[1:], expected, atol=0.02, rtol=0)


def test_a_row_that_has_no_span_is_named(service: AsyncSGLang, tokenizer: Any) -> None:
    silent = chatml("(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(InputError, match="nothing of message 1") as caught:
        scored(service, tokenizer, silent, [HI], [HI, says("42")])
    assert "row 1" in str(caught.value.__notes__)
    generation = chatml("m['content']") + "{% generation %}{% endgeneration %}"
    with pytest.raises(InputError, match="marks nothing"):
        scored(service, tokenizer, generation, [HI, says("42")])


def test_slow_tokenizers_can_not_mark(service: AsyncSGLang, model_path: Any) -> None:
    """Found when the policy is made; they generate all the same."""
    slow = AutoTokenizer.from_pretrained(model_path)
    kind = type("Slow", (type(slow),), {"is_fast": property(lambda self: False)})
    slow.__class__ = kind
    with pytest.raises(TokenizerError, match="fast"):
        SGLangWrapper(service, tokenizer=slow, generate=False)
    out = SGLangWrapper(service, tokenizer=slow, generate_kwargs={"max_new_tokens": 2})(
        TensorDict(
            history=ChatHistory(prompt=History.from_chats([[HI]]), batch_size=1), batch_size=1
        )
    )
    assert len(out[0]["tokens"].response) == 2 or out[0]["tokens"].response[-1] == 2
