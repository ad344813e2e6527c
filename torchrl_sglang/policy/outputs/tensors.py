"""Lays completions out as TorchRL's Text, Tokens, Masks, LogProbs and ChatHistory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import (
    LazyStackedTensorDict,
    MetaData,
    NestedKey,
    TensorDict,
    lazy_stack,
)
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from ...errors import ResponseError
from ...generate.completion import Completion
from ..prompts.read import Prompts
from ..prompts.turn_memory import SpecialTokens
from .texts import (
    TextOptions,
    as_messages,
    build_histories,
    build_texts,
    contents,
    decode,
    decode_answers,
)


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What is written, and how it is laid out. A key of None leaves that output out.

    Attributes:
        text_key, tokens_key, masks_key, log_probs_key, history_key: where each output goes.
        padded: prompts padded on the left, responses on the right; else ragged rows.
        tokenizer: decodes the response; None leaves text and history out.
        pad_id: id to pad with.
        special: the tokenizer's special tokens.
        text: how sampled ids become text.
    """

    text_key: NestedKey | None
    tokens_key: NestedKey | None
    masks_key: NestedKey | None
    log_probs_key: NestedKey | None
    history_key: NestedKey | None
    padded: bool
    tokenizer: Any
    pad_id: int
    special: SpecialTokens = field(default_factory=SpecialTokens)
    text: TextOptions = field(default_factory=TextOptions)


