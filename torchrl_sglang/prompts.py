"""From a TensorDict of history, text or tokens to lists of token ids. Tokenises once, only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tensordict import NestedKey, TensorDictBase
from torchrl.data.llm import History

from .errors import ConfigError, EmptyPromptError, InputError, InputTypeError
from .rollout.chats import Chats
from .rollout.padding import (
    attention_masks,
    check_ids,
    masks_or_none,
    prompt_masks,
    readable_rows,
    rows_of,
    strip_padding,
)
from .rollout.turns import Message, Turn, TurnMemory, chat_key, last_answer

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
        tokenizer: Hugging Face tokenizer; None is enough for tokens.
        tokenizer_kwargs: options for tokenising text.
        template: chat template that history is rendered with.
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
    tokenizer: Any = None
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    memory: TurnMemory = field(default_factory=TurnMemory)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one batch.

    Attributes:
        ids: token ids, one list per row.
        texts: the same as text, where the input was text or history.
        history: the same as history ``[batch, turns]``, where the input was history.
        chats: the same as messages, where the input was history.
        assistant_masks: per row, which tokens an assistant wrote; for scoring history only.
    """

    ids: list[list[int]]
    texts: list[str] | None = None
    history: History | None = None
    chats: list[list[Message]] | None = None
    assistant_masks: list[list[bool]] | None = None


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


def _required(value: Any, td: TensorDictBase, spec: PromptSpec) -> Any:
    if value is None:
        raise InputError(
            f"input_mode={spec.mode!r} reads {spec.input_key!r}, which the TensorDict lacks; it "
            f"has {sorted(map(str, td.keys(True)))}."
        )
    return value


