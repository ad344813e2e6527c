"""Finds what the assistant of a rendered chat wrote: characters, and the tokens that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InputError
from .turn_memory import (
    Message,
    Render,
    SpecialTokens,
    after_answer,
    num_shared,
    rendered,
    sentinel_for,
)

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
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        floor = spans[-1][1] if spans else 0
        span = _span(messages, index, text, render, special, floor)
        if span is not None:
            spans.append(span)
        elif _says_something(message):
            raise InputError(
                f"the chat template writes nothing of message {index}, which is the assistant's, "
                "or nothing that can be told from the rest: its tokens would not be marked as the "
                "assistant's. Use a template that writes it, or leave the message out."
            )
    return spans


def _says_something(message: Message) -> bool:
    return any(value for name, value in message.items() if name not in ("role", "is_complete"))


def _span(
    messages: Sequence[Message],
    index: int,
    text: str,
    render: Render,
    special: SpecialTokens,
    floor: int,
) -> Span | None:
    """Where a message is, from ``floor`` on; None where the template leaves the message out."""
    sentinel = sentinel_for(messages)
    before, after = messages[:index], messages[index + 1 :]
    for mark in _marks(messages[index], sentinel):
        other = rendered(render, [*before, mark, *after])
        if other is None or other == text or (mark["content"] and sentinel not in other):
            continue
        start = num_shared(text, other)
        end = len(text) - num_shared(text[::-1], other[::-1])
        called = bool(mark.get("tool_calls"))
        if called:
            # What closes a call closes the other too, and an answer of a tool may name its call.
            end = _end_alone(messages, index, text, render) or end
        # Words in the place of a call may have the template write what comes before otherwise.
        if not floor <= start <= end or (called and start == end):
            continue
        if not called:
            end = _with_ending(messages, index, text, end, render, special)
        return _from_where_asked(before, text, start, render, called=called), end
    return None


def _marks(message: Message, sentinel: str) -> list[Message]:
    """What can stand in the place of a message: an answer in words, or one with other calls."""
    marks: list[Message] = [{"role": "assistant", "content": sentinel}]
    if message.get("tool_calls"):
        calls = _others(message["tool_calls"], sentinel)
        marks.append({**message, "content": sentinel, "tool_calls": calls})
        marks.append({**message, "content": None, "tool_calls": calls})
    return marks


def _others(value: Any, sentinel: str, name: str = "") -> Any:
    """Calls of the same shape, of which every name and argument is another."""
    if isinstance(value, Mapping):
        if name == "arguments":
            return {sentinel: sentinel}
        return {key: _others(each, sentinel, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_others(each, sentinel) for each in value]
    return sentinel if name in ("name", "arguments") else value


def _from_where_asked(
    before: Sequence[Message], text: str, start: int, render: Render, *, called: bool
) -> int:
    """Where an answer begins that has white space before it which its prompt had not.

    Of one with calls all that follows the prompt is its own, as the name that two may share.
    """
    asked = rendered(render, before, True) if before else None
    if asked is None or not text.startswith(asked) or len(asked) > start:
        return start
    return len(asked) if called or text[len(asked) : start].isspace() else start


def _end_alone(messages: Sequence[Message], index: int, text: str, render: Render) -> int:
    """Where a message ends in a chat that goes on as it does where the message is the last."""
    upto = rendered(render, messages[: index + 1])
    return len(upto.rstrip()) if upto is not None and text.startswith(upto.rstrip()) else 0


def _with_ending(
    messages: Sequence[Message],
    index: int,
    text: str,
    end: int,
    render: Render,
    special: SpecialTokens,
) -> int:
    """Where a message ends that the template closes, as with an EOS."""
    alone = after_answer(messages[: index + 1], index, render, asking=False)
    closing = (alone or "").rstrip()
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
