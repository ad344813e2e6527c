"""Which tokens of a chat its assistant wrote, by its template."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.spans import GO, HI, SYSTEM, TEMPLATES, says
from torchrl_sglang.errors import InputError
from torchrl_sglang.policy.prompts.spans import assistant_spans, marked_tokens
from torchrl_sglang.policy.tokenizers import special_tokens

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


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
