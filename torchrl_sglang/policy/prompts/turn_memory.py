"""Remembers turns, so that what was sampled stays the beginning of the next prompt.

Text that is tokenised again rarely gives the tokens that were sampled. So a turn's tokens are
kept, and of the next prompt only what follows them is tokenised.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

MAX_TOKENS_KEPT = 1 << 24  # 64 MiB of 4-byte ids
MAX_SEARCHES = 64  # each takes off a text what it shares with none; more are made up, not chats

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
Encode = Callable[[str], list[int]]

SENTINEL = "\u241f\u241e\u241f"  # it has no case, and nothing to trim; see `sentinel_for`
# What a template can fail with: it is a program.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The tokens of a tokenizer that stand for themselves alone, as those that end a turn.

    All that its file calls special, not only those with a name of their own (``eos_token``, ...).

    Attributes:
        ids: their ids.
        texts: how they are written; none is empty.
    """

    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    def divided(self, text: str, at: int) -> bool:
        """Whether a position lies inside one of them."""
        return any(
            0 <= text.find(special, max(0, at - len(special) + 1), at + len(special) - 1) < at
            for special in self.texts
        )

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def left_out(self, text: str) -> tuple[str, Callable[[int], int]]:
        """A text without them, and where a position of that is in the text itself."""
        spans = [match.span() for match in self._pattern.finditer(text)]
        starts = [0, *(end for _, end in spans)]
        pieces = [
            text[start:end]
            for start, end in zip(starts, [*(start for start, _ in spans), len(text)], strict=True)
        ]
        ends = list(itertools.accumulate(map(len, pieces)))

        def moved(position: int) -> int:
            index = min(bisect.bisect_right(ends, position), len(pieces) - 1)
            return starts[index] + position - ends[index] + len(pieces[index])

        return "".join(pieces), moved

    def meet(self, text: str, at: int) -> bool:
        """Whether one of them ends or begins at a position."""
        return text.endswith(self.texts, 0, at) or text.startswith(self.texts, at)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A finished turn.

    Attributes:
        ids: the prompt's and the sampled tokens.
        text: the prompt and the answer, as they were given out.
        cut: what the tokens say after that and the text does not: the EOS or stop that ended them.
        answered: whether the answer has any text; else the text is the prompt's alone.
        chat: what identifies the chat that it ended, see `chat_key`; the text where there is none.
    """

    ids: Sequence[int]
    text: str
    cut: str = ""
    answered: bool = True
    chat: Hashable = None

    def end_in(self, text: str, special: SpecialTokens) -> int | None:
        """Where the turn ends in a text that begins with it, with or without what was cut off."""
        if not text.startswith(self.text):
            return None
        return len(self.text) + _num_written(self.cut, text, len(self.text), special)


def _num_written(cut: str, text: str, at: int, special: SpecialTokens) -> int:
    """How many characters of a text repeat what was cut off a turn: all of these, or none.

    What was cut off may look like the beginning of a special token that follows.
    """
    again = text.startswith(cut, at) and not special.divided(text, at + len(cut))
    return len(cut) if again else 0


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

    def begins(self, text: str, holds: Callable[[Turn], bool]) -> Turn | None:
        """The latest turn of the longest text that ``text`` begins with and ``holds`` accepts.

        Takes a few searches of a sorted list, however many turns there are.
        """
        with self._lock:
            for _ in range(MAX_SEARCHES):
                at = bisect.bisect_right(self._texts, text)
                if at == 0:
                    break
                nearest = self._texts[at - 1]  # what a text begins with comes before it
                if not text.startswith(nearest):
                    text = text[: num_shared(text, nearest)]
                elif holds(self._turns[self._latest[nearest]]):
                    return self._used(self._latest[nearest])
                else:
                    text = nearest[:-1]
            return None

    def with_tokens(self, ids: Sequence[int]) -> Turn | None:
        """The turn of these tokens, if it is remembered."""
        try:
            name = _name(array("I", ids))
        except OverflowError:  # no ids, which whoever is sent them says
            return None
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


def num_shared(one: str, other: str) -> int:
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
            if name != "is_complete" and value not in (None, [], "")
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
    after: Callable[[Sequence[int], str], list[int]],
    special: SpecialTokens,
) -> list[int]:
    """Ids of a prompt that begins with a finished turn, whose tokens stay as they are.

    Args:
        turn: the finished turn.
        messages: the whole chat.
        answer: index of the turn's assistant message.
        prompt_text: the whole chat, rendered.
        render: renders messages, with or without a generation prompt at the end.
        encode: tokenises text without adding special tokens.
        after: tokenises text that goes on behind ids.
        special: the tokenizer's special tokens.
    """
    rest = after_answer(messages, answer, render)
    if rest is not None:
        rest = rest[_num_written(turn.cut, rest, 0, special) :]
    else:  # the template leaves the answer out, or wants the calls that it has
        end = turn.end_in(prompt_text, special)
        if end is None:
            return encode(prompt_text)
        rest = prompt_text[end:]
    return [*turn.ids, *after(turn.ids, rest)]


def says_the_same(
    turn: Turn,
    messages: Sequence[Message],
    answer: int,
    prompt_text: str,
    *,
    render: Render,
    special: SpecialTokens,
) -> bool:
    """Whether an assistant message, as it is rendered, is the answer of a turn.

    A text that begins with a turn's may go on with another answer that begins like it.
    """
    end = turn.end_in(prompt_text, special)
    rest = None if end is None else after_answer(messages, answer, render)
    if end is None or rest is None:
        return False
    return rest[_num_written(turn.cut, rest, 0, special) :] == prompt_text[end:]


def after_answer(
    messages: Sequence[Message], answer: int, render: Render, *, asking: bool = True
) -> str | None:
    """What the template writes after an assistant message, whatever it makes of the message.

    Templates trim contents or leave old thoughts out, and a stop string is not in the message.

    Args:
        messages: the whole chat.
        answer: index of the message.
        render: renders messages, with or without a generation prompt at the end.
        asking: whether another answer is asked for at the end.

    Returns:
        None where the template writes no answer of words there.
    """
    sentinel = sentinel_for(messages)
    marked = [*messages[:answer], {"role": "assistant", "content": sentinel}]
    text = rendered(render, [*marked, *messages[answer + 1 :]], asking)
    _, found, rest = (text or "").rpartition(sentinel)
    return rest if found else None


def rendered(render: Render, messages: Sequence[Message], asking: bool = False) -> str | None:
    """A chat as text; None where the template fails on it.

    It may want the calls that an answer of a tool belongs to, or strings where there are lists.
    """
    try:
        return render(messages, asking)
    except TEMPLATE_ERRORS:
        return None


def sentinel_for(messages: Sequence[Message]) -> str:
    """What no message contains, to stand in the place of one."""
    said, sentinel = repr(messages), SENTINEL
    while sentinel in said:
        sentinel += SENTINEL
    return sentinel