def _from_history(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    history = _required(td.get(spec.input_key, None), td, spec)
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
    chats = Chats(history, tokenizer=spec.tokenizer, template=spec.template)
    ready = _ready_tokens(td, spec) if spec.prefer_tokens else None
    if ready is not None:
        texts = spec.tokenizer.batch_decode(ready, skip_special_tokens=False)
        masks = _ready_masks(td, spec, ready)
        return Prompts(
            ids=ready, texts=texts, history=history, chats=chats.messages, assistant_masks=masks
        )
    texts = chats.texts(add_generation_prompt=spec.generate)
    if not spec.generate:
        ids, masks = chats.scored(texts)
        return Prompts(
            ids=ids, texts=texts, history=history, chats=chats.messages, assistant_masks=masks
        )
    turns = [
        _turn_before(messages, text, carried, spec)
        for messages, text, carried in zip(chats.messages, texts, _carried(td, spec), strict=True)
    ]
    ids = chats.encoded(texts, turns)
    return Prompts(ids=ids, texts=texts, history=history, chats=chats.messages)


def _turn_before(
    messages: Sequence[Message], text: str, carried: Turn | None, spec: PromptSpec
) -> Turn | None:
    """The turn that this chat goes on from, with the very tokens that it had."""
    answer = last_answer(messages)
    chat = None if answer is None else chat_key(messages[: answer + 1])
    if carried is not None:
        same_chat = chat is not None and carried.chat == chat
        if same_chat or text.startswith(carried.text):
            return carried
    return None if chat is None else spec.memory.find(chat)


def _carried(td: TensorDictBase, spec: PromptSpec) -> list[Turn | None]:
    """Each row's turn before, where the TensorDict still has its tokens."""
    rows = None if spec.tokens_key is None else readable_rows(td, _below(spec.tokens_key, "full"))
    if rows is None:
        return [None] * td.batch_size[0]
    masks = masks_or_none(td, spec.masks_key, None, len(rows))
    texts: Any = None if spec.text_key is None else td.get(_below(spec.text_key, "full"), None)
    if texts is None:
        texts = [None] * len(rows)
    elif not isinstance(texts, list):
        texts = texts.tolist()
    special = set(spec.tokenizer.all_special_ids)
    return [
        _known_or_read(_stripped(row, mask, spec), mask, text, special, spec)
        for row, mask, text in zip(rows, masks, texts, strict=True)
    ]


def _known_or_read(
    ids: list[int], mask: Any, text: str | None, special: set[int], spec: PromptSpec
) -> Turn | None:
    """A turn that is remembered, else one made of what the TensorDict has of it."""
    if not ids:
        return None
    known = spec.memory.with_tokens(ids)
    if known is None and mask is None and ids[-1] == spec.tokenizer.pad_token_id:
        known = spec.memory.with_tokens(ids[:-1])  # where EOS is the pad, only a mask could tell
    if known is not None or not text:
        return known
    ending = spec.tokenizer.decode(ids[-1:]) if ids[-1] in special else ""
    # Text may have been written without the special token that ended it.
    return Turn(ids=ids, text=text, ending=ending) if text.endswith(ending) else None


def _below(key: NestedKey, part: str) -> NestedKey:
    base = key if isinstance(key, tuple) else (key,)
    return (*base, part)


def _ready_tokens(td: TensorDictBase, spec: PromptSpec) -> list[list[int]] | None:
    if spec.tokens_key is None:
        return None
    for part in ("prompt", "full") if spec.generate else ("full",):
        rows = readable_rows(td, _below(spec.tokens_key, part))
        if rows is not None:
            masks = masks_or_none(td, spec.masks_key, None, len(rows))
            return [_stripped(r, m, spec) for r, m in zip(rows, masks, strict=True)]
    return None


def _ready_masks(
    td: TensorDictBase, spec: PromptSpec, ready: list[list[int]]
) -> list[list[bool]] | None:
    """Assistant masks that are there already, for tokens that are there already."""
    if spec.generate or spec.masks_key is None:
        return None
    rows = readable_rows(td, _below(spec.masks_key, "all_assistant_mask"))
    attended = attention_masks(td, spec.masks_key, None)
    if rows is None or attended is None:
        return None
    masks = [row[keep.bool()].tolist() for row, keep in zip(rows, attended, strict=True)]
    fits = all(len(mask) == len(ids) for mask, ids in zip(masks, ready, strict=True))
    return masks if fits else None


def _from_text(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    value = _required(td.get(spec.input_key, None), td, spec)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        texts = texts.tolist() if hasattr(texts, "tolist") else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise InputTypeError(
            f"{spec.input_key!r} should hold strings, got {type(texts[0]).__name__}."
        )
    turns: Sequence[Turn | None] = [None] * len(texts)
    if spec.generate:
        turns = [
            turn if turn is not None and text.startswith(turn.text) else spec.memory.begins(text)
            for text, turn in zip(texts, _carried(td, spec), strict=True)
        ]
    fresh = [text for text, turn in zip(texts, turns, strict=True) if turn is None]
    tokenised = iter(spec.tokenizer(fresh, **spec.tokenizer_kwargs)["input_ids"] if fresh else [])
    ids = [
        next(tokenised) if turn is None else [*turn.ids, *_rest(text, turn, spec)]
        for text, turn in zip(texts, turns, strict=True)
    ]
    return Prompts(ids=ids, texts=texts)


def _rest(text: str, turn: Turn, spec: PromptSpec) -> list[int]:
    """Ids of what follows a turn; it is not the beginning of a text, and has no BOS."""
    rest = text[len(turn.text) :]
    if not turn.text.endswith(turn.ending):  # the text was given out without it, the tokens have it
        rest = rest.removeprefix(turn.ending)
    ids: list[int] = spec.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
    return ids


def _from_tokens(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    rows: list[Any] = _required(rows_of(td, spec.input_key), td, spec)
    check_ids(rows, spec.input_key)
    masks = prompt_masks(td, rows, spec.masks_key, spec.attention_mask_key)
    return Prompts(ids=[_stripped(r, m, spec) for r, m in zip(rows, masks, strict=True)])


def _stripped(row: Any, mask: Any, spec: PromptSpec) -> list[int]:
    if spec.tokenizer is None:
        return strip_padding(row, mask, None)
    return strip_padding(row, mask, spec.tokenizer.pad_token_id, spec.tokenizer.eos_token_id)


_READERS = {"history": _from_history, "text": _from_text, "tokens": _from_tokens}


def check_mode(mode: str) -> InputMode:
    """Raises `ConfigError` for an unknown input mode."""
    for known in INPUT_MODES:
        if mode == known:
            return known
    raise ConfigError(f"input_mode must be one of {INPUT_MODES}, got {mode!r}.")
