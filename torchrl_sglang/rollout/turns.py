"""Several turns without drift: what was sampled stays the beginning of the next prompt.

Text that is tokenised again rarely gives the tokens that were sampled. So a turn's tokens are
kept, and of the next prompt only what follows them is tokenised.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

MAX_TOKENS_KEPT = 1 << 24  # 64 MiB of 4-byte ids
MAX_SEARCHES = 64  # each takes off a text what it shares with none; more are made up, not chats

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
Encode = Callable[[str], list[int]]

SENTINEL = "\u241f\u241e\u241f"  # what no chat contains; it has no case, and nothing to trim


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A finished turn.

    Attributes:
        ids: the prompt's and the sampled tokens.
        text: the prompt and the answer as the text of a next prompt is likely to begin, with or
            without the ending.
        ending: the last token as text where it is a special one, such as EOS, else empty.
        chat: what identifies the chat that it ended, see `chat_key`; the text where there is none.
    """

    ids: Sequence[int]
    text: str
    ending: str = ""
    chat: Hashable = None


class TurnMemory:
    """Finished turns, by their tokens and by the chat that they ended.

    Two turns may have one text and different tokens. Safe to use from several threads.

    Args:
        max_tokens: how many tokens are kept; the oldest turns go first.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS_KEPT) -> None:
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()  # by a hash of the tokens
        self._latest: dict[Hashable, bytes] = {}  # by chat
        self._texts: list[str] = []  # the chats that are texts, sorted
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._lock = threading.Lock()

    def keep(self, turn: Turn) -> None:
        """Remembers a turn."""
        ids = array("I", turn.ids)
        name = _name(ids)
        with self._lock:
            self._forget(name)
            self._turns[name] = replace(turn, ids=ids)
            if isinstance(turn.chat, str) and turn.chat not in self._latest:
                bisect.insort(self._texts, turn.chat)
            self._latest[turn.chat] = name
            self._num_tokens += len(ids)
            while self._num_tokens > self._max_tokens and len(self._turns) > 1:
                self._forget(next(iter(self._turns)))

    def find(self, chat: Hashable) -> Turn | None:
        """The latest turn that ended this chat, if it is remembered."""
        with self._lock:
            return self._used(self._latest.get(chat, b""))

    def begins(self, text: str) -> Turn | None:
        """The latest turn of the longest text that ``text`` begins with, if one is remembered.

        Takes a few searches of a sorted list, however many turns there are.
        """
        with self._lock:
            for _ in range(MAX_SEARCHES):
                at = bisect.bisect_right(self._texts, text)
                if at == 0:
                    break
                nearest = self._texts[at - 1]  # what a text begins with comes before it
                if text.startswith(nearest):
                    return self._used(self._latest[nearest])
                text = text[: _num_shared(text, nearest)]
            return None

    def with_tokens(self, ids: Sequence[int]) -> Turn | None:
        """The turn of these tokens, if it is remembered."""
        name = _name(array("I", ids))
        with self._lock:
            return self._used(name)

    def __len__(self) -> int:
        return len(self._turns)

    def _used(self, name: bytes) -> Turn | None:
        turn = self._turns.get(name)
        if turn is not None:
            self._turns.move_to_end(name)
        return turn

    def _forget(self, name: bytes) -> None:
        turn = self._turns.pop(name, None)
        if turn is not None:
            self._num_tokens -= len(turn.ids)
            if self._latest.get(turn.chat) == name:
                del self._latest[turn.chat]
                if isinstance(turn.chat, str):
                    del self._texts[bisect.bisect_left(self._texts, turn.chat)]

    def __getstate__(self) -> dict[str, Any]:
        return {"max_tokens": self._max_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy starts empty


def _num_shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: one[:n] != other[:n])


def _name(ids: array[int]) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def chat_key(messages: Sequence[Message]) -> Hashable:
    """What identifies a chat: everything of its messages that a template can write.

    Tool calls and their answers are fields of their own, beside contents that may be the same.
    """
    return tuple(
        frozenset(
            (name, _hashable(value))
            for name, value in message.items()
            # An environment and a policy need not agree on what is complete; no template writes it.
            if name != "is_complete" and value not in (None, [])
        )
        for message in messages
    )


def _hashable(value: Any) -> Hashable:
    return value if isinstance(value, str) else (repr(value),)  # a text may look like a list


def last_answer(messages: Sequence[Message]) -> int | None:
    """Index of the last assistant message."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return index
    return None


def continued(
    turn: Turn,
    messages: Sequence[Message],
    answer: int,
    prompt_text: str,
    *,
    render: Render,
    encode: Encode,
) -> list[int]:
    """Ids of a prompt that begins with a finished turn, whose tokens stay as they are.

    Args:
        turn: the finished turn.
        messages: the whole chat.
        answer: index of the turn's assistant message.
        prompt_text: the whole chat, rendered.
        render: renders messages, with or without a generation prompt at the end.
        encode: tokenises text without adding special tokens.
    """
    if prompt_text.startswith(turn.text):
        rest = prompt_text[len(turn.text) :]
        if not turn.text.endswith(turn.ending):  # a stop string in its very text cut it
            rest = rest.removeprefix(turn.ending)
    else:
        written = _after_answer(messages, answer, render)
        if written is None:  # the template leaves the answer out
            return encode(prompt_text)
        rest = written.removeprefix(turn.ending)
    return [*turn.ids, *encode(rest)] if rest else list(turn.ids)


def _after_answer(messages: Sequence[Message], answer: int, render: Render) -> str | None:
    """What the template writes after an assistant message, whatever it makes of the message.

    Templates trim contents or leave old thoughts out, and a stop string is not in the message.
    """
    marked = [*messages[:answer], {"role": "assistant", "content": SENTINEL}]
    _, found, rest = render([*marked, *messages[answer + 1 :]], True).rpartition(SENTINEL)
    return rest if found else None