class Arrived:
    """What completions become on their own, made when each one arrives.

    While some of a batch are still generated, the client has nothing else to do.

    Args:
        tokenizer: decodes them; None: no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # By the identity of the list of ids, which the entry keeps alive.
        self._made: dict[int, tuple[list[int], torch.Tensor, str | None]] = {}

    def take(self, completion: Completion) -> tuple[list[int], torch.Tensor, str | None]:
        """Makes what the completion becomes, or finds it made."""
        ids = completion.output_ids
        made = self._made.get(id(ids))
        if made is None:
            text = None if self._tokenizer is None else decode_answers([ids], self._tokenizer)[0]
            made = self._made[id(ids)] = (ids, as_ids(ids), text)
        return made

    def ids(self, completion: Completion) -> torch.Tensor:
        """The sampled ids, int64 ``[R]``."""
        return self.take(completion)[1]

    def texts(self, completions: Sequence[Completion]) -> list[str] | None:
        """The sampled ids as text, special tokens included; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return [self.take(completion)[2] or "" for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one batch as tensors, and how they are laid out.

    Attributes:
        prompts: ids of each prompt, int64 ``[P]``.
        responses: ids of each response, int64 ``[R]``.
        layout: puts values of prompts and responses together: ``(prompt, response, full)``.
        pad_id: what ids are padded with.
    """

    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]
    layout: Arrange
    pad_id: int


Arrange = Callable[[list[torch.Tensor], list[torch.Tensor], Any], tuple[Any, Any, Any]]


def as_ids(ids: Sequence[int]) -> torch.Tensor:
    """Token ids as int64; numpy reads a list three times as fast as torch."""
    return torch.from_numpy(np.array(ids, dtype=np.int64))


def as_floats(values: Sequence[Any] | None) -> torch.Tensor:
    """Log-probs, or rows of numbers, as float32."""
    return torch.from_numpy(np.array(values, dtype=np.float32))


def make_rows(
    prompts: Prompts, completions: Sequence[Completion], arrived: Arrived, spec: OutputSpec
) -> Rows:
    """Tensors of one batch.

    Raises:
        ResponseError: not one completion per prompt.
    """
    if len(prompts.ids) != len(completions):
        raise ResponseError(f"{len(completions)} completions for {len(prompts.ids)} prompts.")
    return Rows(
        prompts=[as_ids(ids) for ids in prompts.ids],
        responses=[arrived.ids(completion) for completion in completions],
        layout=_padded if spec.padded else _ragged,
        pad_id=spec.pad_id,
    )


def build_outputs(
    rows: Rows,
    prompts: Prompts,
    completions: Sequence[Completion],
    decoded: list[str] | None,
    spec: OutputSpec,
) -> Columns:
    """The outputs of one batch: for each key one value per completion, see `stacked`.

    Shapes: ``prompt [P]``, ``response [R]``, ``full`` and masks ``[P + R]`` per row; padded to the
    longest prompt and the longest response of the batch where ``spec.padded``. Token ids are
    int64, masks bool, log-probs float32 and NaN at prompt positions that have none.

    ``decoded`` is the sampled ids as text, see `Arrived.texts`; None leaves text and history
    out.
    """
    columns: Columns = {}
    if spec.tokens_key is not None:
        parts = rows.layout(rows.prompts, rows.responses, rows.pad_id)
        columns[spec.tokens_key] = _three_parts(Tokens, parts, spec)
    if spec.masks_key is not None:
        columns[spec.masks_key] = _masks(rows, spec)
    if spec.log_probs_key is not None:
        columns[spec.log_probs_key] = _log_probs(rows, completions, spec)
    if decoded is not None and spec.text_key is not None:
        columns[spec.text_key] = build_texts(
            decode(prompts.ids, spec.tokenizer) if prompts.texts is None else prompts.texts,
            completions,
            decoded,
            tokenizer=spec.tokenizer,
            special=spec.special,
            options=spec.text,
        )
    if decoded is not None and spec.history_key is not None and prompts.history is not None:
        messages = as_messages(decoded, prompts.begun, spec.tokenizer)
        columns[spec.history_key] = build_histories(
            prompts.history,
            prompts.begun or [None] * len(completions),
            contents(completions, messages, spec.tokenizer, spec.special),
            [completion.finish_type == "stop" for completion in completions],
        )
    return columns


Columns = dict[NestedKey, Sequence[Any]]


def stacked(columns: Columns, num_rows: int) -> LazyStackedTensorDict:
    """One TensorDict per row, lazily stacked.

    Rows are made whole one by one: setting a list on a stack costs ten times as much.
    """
    plain = {key: values for key, values in columns.items() if isinstance(key, str)}
    nested = {key: values for key, values in columns.items() if not isinstance(key, str)}
    rows = [TensorDict({k: v[i] for k, v in plain.items()}, batch_size=[]) for i in range(num_rows)]
    for key, values in nested.items():
        for row, value in zip(rows, values, strict=True):
            row.set(key, value)
    return lazy_stack(rows)


def _three_parts(kind: Any, parts: tuple[Any, Any, Any], spec: OutputSpec) -> list[Any]:
    padded = MetaData(spec.padded, batch_size=[])
    return [
        kind._from_tensordict(
            TensorDict(
                {"prompt": prompt, "response": response, "full": full, "padded": padded},
                batch_size=[],
            )
        )
        for prompt, response, full in zip(*parts, strict=True)
    ]


def _ragged(
    prompts: list[torch.Tensor], responses: list[torch.Tensor], fill: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    full = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    return prompts, responses, full


def _padded(
    prompts: list[torch.Tensor], responses: list[torch.Tensor], fill: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prompt_fill, response_fill = fill if isinstance(fill, tuple) else (fill, fill)
    prompt = pad_sequence(prompts, True, prompt_fill, padding_side="left")
    response = pad_sequence(responses, True, response_fill)
    return prompt, response, torch.cat([prompt, response], -1)


def _masks(rows: Rows, spec: OutputSpec) -> list[Masks]:
    """Attention: everything but padding. Assistant: exactly the tokens that were sampled."""
    sampled = [torch.ones_like(r, dtype=torch.bool) for r in rows.responses]
    attended = [torch.ones_like(p, dtype=torch.bool) for p in rows.prompts]
    not_sampled = [torch.zeros_like(p, dtype=torch.bool) for p in rows.prompts]
    padded = MetaData(spec.padded, batch_size=[])
    return [
        Masks._from_tensordict(
            TensorDict(
                {"all_attention_mask": every, "all_assistant_mask": answer, "padded": padded},
                batch_size=[],
            )
        )
        for every, answer in zip(
            rows.layout(attended, sampled, False)[2],
            rows.layout(not_sampled, sampled, False)[2],
            strict=True,
        )
    ]


def _log_probs(rows: Rows, completions: Sequence[Completion], spec: OutputSpec) -> list[LogProbs]:
    """Prompts have no log-prob: NaN, which GRPOLoss leaves out, while 0 would be log 1."""
    scored = [
        as_floats(c.input_log_probs)
        if c.input_log_probs is not None
        else torch.full((len(p),), math.nan, dtype=torch.float32, device="cpu")
        for p, c in zip(rows.prompts, completions, strict=True)
    ]
    sampled = [as_floats(c.log_probs) for c in completions]
    return _three_parts(LogProbs, rows.layout(scored, sampled, (math.nan, 0.0)), spec)
