"""Renders and tokenises chats, and leaves what was sampled before as it was."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl.data.llm import History

from ...errors import InputError
from .media import for_template, has_parts, text_of
from .spans import Span, assistant_spans, marked_tokens
from .turn_memory import (
    TEMPLATE_ERRORS,
    Message,
    SpecialTokens,
    Turn,
    after_answer,
    continued,
    last_answer,
    rendered,
    says_the_same,
    sentinel_for,
)

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks what an assistant writes


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How chats become text and ids.

    Attributes:
        tokenizer: Hugging Face tokenizer.
        template: chat template in Jinja.
        options: what else the template is given.
        special: the tokenizer's special tokens.
        continue_final: an assistant message at the end of a chat is continued.
    """

    tokenizer: Any
    template: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    special: SpecialTokens = field(default_factory=SpecialTokens)
    continue_final: bool = False

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """One chat as text, special tokens included."""
        return self._render(messages, add_generation_prompt=add_generation_prompt)

    def prompt(self, messages: Sequence[Message]) -> str:
        """One chat as text that an answer is to follow."""
        if not self.is_begun(messages):
            return self.render(messages, True)
        if not text_of(messages[-1]["content"]).strip():  # of which Hugging Face would strip more
            return self.render(messages[:-1], True)
        return self._render(messages, continue_final_message=True)

    def closing(self, messages: Sequence[Message]) -> str:
        """What the template writes after the assistant's message that ends a chat; else nothing."""
        if not messages or messages[-1]["role"] != "assistant":
            return ""
        return after_answer(messages, len(messages) - 1, self.render, asking=False) or ""

    def is_begun(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is one that is to be continued."""
        return self.continue_final and bool(messages) and messages[-1]["role"] == "assistant"

    def _render(self, messages: Sequence[Message], **how: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            for_template(messages),
            chat_template=self.template,
            tokenize=False,
            **how,
            **self.options,
        )
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; the template wrote the special tokens already, BOS included."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def after(self, ids: Sequence[int], text: str) -> list[int]:
        """Ids of text that goes on behind others.

        Tokenizers of SentencePiece's kind write a space before what begins a text, which this does
        not.
        """
        if not text or not self._writes_space_first:
            return self.encode(text) if text else []
        anchor = "\n"
        if ids and ids[-1] in self.special.ids:
            anchor = self.tokenizer.decode([ids[-1]], skip_special_tokens=False)
        head, whole = self.encode(anchor), self.encode(anchor + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text)

    @functools.cached_property
    def _writes_space_first(self) -> bool:
        return self.encode("\nx") != [*self.encode("\n"), *self.encode("x")]


class Chats:
    """The chats of one batch.

    Args:
        history: ``[batch, turns]``; rows with the role ``"<none>"`` are padding.
        how: how they become text and ids.

    Raises:
        InputError: something that the template can't write, or a message without a role.
    """

    def __init__(self, history: History, how: ChatFormat) -> None:
        self._how = how
        self.messages: list[list[Message]] = [
            self._with_contents(_messages(row, index))
            for index, row in enumerate(history.unbind(0))
        ]
        self._check_parts()

    @property
    def begun(self) -> list[str | None]:
        """What the last message of each chat says where it is to be continued."""
        return [
            text_of(messages[-1]["content"]) if self._how.is_begun(messages) else None
            for messages in self.messages
        ]

    def _check_parts(self) -> None:
        """Raises `InputError` for a content that is a list where the template writes strings."""
        roles: set[str] = set()
        for messages in self.messages:
            for index, message in enumerate(messages):
                if has_parts(message) and message["role"] not in roles:
                    roles.add(message["role"])
                    if not self._writes_parts(messages, index):
                        raise InputError(
                            f"the content of a message ({message['role']}) is a list of parts, and "
                            "the chat template writes strings only there: give text as a string; "
                            "images, videos and audio need a model that reads them, and its "
                            "template."
                        )

    def _writes_parts(self, messages: Sequence[Message], index: int) -> bool:
        sentinel = sentinel_for(messages)
        other = {**messages[index], "content": [{"type": "text", "text": sentinel}]}
        chat = [*messages[:index], other, *messages[index + 1 :]]
        written = rendered(self._how.render, chat) or ""
        return sentinel in written and "'" + sentinel not in written  # the list as Python writes it

    def _with_contents(self, messages: list[Message]) -> list[Message]:
        """A chat with empty contents where it has none, unless its template asks for none.

        Of a message with calls: templates may branch on that, but others write "None".
        """
        if all(message["content"] is not None for message in messages):
            return messages
        filled = [
            message if message["content"] is not None else {**message, "content": ""}
            for message in messages
        ]
        written = rendered(self._how.render, messages)
        if written is None:
            return filled
        other = rendered(self._how.render, filled)
        says_none = other is not None and written.count("None") > other.count("None")
        return filled if says_none else messages

    def texts(self, *, add_generation_prompt: bool) -> list[str]:
        """Every chat as text.

        Raises:
            InputError: the template refuses a chat, or fails on it.
        """
        return [
            self._text(messages, add_generation_prompt, index)
            for index, messages in enumerate(self.messages)
        ]

    def _text(self, messages: Sequence[Message], prompt: bool, index: int) -> str:
        if not messages:
            raise InputError(f"the chat of row {index} has no message.")
        try:
            return self._how.prompt(messages) if prompt else self._how.render(messages, False)
        except TEMPLATE_ERRORS as error:
            raise InputError(
                f"the chat template can't write the chat of row {index}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def encoded(
        self,
        texts: list[str],
        turns: Sequence[Turn | None],
        ready: Sequence[list[int] | None],
    ) -> list[list[int]]:
        """Ids of every chat; those that go on from a known turn begin with its tokens.

        Args:
            texts: the chats as text.
            turns: the turn that each goes on from.
            ready: ids that are there already.
        """
        rows = list(zip(self.messages, texts, turns, ready, strict=True))
        fresh = [text for _, text, turn, ids in rows if turn is None and ids is None]
        many = self._how.tokenizer(fresh, add_special_tokens=False)["input_ids"] if fresh else []
        tokenised = iter(many)
        encoded = []
        for messages, text, turn, ids in rows:
            if ids is None:
                ids = next(tokenised) if turn is None else self._continued(turn, messages, text)
            encoded.append(ids)
        return encoded

    def _continued(self, turn: Turn, messages: Sequence[Message], text: str) -> list[int]:
        how, answer = self._how, last_answer(messages)
        end = turn.end_in(text, how.special)
        if answer is None or how.is_begun(messages):
            return (
                how.encode(text) if end is None else [*turn.ids, *how.after(turn.ids, text[end:])]
            )
        return continued(
            turn,
            messages,
            answer,
            text,
            render=how.render,
            encode=how.encode,
            after=how.after,
            special=how.special,
        )

    def goes_on_from(self, turn: Turn, messages: Sequence[Message], text: str) -> bool:
        """Whether a chat goes on from a turn that is not known by its messages."""
        answer, how = last_answer(messages), self._how
        if answer is None or how.is_begun(messages):
            # What the caller wrote, with no role of its own, behind an answer.
            end = turn.end_in(text, how.special)
            return end is not None and turn.answered and how.special.meet(text, end)
        return says_the_same(turn, messages, answer, text, render=how.render, special=how.special)

    def scored(self, texts: list[str]) -> tuple[list[list[int]], list[list[bool]]]:
        """Ids of complete chats, and which of them an assistant wrote.

        What a template marks with ``{% generation %}`` is the assistant's; without marks it is what
        the template writes of the assistant's messages, and what it ends them with.

        Raises:
            InputError: an assistant message that says something, of which the template writes
                nothing.
        """
        tokenizer, how = self._how.tokenizer, self._how
        encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        marked = bool(GENERATION.search(how.template or ""))
        masks = []
        for index, (messages, text, offsets) in enumerate(
            zip(self.messages, texts, encoding["offset_mapping"], strict=True)
        ):
            try:
                spans = (
                    self._marked_spans(messages)
                    if marked
                    else assistant_spans(messages, text, how.render, how.special)
                )
            except InputError as error:
                error.add_note(f"row {index} of the batch")
                raise
            masks.append(marked_tokens(offsets, spans))
        return encoding["input_ids"], masks

    def _marked_spans(self, messages: Sequence[Message]) -> list[Span]:
        """Spans of characters that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            [for_template(messages)],
            chat_template=self._how.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **{**self._how.tokenizer.special_tokens_map, **self._how.options},
        )
        found = [(start, end) for start, end in spans[0] if end > start]
        if not found and last_answer(messages) is not None:
            raise InputError(
                "the chat template marks nothing with {% generation %}, though an assistant has "
                "spoken: no token would count as the assistant's."
            )
        return found


def _messages(row: History, index: int) -> list[Message]:
    """The messages of one chat; a content that is missing is an empty one, but beside calls."""
    messages: list[Message] = []
    for message in row.view(-1).tolist(tolist_first=True):
        role = message.get("role")
        if role == "<none>":
            continue
        if not isinstance(role, str):
            raise InputError(f"a message in the chat of row {index} has no role: {message!r:.200}.")
        content = message.get("content")
        missing = None if message.get("tool_calls") else ""
        messages.append({**message, "content": missing if content is None else content})
    return messages
