"""Chats: rendered with a template and tokenised, with what was sampled before left as it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from torchrl.data.llm import History

from ..errors import InputError
from .media import for_template, has_parts
from .turns import SENTINEL, Message, Turn, continued, last_answer

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks what an assistant writes


class Chats:
    """The chats of one batch.

    Args:
        history: ``[batch, turns]``; rows with the role ``"<none>"`` are padding.
        tokenizer: Hugging Face tokenizer.
        template: chat template in Jinja.
    """

    def __init__(self, history: History, *, tokenizer: Any, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.messages: list[list[Message]] = [_messages(row) for row in history.unbind(0)]
        self._check_parts()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """One chat as text, special tokens included."""
        text: str = self._tokenizer.apply_chat_template(
            for_template(messages),
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return text

    def _check_parts(self) -> None:
        """Raises `InputError` for a content that is a list where the template writes strings."""
        if not any(has_parts(message) for messages in self.messages for message in messages):
            return
        parts = [{"type": "text", "text": SENTINEL}]
        try:
            written = self.render([{"role": "user", "content": parts}], False)
        except (TypeError, ValueError, TemplateError):  # as when it joins a list to a string
            written = ""
        if SENTINEL not in written or "'" + SENTINEL in written:  # the list as Python writes it
            raise InputError(
                "the content of a message is a list of parts, and the chat template writes strings "
                "only: give text as a string; images, videos and audio need a model that reads "
                "them, and its template."
            )

    def texts(self, *, add_generation_prompt: bool) -> list[str]:
        """Every chat as text."""
        return [self.render(messages, add_generation_prompt) for messages in self.messages]

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; the template wrote the special tokens already, BOS included."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encoded(self, texts: list[str], turns: Sequence[Turn | None]) -> list[list[int]]:
        """Ids of every chat; those that go on from a known turn begin with its tokens."""
        fresh = [text for text, turn in zip(texts, turns, strict=True) if turn is None]
        many = self._tokenizer(fresh, add_special_tokens=False)["input_ids"] if fresh else []
        tokenised = iter(many)
        return [
            next(tokenised) if turn is None else self._continued(turn, messages, text)
            for messages, text, turn in zip(self.messages, texts, turns, strict=True)
        ]

    def _continued(self, turn: Turn, messages: Sequence[Message], text: str) -> list[int]:
        answer = last_answer(messages)
        if answer is None:  # an answer that the caller began to write, with no role of its own
            return [*turn.ids, *self.encode(text[len(turn.text) :])]
        return continued(turn, messages, answer, text, render=self.render, encode=self.encode)

    def scored(self, texts: list[str]) -> tuple[list[list[int]], list[list[bool]]]:
        """Ids of complete chats, and which of them an assistant wrote.

        What a template marks with ``{% generation %}`` is the assistant's; without marks it is the
        content of the assistant's messages and the special token that ends it.
        """
        encoding = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        marked = bool(GENERATION.search(self._template or ""))
        masks = []
        for messages, text, offsets in zip(
            self.messages, texts, encoding["offset_mapping"], strict=True
        ):
            spans = self._marked_spans(messages) if marked else self._content_spans(messages, text)
            masks.append([any(a <= start < b for a, b in spans) for start, _ in offsets])
        return encoding["input_ids"], masks

    def _marked_spans(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Spans of characters that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            [list(messages)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **self._tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in spans[0]]

    def _content_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Spans of the assistant's messages, with what the template writes to end them."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(self.render(messages[:index], True)) if index else 0
                end = len(self.render(messages[: index + 1], False).rstrip())
                if text[start:].startswith(str(message["content"])):
                    spans.append((start, end))
        return spans


def _messages(row: History) -> list[Message]:
    messages: list[Message] = row.view(-1).tolist(tolist_first=True)
    return [message for message in messages if message["role"] != "<none>"]
