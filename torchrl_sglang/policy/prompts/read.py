"""Reads token ids from a TensorDict of history, text or tokens. Tokenises once, only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data.llm import History

from ...errors import ConfigError, EmptyPromptError, InputError, InputTypeError
from ..outputs.texts import as_messages
from .chats import ChatFormat, Chats
from .padding import (
    attended,
    attention_masks,
    below,
    id_rows,
    pads_of,
    prompt_masks,
    values_of,
)
from .turn_memory import Message, SpecialTokens, Turn, TurnMemory, chat_key, last_answer

InputMode = Literal["history", "text", "tokens"]
INPUT_MODES: tuple[InputMode, ...] = ("history", "text", "tokens")


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Where prompts are found and how they become ids.

    Attributes:
        mode: what the TensorDict holds.
        input_key: where it holds it.
        generate: an answer is to follow; else the text is complete and only scored.
        attention_mask_key: mask of padded token prompts, ``[batch, time]``.
        masks_key: the `Masks` whose ``all_attention_mask`` does the same.
        tokens_key: the `Tokens` of a turn before, or those that ``prefer_tokens`` looks at.
        text_key: the `Text` of a turn before.
        prefer_tokens: in history mode, use tokens that are there instead of tokenising.
        carry_turns: a prompt that goes on from a turn begins with that turn's tokens.
        tokenizer_kwargs: options for tokenising text.
        chats: how chats, and text, become ids; its tokenizer may be None for tokens.
        memory: turns that this policy finished.
    """

    mode: InputMode
    input_key: NestedKey
    generate: bool = True
    attention_mask_key: NestedKey = "attention_mask"
    masks_key: NestedKey | None = "masks"
    tokens_key: NestedKey | None = "tokens"
    text_key: NestedKey | None = "text"
    prefer_tokens: bool = False
    carry_turns: bool = True
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chats: ChatFormat
    memory: TurnMemory = field(default_factory=TurnMemory)

    @property
    def tokenizer(self) -> Any:
        """Hugging Face tokenizer, or None."""
        return self.chats.tokenizer

    @property
    def special(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return self.chats.special


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one batch.

    Attributes:
        ids: token ids, one list per row.
        texts: the same as text, where the input was text or history.
        history: the same as history ``[batch, turns]``, where the input was history.
        chats: the same as messages, where the input was history.
        begun: per row, what its last message says where that is continued, else None; for history
            only.
        assistant_masks: per row, which tokens an assistant wrote; for scoring history only.
        attended: per row, bool ``[time]``: where its ids stand in the input; for tokens only.
    """

    ids: list[list[int]]
    texts: list[str] | None = None
    history: History | None = None
    chats: list[list[Message]] | None = None
    begun: Sequence[str | None] | None = None
    assistant_masks: list[list[bool]] | None = None
    attended: list[torch.Tensor] | None = None


def read_prompts(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    """Reads the prompts of a TensorDict of one batch dimension.

    Raises:
        InputError: the key is missing or holds something else.
        EmptyPromptError: a prompt without a token.
    """
    prompts = _READERS[spec.mode](td, spec)
    for index, ids in enumerate(prompts.ids):
        if not ids:
            raise EmptyPromptError(f"prompt {index} of the batch has no token.")
    return prompts


def _check_present(td: TensorDictBase, spec: PromptSpec) -> None:
    """Raises `InputError` where nothing is under the input key, or not in every row."""
    lacking = [row for row, value in enumerate(values_of(td, spec.input_key)) if value is None]
    if len(lacking) == td.batch_size[0]:
        raise InputError(
            f"input_mode={spec.mode!r} reads {spec.input_key!r}, which the TensorDict lacks; it "
            f"has {sorted(map(str, td.keys(True)))}."
        )
    if lacking:
        raise InputError(
            f"input_mode={spec.mode!r} reads {spec.input_key!r}, which rows {lacking} of the batch "
            "lack."
        )


def _from_history(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    _check_present(td, spec)
    history = td.get(spec.input_key)
    if not isinstance(history, History):
        raise InputTypeError(
            f"{spec.input_key!r} should be a torchrl History, got {type(history).__name__}; make "
            "one with History.from_chats."
        )
    if history.ndim != 2:
        raise InputError(
            f"{spec.input_key!r} should have the batch and a turn dimension, got batch size "
            f"{tuple(history.batch_size)}."
        )
    chats = Chats(history, spec.chats)
    texts = chats.texts(add_generation_prompt=spec.generate)
    check_texts(texts)
    ready = _ready_tokens(td, spec, texts, chats)
    if not spec.generate:
        ids, masks = chats.scored(texts)
        for row, known in _ready_masks(td, spec, ready).items():
            ids[row], masks[row] = known
        return Prompts(
            ids=ids, texts=texts, history=history, chats=chats.messages, assistant_masks=masks
        )
    turns = [
        None if known is not None else _turn_before(chats, messages, text, carried, spec)
        for messages, text, carried, known in zip(
            chats.messages, texts, _carried(td, spec), ready, strict=True
        )
    ]
    ids = chats.encoded(texts, turns, ready)
    return Prompts(ids=ids, texts=texts, history=history, chats=chats.messages, begun=chats.begun)


def check_texts(texts: Sequence[str]) -> None:
    """Raises `InputError` for a text that no tokenizer takes."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text of row {index} has half a character (a lone surrogate) at position "
                f"{error.start}: {text[max(0, error.start - 20) : error.end + 20]!r}. Text "
                "that was cut in the middle of one, or decoded with errors='surrogateescape', has "
                "these."
            ) from None


