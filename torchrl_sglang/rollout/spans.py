"""Which characters of a rendered chat its assistant wrote, and which tokens hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from ..errors import InputError
from .turns import SENTINEL, Message, Render, SpecialTokens, num_shared

Span = tuple[int, int]  # characters from the first up to the second


def assistant_spans(
    messages: Sequence[Message], text: str, render: Render, special: SpecialTokens
) -> list[Span]:
    """Spans of an assistant's messages, each with what the template ends it with.

    A message is found by what changes when another stands in its place: the template may trim it,
    leave thoughts out, or write calls of tools. What others wrote is the same in both.

    Raises:
        InputError: the template writes nothing of a message that says something.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _span(messages, index, text, render)
        if span is not None:
            spans.append((span[0], _with_ending(messages, index, text, span[1], render, special)))
        elif _says_something(message):
            raise InputError(
                f"the chat template writes nothing of message {index}, which is the assistant's: "
                "none of its tokens would be marked as the assistant's. Use a template that writes "
                "it, or leave the message out."
            )
    return spans


def _says_something(message: Message) -> bool:
    return any(value for name, value in message.items() if name not in ("role", "is_complete"))


def _span(messages: Sequence[Message], index: int, text: str, render: Render) -> Span | None:
    """Where the text of a message is; None where the template leaves the message out."""
    for mark in _marks(messages[index]):
        try:
            other = render([*messages[:index], mark, *messages[index + 1 :]], False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            continue  # a template may want the calls that an answer of a tool belongs to
        if SENTINEL in other:
            start = num_shared(text, other)
            end = len(text) - num_shared(text[::-1], other[::-1])
            if start <= end:
                return start, end
    return None


def _marks(message: Message) -> list[Message]:
    """What can stand in the place of a message: an answer in words, or one with its calls."""
    return [{"role": "assistant", "content": SENTINEL}, {**message, "content": SENTINEL}]


def _with_ending(
    messages: Sequence[Message],
    index: int,
    text: str,
    end: int,
    render: Render,
    special: SpecialTokens,
) -> int:
    """Where a message ends that the template closes, as with an EOS."""
    try:
        alone = render([*messages[:index], {"role": "assistant", "content": SENTINEL}], False)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        alone = ""
    closing = alone.rpartition(SENTINEL)[2].rstrip() if SENTINEL in alone else ""
    if closing and text.startswith(closing, end):
        return end + len(closing)
    return end + max((len(s) for s in special.texts if text.startswith(s, end)), default=0)


def marked_tokens(offsets: Sequence[Any], spans: Sequence[Span]) -> list[bool]:
    """Which tokens begin in a span; of a span in which none begins, those that hold some of it.

    Args:
        offsets: first character of each token, and the one after its last.
        spans: spans of characters.
    """
    marks = [False] * len(offsets)
    for first, last in spans:
        inside = [i for i, (start, _) in enumerate(offsets) if first <= start < last]
        if not inside:
            inside = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
        for index in inside:
            marks[index] = True
    return marks
