"""From a TensorDict of history, text or tokens to lists of token ids. Tokenises once, only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase
from torchrl.data.llm import History

from .errors import ConfigError, EmptyPromptError, InputError, TokenizerError

InputMode = Literal["history", "text", "tokens"]
INPUT_MODES: tuple[InputMode, ...] = ("history", "text", "tokens")


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Where prompts are found and how they become ids.

    Attributes:
        mode: what the TensorDict holds.
        input_key: where it holds it.
        attention_mask_key: mask of padded token prompts, ``[batch, time]``.
        masks_key: the `Masks` whose ``all_attention_mask`` does the same.
        tokens_key: the `Tokens` that ``prefer_tokens`` looks at.
        prefer_tokens: in history mode, use tokens that are there instead of tokenising.
        tokenizer: Hugging Face tokenizer; None is enough for tokens.
        tokenizer_kwargs: options for tokenising text.
        template: options for rendering history (``chat_template``, ``chat_template_name``).
    """

    mode: InputMode
    input_key: NestedKey
    attention_mask_key: NestedKey = "attention_mask"
    masks_key: NestedKey | None = "masks"
    tokens_key: NestedKey | None = "tokens"
    prefer_tokens: bool = False
    tokenizer: Any = None
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one batch.

    Attributes:
        ids: token ids, one list per row.
        texts: the same as text, where the input was text or history.
        history: the same as history ``[batch, turns]``, where the input was history.
    """

    ids: list[list[int]]
    texts: list[str] | None = None
    history: History | None = None


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
        raise InputError(
            f"{spec.input_key!r} should be a torchrl History, got {type(history).__name__}; make "
            "one with History.from_chats."
        )
    if history.ndim != 2:
        raise InputError(
            f"{spec.input_key!r} should have the batch and a turn dimension, got batch size "
            f"{tuple(history.batch_size)}."
        )
    ready = _ready_tokens(td, spec) if spec.prefer_tokens else None
    if ready is not None:
        texts = spec.tokenizer.batch_decode(ready, skip_special_tokens=False)
        return Prompts(ids=ready, texts=texts, history=history)
    texts = history.apply_chat_template(
        tokenizer=spec.tokenizer, add_generation_prompt=True, tokenize=False, **spec.template
    )
    # The template wrote the special tokens already, BOS included.
    ids = spec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Prompts(ids=ids, texts=texts, history=history)


def _ready_tokens(td: TensorDictBase, spec: PromptSpec) -> list[list[int]] | None:
    if spec.tokens_key is None:
        return None
    base = spec.tokens_key if isinstance(spec.tokens_key, tuple) else (spec.tokens_key,)
    for part in ("prompt", "full"):
        rows = _rows(td, (*base, part))
        if rows is not None:
            return [_strip_padding(row, None, spec.tokenizer.pad_token_id) for row in rows]
    return None


def _from_text(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    value = _required(td.get(spec.input_key, None), td, spec)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        texts = texts.tolist() if hasattr(texts, "tolist") else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{spec.input_key!r} should hold strings, got {type(texts[0]).__name__}.")
    ids = spec.tokenizer(texts, **spec.tokenizer_kwargs)["input_ids"]
    return Prompts(ids=ids, texts=texts)


def _from_tokens(td: TensorDictBase, spec: PromptSpec) -> Prompts:
    rows: list[Any] = _required(_rows(td, spec.input_key), td, spec)
    for index, row in enumerate(rows):
        if not isinstance(row, torch.Tensor) or row.dtype.is_floating_point or row.ndim != 1:
            raise InputError(
                f"{spec.input_key!r} should hold integer token ids of shape [batch, time], ragged "
                f"or padded; row {index} is {_describe(row)}."
            )
    pad_id = getattr(spec.tokenizer, "pad_token_id", None)
    masks = _attention_masks(td, spec)
    if masks is None:
        return Prompts(ids=[_strip_padding(row, None, pad_id) for row in rows])
    return Prompts(ids=[_strip_padding(r, m, pad_id) for r, m in zip(rows, masks, strict=True)])


def _attention_masks(td: TensorDictBase, spec: PromptSpec) -> list[torch.Tensor] | None:
    keys: list[NestedKey] = [spec.attention_mask_key]
    if spec.masks_key is not None:
        base = spec.masks_key if isinstance(spec.masks_key, tuple) else (spec.masks_key,)
        keys.insert(0, (*base, "all_attention_mask"))
    for key in keys:
        masks = _rows(td, key)
        if masks is not None:
            return masks
    return None


def _rows(td: TensorDictBase, key: NestedKey) -> list[torch.Tensor] | None:
    """One 1-D tensor per row, from a ragged stack, a nested tensor or a padded tensor."""
    if isinstance(td, LazyStackedTensorDict):
        stacked: list[torch.Tensor] | None = td.get(key, None, as_list=True)
        return stacked
    value = td.get(key, None)
    return None if value is None else list(value.unbind(0))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _strip_padding(row: torch.Tensor, mask: torch.Tensor | None, pad_id: int | None) -> list[int]:
    """The ids of one row without its padding.

    A mask of another length belongs to something else (the full sequence of a turn before) and says
    nothing of this row. Without a mask only pads at the ends are dropped: inside, a pad id may be
    an EOS that was sampled.
    """
    if mask is not None and mask.shape == row.shape:
        attended: list[int] = row[mask.bool()].tolist()
        return attended
    ids: list[int] = row.tolist()
    start, end = 0, len(ids)
    while start < end and ids[start] == pad_id:
        start += 1
    while end > start and ids[end - 1] == pad_id:
        end -= 1
    return ids[start:end]


_READERS = {"history": _from_history, "text": _from_text, "tokens": _from_tokens}


def load_tokenizer(tokenizer: Any, served_path: str, mode: InputMode) -> Any:
    """The tokenizer to use.

    Args:
        tokenizer: a Hugging Face tokenizer, a folder or hub name, or None for the served model's.
        served_path: where the servers have theirs.
        mode: tokens can do without one; then None is returned where none is found.

    Raises:
        TokenizerError: none was found, or it can't render chats.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _load(tokenizer or served_path, optional=tokenizer is None and mode == "tokens")
    if tokenizer is None:
        return None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TokenizerError(
                "the tokenizer has neither a pad nor an EOS token: set tokenizer.pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str, *, optional: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if optional:
            return None
        raise TokenizerError(
            f"no tokenizer could be loaded from {name!r} ({type(error).__name__}: {error}). Pass "
            "tokenizer= (a Hugging Face tokenizer, or the folder or hub name of one); without one "
            "only input_mode='tokens' works."
        ) from error


def check_mode(mode: str) -> InputMode:
    """Raises `ConfigError` for an unknown input mode."""
    for known in INPUT_MODES:
        if mode == known:
            return known
    raise ConfigError(f"input_mode must be one of {INPUT_MODES}, got {mode!r}.")


def default_tokenizer_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for tokenising text; padding and tensors are made in `outputs`, not here.

    Raises:
        ConfigError: an option that would change the shape of what the tokenizer returns.
    """
    kwargs = dict(given or {})
    for name in ("padding", "return_tensors", "padding_side", "return_attention_mask"):
        kwargs.pop(name, None)
    shaped: Sequence[str] = [n for n in ("return_overflowing_tokens", "text_pair") if n in kwargs]
    if shaped:
        raise ConfigError(f"tokenizer_kwargs can't have {shaped}: one prompt is one row.")
    return kwargs