def _turn_before(
    chats: Chats, messages: Sequence[Message], text: str, carried: Sequence[Turn], spec: PromptSpec
) -> Turn | None:
    """The turn that this chat goes on from, with the very tokens that it had."""
    if not spec.carry_turns:
        return None
    answer = last_answer(messages)
    chat = None if answer is None else chat_key(messages[: answer + 1])
    for turn in carried:
        same_chat = chat is not None and turn.chat == chat
        if same_chat or chats.goes_on_from(turn, messages, text):
            return turn
    return None if chat is None else spec.memory.find(chat)


def _carried(td: TensorDictBase, spec: PromptSpec) -> list[Sequence[Turn]]:
    """Each row's turn before, where the TensorDict still has its tokens, in all its readings."""
    turns: list[Sequence[Turn]] = [()] * td.batch_size[0]
    if spec.tokens_key is None or not spec.carry_turns:
        return turns
    rows, masks = _ids_below(td, "full", spec)
    begins = values_of(td, "is_init")  # of TorchRL's InitTracker: what is left is another's
    texts = _texts_before(td, spec)
    for index, (ids, mask, begin) in enumerate(zip(rows, masks, begins, strict=True)):
        if ids and not _is_true(begin):
            turns[index] = _known_or_read(ids, mask, *texts[index], spec)
    return turns


def _ids_below(
    td: TensorDictBase, part: str, spec: PromptSpec
) -> tuple[list[list[int] | None], list[torch.Tensor | None]]:
    """The ids of a part of the tokens that are there, without padding, and their masks."""
    assert spec.tokens_key is not None
    rows = id_rows(td, below(spec.tokens_key, part))
    masks = attention_masks(td, spec.masks_key, None)
    there = [index for index, row in enumerate(rows) if row is not None]
    known = [row for row in rows if row is not None]
    kept = attended(known, [masks[index] for index in there], pads_of(spec.tokenizer))
    ids: list[list[int] | None] = [None] * len(rows)
    for index, row, where in zip(there, known, kept, strict=True):
        ids[index] = row.ids[where].tolist()
    return ids, masks


