"""Several turns without drift: what was sampled stays the beginning of the next prompt.

Text that is tokenised again rarely gives the tokens that were sampled. So a turn's tokens are
kept, and of the next prompt only what follows them is tokenised.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOKENS_KEPT = 1 << 24  # 64 MiB of 4-byte ids

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
Encode = Callable[[str], list[int]]

SENTINEL = "\u241f9d1f\u241f"  # what no chat contains


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A finished turn.

    Attributes:
        ids: the prompt's and the sampled tokens.
        text: the same as text, special tokens included.
        ending: the last token as text where it is a special one, such as EOS, else empty.
    """

    ids: Sequence[int]
    text: str
    ending: str = ""


class TurnMemory:
    """Finished turns by the chat that they ended. Safe to use from several threads.

    Args:
        max_tokens: how many tokens are kept; the oldest turns go first.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS_KEPT) -> None:
        self._turns: OrderedDict[Hashable, Turn] = OrderedDict()
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._lock = threading.Lock()

    def keep(self, key: Hashable, turn: Turn) -> None:
        """Remembers a turn, instead of an older one of the same chat."""
        kept = Turn(ids=array("I", turn.ids), text=turn.text, ending=turn.ending)
        with self._lock:
            self._forget(key)
            self._turns[key] = kept
            self._num_tokens += len(kept.ids)
            while self._num_tokens > self._max_tokens and len(self._turns) > 1:
                self._forget(next(iter(self._turns)))

    def find(self, key: Hashable) -> Turn | None:
        """The turn that ended this chat, if it is remembered."""
        with self._lock:
            turn = self._turns.get(key)
            if turn is not None:
                self._turns.move_to_end(key)
            return turn

    def __len__(self) -> int:
        return len(self._turns)

    def _forget(self, key: Hashable) -> None:
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._num_tokens -= len(turn.ids)

    def __getstate__(self) -> dict[str, Any]:
        return {"max_tokens": self._max_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy starts empty


def chat_key(messages: Sequence[Message]) -> Hashable:
    """What identifies a chat: roles and contents."""
    return tuple((m["role"], _hashable(m["content"])) for m in messages)


def _hashable(content: Any) -> str:
    return content if isinstance(content, str) else repr(content)


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
    else:
        rest = _rest(turn, messages, answer, prompt_text, render)
    return [*turn.ids, *encode(rest)] if rest else list(turn.ids)


def _rest(
    turn: Turn,
    messages: Sequence[Message],
    answer: int,
    prompt_text: str,
    render: Render,
) -> str:
    """What the template writes after an assistant message that it changed on its way.

    Templates trim contents or leave old thoughts out, and a stop string is not in the message.
    """
    closing = _closing(render).removeprefix(turn.ending)
    rendered = render(messages[: answer + 1], False)
    if prompt_text.startswith(rendered):
        return closing + prompt_text[len(rendered) :]
    base = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = render(base, False)
    after = render([*base, *messages[answer + 1 :]], True)
    return closing + after[len(before) :] if after.startswith(before) else closing


def _closing(render: Render) -> str:
    """What the template writes after the content of an assistant message."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
    return render(chat, False).rpartition(SENTINEL)[2]
