"""The memory of turns, and what ends a turn."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from helpers.marks import QUIET
from helpers.tokenizers import without_names
from torchrl_sglang.policy.prompts.turn_memory import (
    SENTINEL,
    SpecialTokens,
    Turn,
    TurnMemory,
    chat_key,
    continued,
)
from torchrl_sglang.policy.tokenizers import special_tokens

pytestmark = QUIET


def a_turn(*ids: int, text: str = "", chat: Any = None) -> Turn:
    return Turn(ids=ids, text=text or repr(ids), chat=chat if chat is not None else ids)


def test_turns_are_found_by_tokens_and_by_chat() -> None:
    memory = TurnMemory()
    memory.keep(a_turn(1, 2, chat="c"))
    memory.keep(a_turn(3, 4, chat="c"))
    memory.keep(a_turn(5, chat="d"))
    assert list(memory.find("c").ids) == [3, 4]  # type: ignore[union-attr]  # the latest
    assert memory.with_tokens([1, 2]).chat == "c"  # type: ignore[union-attr]
    assert memory.with_tokens([1]) is None
    assert memory.find("e") is None
    assert len(memory) == 3


def test_the_memory_is_bounded() -> None:
    memory = TurnMemory(max_tokens=10)
    for index in range(6):
        memory.keep(a_turn(index, index, index))
    assert len(memory) == 3
    assert [memory.find((i, i, i)) is not None for i in range(6)] == [False] * 3 + [True] * 3
    assert len(memory._latest) == 3
    memory.find((3, 3, 3))  # used, so the next to go is another
    memory.keep(a_turn(9, 9, 9))
    assert memory.find((3, 3, 3)) is not None
    assert memory.with_tokens([4, 4, 4]) is None
    # The same turn again takes no more room; one that is too large is kept alone.
    for _ in range(20):
        memory.keep(a_turn(9, 9, 9))
    assert memory._num_tokens == sum(len(turn.ids) for turn in memory._turns.values()) <= 10
    memory.keep(a_turn(*range(50)))
    assert len(memory) == 1
    assert memory.find(tuple(range(50))) is not None


def test_the_longest_text_that_a_text_begins_with() -> None:
    memory = TurnMemory(max_tokens=40)
    texts = ["a", "ab", "abcd", "abce", "abd", "b", "ba", "abcdx"]
    for index, text in enumerate(texts):
        memory.keep(a_turn(index, 7, chat=text))
    memory.keep(a_turn(99, chat="abd"))
    memory.keep(a_turn(98, chat=("a", "tuple")))

    def begins(text: str) -> Any:
        turn = memory.begins(text, lambda turn: True)
        return None if turn is None else turn.chat

    made = ["".join(letters) for n in range(7) for letters in itertools.product("abcdx", repeat=n)]
    for text in made:
        expected = [known for known in texts if text.startswith(known)]
        assert begins(text) == (max(expected, key=len) if expected else None), text
        shorter = [known for known in expected if len(known) != 2]
        found = memory.begins(text, lambda turn: len(turn.chat) != 2)
        assert (found and found.chat) == (max(shorter, key=len) if shorter else None), text
    latest = memory.begins("abdd", lambda turn: True)
    assert list(latest.ids) == [99]  # type: ignore[union-attr]
    for index in range(100, 120):  # pushes all others out
        memory.keep(a_turn(index, 7, chat=str(index)))
    assert [begins(text) for text in made] == [None] * len(made)
    assert memory._texts == sorted(str(index) for index in range(100, 120))


def test_finding_a_beginning_is_quick_among_many() -> None:
    """Also among texts that are made to be looked at one by one."""
    memory = TurnMemory()
    for index in range(3000):
        memory.keep(a_turn(index, chat="x" * (5000 - index) + "a"))
    start = time.thread_time()
    assert memory.begins("x" * 5001, lambda turn: True) is None
    found = memory.begins("x" * 4000 + "abc", lambda turn: True)
    assert found.chat == "x" * 4000 + "a"  # type: ignore[union-attr]
    assert time.thread_time() - start < 0.5


def test_an_older_turn_that_goes_leaves_the_latest_of_its_chat() -> None:
    memory = TurnMemory(max_tokens=4)
    for ids in ([1, 1], [2, 2], [3, 3]):
        memory.keep(a_turn(*ids, chat="c"))
    assert memory.with_tokens([1, 1]) is None
    assert list(memory.find("c").ids) == [3, 3]  # type: ignore[union-attr]


def test_the_memory_in_many_threads() -> None:
    memory = TurnMemory(max_tokens=50)
    start = threading.Barrier(8)

    def use(seed: int) -> None:
        start.wait()
        for index in range(400):
            ids = (seed, index % 7, index % 3)
            memory.keep(a_turn(*ids, chat=index % 5))
            found = memory.find(index % 5)
            assert found is None or found.chat == index % 5
            known = memory.with_tokens(ids)
            assert known is None or tuple(known.ids) == ids

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert memory._num_tokens == sum(len(turn.ids) for turn in memory._turns.values()) <= 50
    assert set(memory._latest.values()) <= set(memory._turns)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_memory_is_empty(copier: Callable[[TurnMemory], TurnMemory]) -> None:
    memory = TurnMemory(max_tokens=7)
    memory.keep(a_turn(1, 2))
    copied = copier(memory)
    assert len(copied) == 0
    for index in range(9):
        copied.keep(a_turn(index))
    assert len(copied) == 7
    assert len(memory) == 1


def test_what_identifies_a_chat() -> None:
    one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat_key(one) == chat_key([dict(message) for message in one])
    others = [
        one[:1],
        [one[0], {"role": "assistant", "content": "c"}],
        [{"role": "system", "content": "a"}, one[1]],
        [one[0], {"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
        [one[0], {"role": "assistant", "content": "[{'type': 'text', 'text': 'b'}]"}],
        [one[0], one[1] | {"tool_calls": [{"function": {"name": "f"}}]}],
        [one[0], one[1] | {"tool_calls": [{"function": {"name": "g"}}]}],
        [one[0] | {"tool_responses": ["4"]}, one[1]],
        [one[0] | {"tool_responses": ["5"]}, one[1]],
    ]
    assert len({chat_key(chat) for chat in [one, *others]}) == 1 + len(others)


def test_what_says_nothing_of_a_chat() -> None:
    chat = [{"role": "user", "content": "a"}]
    for extra in ({"is_complete": True}, {"tool_calls": None}, {"tool_responses": []}):
        assert chat_key([chat[0] | extra]) == chat_key(chat)


def test_tokens_of_a_prompt_that_goes_on() -> None:
    def render(messages: Any, generate: bool) -> str:
        text = "".join(f"[{m['role']}:{m['content'].strip()}]" for m in messages)
        return text + ("[assistant:" if generate else "")

    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a "}]
    turn = Turn(ids=[1, 2, 3], text="[user:q][assistant: a ")
    prompt = render([*chat, {"role": "user", "content": "r"}], True)
    assert not prompt.startswith(turn.text)
    ids = continued(
        turn,
        [*chat, {"role": "user", "content": "r"}],
        1,
        prompt,
        render=render,
        encode=encode,
        after=lambda ids, text: encode(text),
        special=SpecialTokens(),
    )
    assert ids == [1, 2, 3, *encode("][user:r][assistant:")]
    assert SENTINEL not in prompt


@pytest.fixture(scope="module")
def unnamed(model_path: Any) -> Any:
    return without_names(model_path)


def test_the_tokens_of_the_file_are_special(unnamed: Any, tokenizer: Any) -> None:
    assert unnamed.convert_tokens_to_ids("<|im_end|>") not in unnamed.all_special_ids
    special = special_tokens(unnamed)
    assert {0, 1, 2} <= special.ids
    assert set(special.texts) == {unnamed.decode([index]) for index in special.ids}
    assert special_tokens(None) == SpecialTokens()
    assert special_tokens(tokenizer).ids >= set(tokenizer.all_special_ids)


def test_special_tokens_are_left_out_and_found_again() -> None:
    special = SpecialTokens(ids=frozenset({1}), texts=("<a>", "<aa>"))
    text = "<a>xy<aa><a>z<a>"
    plain, moved = special.left_out(text)
    assert plain == "xyz"
    assert [text[moved(i)] for i in range(3)] == list("xyz")
    assert SpecialTokens().left_out("xy")[0] == "xy"
    assert special.divided("..<aa>..", 4)
    assert not special.divided("..<aa>..", 2)
    assert not special.divided("..<aa>..", 6)
    assert special.meet("..<aa>..", 2)
    assert special.meet("..<aa>..", 6)
    assert not special.meet("..<aa>..", 4)


def test_where_a_turn_ends_in_a_text() -> None:
    special = SpecialTokens(ids=frozenset({1}), texts=("<end>",))
    turn = Turn(ids=[1], text="ask:say", cut="<")
    assert turn.end_in("ask:say<end>", special) == len("ask:say")  # not a part of a special token
    assert turn.end_in("ask:say< more", special) == len("ask:say<")
    assert turn.end_in("ask:say more", special) == len("ask:say")
    assert turn.end_in("ask:sa", special) is None


def test_numbers_that_are_no_ids_are_no_turn() -> None:
    assert TurnMemory().with_tokens([-1, 5]) is None
    assert TurnMemory().with_tokens([1 << 40]) is None