def _is_true(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return False
    return value.any().item() is True


def _texts_before(td: TensorDictBase, spec: PromptSpec) -> list[tuple[Any, Any]]:
    """The whole text and the answer of each row's turn before; None where they are not there."""
    if spec.text_key is None:
        return [(None, None)] * td.batch_size[0]
    parts = [values_of(td, below(spec.text_key, part)) for part in ("full", "response")]
    return list(zip(*([_plain(value) for value in part] for part in parts), strict=True))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else getattr(value, "data", None)


def _known_or_read(
    ids: list[int], mask: Any, text: Any, answer: Any, spec: PromptSpec
) -> Sequence[Turn]:
    """A turn that is remembered, else one made of what the TensorDict has of it.

    Where the tokenizer drops the space before a text, a chat's next prompt may have the answer with
    or without it, as the template likes.
    """
    known = spec.memory.with_tokens(ids)
    if known is None and mask is None and ids[-1] == spec.tokenizer.pad_token_id:
        known = spec.memory.with_tokens(ids[:-1])  # where EOS is the pad, only a mask could tell
    if known is not None:
        return (known,)
    if not isinstance(text, str) or not text:
        return ()
    ending = spec.tokenizer.decode(ids[-1:]) if ids[-1] in spec.special.ids else ""
    without = text.removesuffix(ending)
    if without == text and ending and spec.tokenizer.decode(ids) != text + ending:
        return ()  # what else the text left out can't be told
    turn = Turn(ids=ids, text=without, cut=ending, answered=answer is None or bool(answer))
    if spec.mode != "history" or not isinstance(answer, str) or not text.endswith(answer):
        return (turn,)
    [said] = as_messages([answer], None, spec.tokenizer)
    bare = (text[: len(text) - len(answer)] + said).removesuffix(ending)
    return (turn,) if bare == without else (turn, replace(turn, text=bare))


def _ready_tokens(
    td: TensorDictBase, spec: PromptSpec, texts: Sequence[str], chats: Chats
) -> list[list[int] | None]:
    """Each row's own tokens, where they are there and are those of its chat.

    An environment may leave the tokens of a turn before: those say something else than the chat.
    """
    ready: list[list[int] | None] = [None] * len(texts)
    if spec.tokens_key is None or not spec.prefer_tokens:
        return ready
    for part in ("prompt", "full") if spec.generate else ("full",):
        for index, ids in enumerate(_ids_below(td, part, spec)[0]):
            new = ids and ready[index] is None
            if ids and new and _says(ids, texts[index], chats.messages[index], spec):
                ready[index] = ids
    return ready


def _says(ids: list[int], text: str, messages: Sequence[Message], spec: PromptSpec) -> bool:
    """Whether ids are a chat's: they say what it says, or the policy ended the chat with them."""
    decoded: str = spec.tokenizer.decode(ids, skip_special_tokens=False)
    if decoded == text or spec.chats.encode(text) == ids:
        return True
    if spec.generate:
        return False
    known = spec.memory.with_tokens(ids)
    if known is not None and known.chat == chat_key(messages):
        return True
    # What was sampled ends with an EOS, or in the middle, where the template closes a message.
    closing = spec.chats.closing(messages)
    body = text.removesuffix(closing)
    return bool(closing) and decoded.startswith(body) and closing.startswith(decoded[len(body) :])


def _ready_masks(
    td: TensorDictBase, spec: PromptSpec, ready: Sequence[list[int] | None]
) -> dict[int, tuple[list[int], list[bool]]]:
    """Rows whose tokens are there already, with the assistant masks that are there for them."""
    if spec.masks_key is None or not any(ready):
        return {}
    marks = values_of(td, below(spec.masks_key, "all_assistant_mask"))
    kept = attention_masks(td, spec.masks_key, None)
    found = {}
    for index, (ids, mark, keep) in enumerate(zip(ready, marks, kept, strict=True)):
        if ids is None or mark is None or keep is None or mark.shape != keep.shape:
            continue
        mask = mark[keep.bool()].tolist()
        if len(mask) == len(ids):
            found[index] = (ids, mask)
    return found


def _from_text(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    _check_present(td, spec)
    value = td.get(spec.input_key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        texts = texts.tolist() if hasattr(texts, "tolist") else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputTypeError(
                f"{spec.input_key!r} should hold strings; row {index} is a {type(text).__name__}."
            )
    check_texts(texts)
    turns = _turns_before(td, texts, spec)
    fresh = [text for text, turn in zip(texts, turns, strict=True) if turn is None]
    tokenised = iter(spec.tokenizer(fresh, **spec.tokenizer_kwargs)["input_ids"] if fresh else [])
    ids = [
        next(tokenised) if turn is None else _continued(text, turn, spec)
        for text, turn in zip(texts, turns, strict=True)
    ]
    if spec.tokenizer_kwargs.get("truncation"):
        texts = _truncated(texts, ids, spec)
    return Prompts(ids=ids, texts=texts)


def _turns_before(
    td: TensorDictBase, texts: Sequence[str], spec: PromptSpec
) -> Sequence[Turn | None]:
    """The turn that each text goes on from.

    That is the one that its TensorDict carries; or one that is remembered, where a special token
    stands between it and what follows, as only in a later turn. Else what a text becomes would
    depend on what was answered to another before.
    """
    if not (spec.generate and spec.carry_turns):
        return [None] * len(texts)

    def goes_on(text: str, turn: Turn) -> bool:
        end = turn.end_in(text, spec.special)
        return end is not None and turn.answered and _has_room(turn, text[end:], spec)

    def turn_of(text: str, carried: Sequence[Turn]) -> Turn | None:
        if found := next((turn for turn in carried if goes_on(text, turn)), None):
            return found

        def holds(turn: Turn) -> bool:
            end = turn.end_in(text, spec.special)
            return end is not None and goes_on(text, turn) and spec.special.meet(text, end)

        return spec.memory.begins(text, holds)

    return [turn_of(t, carried) for t, carried in zip(texts, _carried(td, spec), strict=True)]


def _has_room(turn: Turn, rest: str, spec: PromptSpec) -> bool:
    """Whether a turn and what follows have room where tokens are truncated; else all are anew."""
    if not spec.tokenizer_kwargs.get("truncation"):
        return True
    given = spec.tokenizer_kwargs.get("max_length")
    most = spec.tokenizer.model_max_length if given is None else given
    return len(turn.ids) + len(spec.chats.after(turn.ids, rest)) <= int(most)


def _continued(text: str, turn: Turn, spec: PromptSpec) -> list[int]:
    """Ids of a text that goes on from a turn; what follows is no beginning, and has no BOS."""
    rest = text[turn.end_in(text, spec.special) :]
    return [*turn.ids, *spec.chats.after(turn.ids, rest)]


def _truncated(texts: list[str], ids: Sequence[list[int]], spec: PromptSpec) -> list[str]:
    """The texts as far as their tokens say them."""
    whole = spec.tokenizer(texts, **{**spec.tokenizer_kwargs, "truncation": False})["input_ids"]
    return [
        spec.tokenizer.decode(row) if len(row) < len(all_of_it) else text
        for text, row, all_of_it in zip(texts, ids, whole, strict=True)
    ]


def _from_tokens(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    _check_present(td, spec)
    rows = []
    for index, row in enumerate(id_rows(td, spec.input_key)):
        if row is None:
            raise InputError(f"{spec.input_key!r} of row {index} is on the meta device: no data.")
        rows.append(row)
    masks = prompt_masks(td, rows, spec.masks_key, spec.attention_mask_key)
    kept = attended(rows, masks, pads_of(spec.tokenizer))
    ids = [row.ids[where].tolist() for row, where in zip(rows, kept, strict=True)]
    return Prompts(ids=ids, attended=kept)


_READERS = {"history": _from_history, "text": _from_text, "tokens": _from_tokens}


def check_mode(mode: str) -> InputMode:
    """Raises `ConfigError` for an unknown input mode."""
    for known in INPUT_MODES:
        if mode == known:
            return known
    raise ConfigError(f"input_mode must be one of {INPUT_MODES}, got {mode!r}.")
