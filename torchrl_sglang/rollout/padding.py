"""Rows of ids without their padding, from ragged stacks, nested tensors and padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

from ..errors import InputError


def rows_of(td: TensorDictBase, key: NestedKey) -> list[torch.Tensor] | None:
    """One 1-D tensor per row; None where the key is missing."""
    value = td.get(key, None, as_list=True)  # a list where rows are stacked lazily, at any depth
    if isinstance(value, list):
        return None if value[0] is None else value
    return None if value is None else list(value.unbind(0))


def readable_rows(td: TensorDictBase, key: NestedKey) -> list[torch.Tensor] | None:
    """Same as `rows_of`; None too where the rows have no data, as on the meta device."""
    rows = rows_of(td, key)
    return None if rows is None or any(row.is_meta for row in rows) else rows


def attention_masks(
    td: TensorDictBase, masks_key: NestedKey | None, plain_key: NestedKey | None
) -> list[torch.Tensor] | None:
    """The masks of a `Masks` object, else those under a key of their own."""
    keys: list[NestedKey] = [] if plain_key is None else [plain_key]
    if masks_key is not None:
        base = masks_key if isinstance(masks_key, tuple) else (masks_key,)
        keys.insert(0, (*base, "all_attention_mask"))
    for key in keys:
        masks = readable_rows(td, key)
        if masks is not None:
            return masks
    return None


def masks_or_none(
    td: TensorDictBase, masks_key: NestedKey | None, plain_key: NestedKey | None, num_rows: int
) -> Sequence[torch.Tensor | None]:
    """Same as `attention_masks`, with None for every row where there are none."""
    return attention_masks(td, masks_key, plain_key) or [None] * num_rows


def prompt_masks(
    td: TensorDictBase,
    rows: Sequence[torch.Tensor],
    masks_key: NestedKey | None,
    plain_key: NestedKey | None,
) -> Sequence[torch.Tensor | None]:
    """The mask of each prompt.

    An environment that begins anew may leave the masks of the turn before, and they may have the
    new prompt's length by chance. They are known by what they would leave out: padding is one id.
    """
    masks = masks_or_none(td, masks_key, None, len(rows))
    plain = masks_or_none(td, None, plain_key, len(rows))
    return [
        mask if mask is not None and _leaves_out_one_id(row, mask) else other
        for row, mask, other in zip(rows, masks, plain, strict=True)
    ]


def _leaves_out_one_id(row: torch.Tensor, mask: torch.Tensor) -> bool:
    if mask.shape != row.shape:
        return False
    left_out = row[~mask.bool()]
    return bool((left_out == left_out[:1]).all())


def check_ids(rows: Sequence[Any], key: NestedKey) -> None:
    """Raises `InputError` for rows that are no token ids."""
    for index, row in enumerate(rows):
        ids = isinstance(row, torch.Tensor) and not row.dtype.is_floating_point and row.ndim == 1
        if not ids or row.is_meta:
            raise InputError(
                f"{key!r} should hold integer token ids of shape [batch, time], ragged "
                f"or padded; row {index} is {_describe(row)}."
            )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        where = " on the meta device, which has no data" if value.is_meta else ""
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}{where}"
    return f"a {type(value).__name__}"


def strip_padding(
    row: torch.Tensor, mask: torch.Tensor | None, pad_id: int | None, eos_id: int | None = None
) -> list[int]:
    """The ids of one row without its padding.

    A mask of another length belongs to something else (the full sequence of a turn before) and says
    nothing of this row. Without a mask only pads at the ends are dropped: inside, a pad id may be
    an EOS that was sampled. Where EOS is the pad, one EOS stays at the end: it may have been
    sampled, and only a mask can tell.
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
    if start < end < len(ids) and pad_id == eos_id:
        end += 1
    return ids[start:end]
