"""Reads rows of ids without their padding, from ragged, nested and padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase

from ...errors import InputError


@dataclass(frozen=True, kw_only=True)
class Pads:
    """What padding looks like.

    Attributes:
        pad: id that rows are padded with; None: none is known.
        bos, eos: what may begin or end a text; may be the same id.
    """

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None


def pads_of(tokenizer: Any) -> Pads:
    """The pads of a tokenizer; of None: none are known."""
    if tokenizer is None:
        return Pads()
    return Pads(pad=tokenizer.pad_token_id, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Ids of one row.

    Attributes:
        ids: ``[time]``.
        padded: they may have pads at their ends: they are a row of a padded tensor, or are said to
            be padded. Rows of a ragged stack or of a nested tensor have none.
    """

    ids: torch.Tensor
    padded: bool


def values_of(td: TensorDictBase, key: NestedKey) -> list[Any]:
    """One value per row, None where a row lacks the key."""
    value = _value_of(td, key)
    if isinstance(value, list):
        return value
    # What is no tensor is one for all rows, None as well.
    return list(value.unbind(0)) if hasattr(value, "unbind") else [value] * td.batch_size[0]


def _value_of(td: TensorDictBase, key: NestedKey) -> Any:
    """What is under a key; a list of rows where a part is stacked lazily."""
    names = key if isinstance(key, tuple) else (key,)
    part: Any = td
    for index, name in enumerate(names):
        # Such rows need not have the same keys, nor shapes.
        if isinstance(getattr(part, "_tensordict", part), LazyStackedTensorDict):
            return [row.get(names[index:], None) for row in part.unbind(0)]
        part = part.get(name, None) if hasattr(part, "get") else None
    return part


def rows_of(td: TensorDictBase, key: NestedKey) -> list[torch.Tensor] | None:
    """One tensor per row; None where a row lacks the key."""
    values = values_of(td, key)
    return None if any(value is None for value in values) else values


def id_rows(td: TensorDictBase, key: NestedKey) -> list[Row | None]:
    """Rows of ids and whether they can have padding; None where a row lacks them, or their data.

    Raises:
        InputError: something else than ids is there.
    """
    values = values_of(td, key)
    told = _told(td, key)
    rows: list[Row | None] = []
    for index, (value, padded) in enumerate(zip(values, told, strict=True)):
        if value is None:
            rows.append(None)
            continue
        check_ids(value, key, index)
        rows.append(None if value.is_meta else Row(ids=value.cpu(), padded=padded))
    return rows


def _told(td: TensorDictBase, key: NestedKey) -> list[bool]:
    """Whether each row may have padding: what ``Tokens.padded`` says, else what holds the rows."""
    flags: list[Any] = [None] * td.batch_size[0]
    if isinstance(key, tuple) and len(key) > 1:
        flags = values_of(td, (*key[:-1], "padded"))
    dense = _is_dense(td, key)
    return [dense if flag is None else bool(getattr(flag, "data", flag)) for flag in flags]


def _is_dense(td: TensorDictBase, key: NestedKey) -> bool:
    """Whether rows are held in one tensor, which makes them equally long."""
    value = _value_of(td, key)
    return isinstance(value, torch.Tensor) and not value.is_nested


def attention_masks(
    td: TensorDictBase, masks_key: NestedKey | None, plain_key: NestedKey | None
) -> list[torch.Tensor | None]:
    """Each row's mask of a `Masks` object, else the one under a key of its own, else None."""
    masks: list[torch.Tensor | None] = [None] * td.batch_size[0]
    keys: list[NestedKey] = [] if plain_key is None else [plain_key]
    if masks_key is not None:
        keys.insert(0, below(masks_key, "all_attention_mask"))
    for key in keys:
        found = values_of(td, key)
        masks = [
            other if mask is None and other is not None and not other.is_meta else mask
            for mask, other in zip(masks, found, strict=True)
        ]
    return masks


def prompt_masks(
    td: TensorDictBase,
    rows: Sequence[Row],
    masks_key: NestedKey | None,
    plain_key: NestedKey | None,
) -> list[torch.Tensor | None]:
    """The mask of each prompt: the one under the caller's own key where both fit and differ.

    An environment that begins anew may leave the masks of the turn before, and they may have the
    new prompt's length by chance. They are known by what they would leave out: padding is one id.
    """
    masks = attention_masks(td, masks_key, None)
    plain = attention_masks(td, None, plain_key)
    return [
        mask if _fits(row.ids, mask) and not _fits(row.ids, other) else other
        for row, mask, other in zip(rows, masks, plain, strict=True)
    ]


def _fits(row: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if mask is None or mask.shape != row.shape:
        return False
    left_out = row[~mask.cpu().bool()]
    return bool((left_out == left_out[:1]).all())


def below(key: NestedKey, *parts: str) -> tuple[str, ...]:
    """The key of a part of what is under a key."""
    return (*key, *parts) if isinstance(key, tuple) else (key, *parts)


def check_ids(value: Any, key: NestedKey, index: int) -> None:
    """Raises `InputError` for a row that is no token ids."""
    integers = isinstance(value, torch.Tensor) and value.dtype in _INTEGERS
    if not integers or value.ndim != 1:
        raise InputError(
            f"{key!r} should hold integer token ids of shape [batch, time], ragged "
            f"or padded; row {index} is {_describe(value)}."
        )


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def attended(
    rows: Sequence[Row], masks: Sequence[torch.Tensor | None], pads: Pads
) -> list[torch.Tensor]:
    """Which ids of each row are no padding, bool ``[time]``.

    A mask of another length belongs to something else (the full sequence of a turn before) and says
    nothing of its row. Without a mask only pads at the ends of padded rows are left out: inside, a
    pad id may be an EOS that was sampled.

    Where EOS is the pad, one EOS stays at the end: it may have been sampled, and only a mask can
    tell. Where EOS or BOS is, and all rows of the batch begin with it, one stays at the beginning:
    the longest row has no padding.
    """
    may_begin = pads.pad is not None and pads.pad in (pads.bos, pads.eos)
    first = int(may_begin and all(row.ids[:1].tolist() == [pads.pad] for row in rows if row.padded))
    return [
        mask.cpu().bool()
        if mask is not None and mask.shape == row.ids.shape
        else _without_pads(row, pads, first)
        for row, mask in zip(rows, masks, strict=True)
    ]


def _without_pads(row: Row, pads: Pads, first: int) -> torch.Tensor:
    """All but the pads at the ends of a padded row, of which ``first`` stay at the beginning."""
    kept = torch.ones(row.ids.shape, dtype=torch.bool, device="cpu")
    others = (row.ids != pads.pad).nonzero() if pads.pad is not None and row.padded else None
    if others is None:
        return kept
    if len(others) == 0:  # nothing but pads
        kept[first:] = False
        return kept
    start, end = int(others[0]) - first, int(others[-1]) + 1
    kept[:start] = False
    kept[end + (pads.pad == pads.eos) :] = False
    return kept
