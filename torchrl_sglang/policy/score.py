"""Scores text, history or tokens that are there already: no token is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, MetaData, TensorDict, TensorDictBase
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from ..errors import ConfigError, ResponseError, UnsupportedOptionError
from ..generate.completion import Completion
from ..generate.request import GenerateRequest
from ..service.service import AsyncSGLang
from .arguments import Settled, flattened, unflattened
from .outputs.tensors import Columns, OutputSpec, as_floats, as_ids, stacked
from .outputs.texts import non_tensor
from .prompts.media import MEDIA_OPTIONS, media_of
from .prompts.padding import attended, attention_masks, below, id_rows, pads_of, values_of
from .prompts.read import Prompts, PromptSpec, read_prompts
from .requests.rows import (
    ROW_OPTIONS,
    CallOptions,
    check_scoring,
    given_rids,
    overlaid,
    read_row_options,
)


class Scoring:
    """A call that scores what is there.

    Attributes:
        requests: what to send, one per row of the flattened input.
    """

    def __init__(
        self,
        td: TensorDictBase,
        settled: Settled,
        service: AsyncSGLang,
        kwargs: Mapping[str, Any],
    ) -> None:
        flat = flattened(td)
        self._batch_size = td.batch_size
        self._outputs = settled.outputs
        options = settled.call
        if kwargs:
            options = overlaid(options, kwargs)
            check_scoring(options.sampling, options.processor)
        self._prompts = read_prompts(flat, settled.prompts)
        rows = read_row_options(flat, settled.sampling_key)
        self._places = read_places(flat, self._prompts, settled.prompts)
        self.requests = scoring_requests(self._prompts, rows, options)

    def arrive(self, completions: Sequence[Completion]) -> None:
        """Does nothing: scores become rows all at once."""

    def outputs(self, completions: Sequence[Completion]) -> TensorDictBase:
        """The scores, in the input's batch dimensions."""
        scores = build_scores(self._prompts, completions, self._places, self._outputs)
        return unflattened(scores, self._batch_size, None)


def scoring_requests(
    prompts: Prompts, row_options: Sequence[Mapping[str, Any]], options: CallOptions
) -> list[GenerateRequest]:
    """One request per text.

    Raises:
        UnsupportedOptionError: a row has media, or an option that scoring can't follow.
    """
    held = any(media_of(messages) for messages in prompts.chats or ())
    if held or any(name in row for row in row_options for name in MEDIA_OPTIONS):
        raise UnsupportedOptionError(
            "generate=False scores text alone, and a row has images, videos or audio: SGLang puts "
            "tokens of its own in their place. Use the trainer's model."
        )
    adapters = [options.lora] * len(prompts.ids)
    for index, row in enumerate(row_options):
        adapters[index] = row.get("lora", options.lora)
        own = {name: value for name, value in row.items() if name not in ROW_OPTIONS}
        try:
            check_scoring(options.sampling.updated(own, ROW_OPTIONS), row.get("action_mask"))
        except ConfigError as error:
            error.add_note(
                f"row {index} of the batch; with sampling_key=None, rows have no options of their "
                "own"
            )
            raise
    named = given_rids(row_options) or [{} for _ in prompts.ids]
    return [
        GenerateRequest(input_ids=tuple(ids), scoring=True, lora=adapter, **rid)
        for ids, adapter, rid in zip(prompts.ids, adapters, named, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the ids of each row stand in the input, and what is known of them.

    Attributes:
        attended: bool ``[T]`` per row, True where its ids stand; without padding all of it.
        assistant_masks: bool ``[ids]`` per row, which of them an assistant wrote.
    """

    attended: list[torch.Tensor]
    assistant_masks: list[torch.Tensor] | None

    def lay(self, rows: list[torch.Tensor], fill: Any, padded: bool) -> Any:
        """Values of the ids: as they are, or in the input's padded rows, padded on the left."""
        if not padded:
            return rows
        full = [
            torch.full(mask.shape, fill, dtype=row.dtype, device="cpu")
            for row, mask in zip(rows, self.attended, strict=True)
        ]
        for target, row, mask in zip(full, rows, self.attended, strict=True):
            target[mask] = row
        return pad_sequence(full, True, fill, padding_side="left")


def read_places(td: TensorDictBase, prompts: Prompts, spec: PromptSpec) -> Places:
    """Places of a batch that is scored.

    Padded tokens stay where they are, so that their scores line up with other values of the same
    layout. An assistant mask of the input is kept where it belongs to the very ids that are scored.
    """
    whole = [torch.ones(len(ids), dtype=torch.bool, device="cpu") for ids in prompts.ids]
    written = prompts.assistant_masks
    if written is not None:
        masks = [torch.tensor(mask, dtype=torch.bool, device="cpu") for mask in written]
        return Places(attended=whole, assistant_masks=masks)
    if prompts.attended is not None:
        return Places(
            attended=prompts.attended, assistant_masks=_carried(td, prompts.attended, spec)
        )
    rows = [] if spec.tokens_key is None else id_rows(td, below(spec.tokens_key, "full"))
    known = [row for row in rows if row is not None]
    if len(known) < len(whole):
        return Places(attended=whole, assistant_masks=None)
    standing = attended(known, attention_masks(td, spec.masks_key, None), pads_of(spec.tokenizer))
    same = all(
        row.ids[where].tolist() == ids
        for row, where, ids in zip(known, standing, prompts.ids, strict=True)
    )
    return Places(attended=whole, assistant_masks=_carried(td, standing, spec) if same else None)


def _carried(
    td: TensorDictBase, standing: Sequence[torch.Tensor], spec: PromptSpec
) -> list[torch.Tensor] | None:
    """The input's own assistant masks, where every row has one of its ids' length."""
    if spec.masks_key is None:
        return None
    masks = values_of(td, below(spec.masks_key, "all_assistant_mask"))
    fits = all(
        mask is not None and mask.shape == where.shape and not mask.is_meta
        for mask, where in zip(masks, standing, strict=True)
    )
    if not fits:
        return None
    return [mask.cpu().bool()[where] for mask, where in zip(masks, standing, strict=True)]


def build_scores(
    prompts: Prompts, completions: Sequence[Completion], places: Places, spec: OutputSpec
) -> LazyStackedTensorDict:
    """The scores of one batch, as a lazy stack of one row per text.

    Shapes: ``full`` and masks ``[T]`` per row; where ``spec.padded``, tokens that came padded keep
    their places, and shorter rows are padded on the left. Log-probs are float32, at temperature 1,
    and NaN for the first token, which nothing precedes; 0 in padding, as TorchRL has it.
    """
    if len(prompts.ids) != len(completions):
        raise ResponseError(f"{len(completions)} scores for {len(prompts.ids)} texts.")
    columns: Columns = {}
    ids = [as_ids(row) for row in prompts.ids]
    if spec.tokens_key is not None:
        columns[spec.tokens_key] = _laid(Tokens, {"full": (ids, spec.pad_id)}, places, spec)
    if spec.masks_key is not None:
        attended = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        masks: Values = {"all_attention_mask": (attended, False)}
        if places.assistant_masks is not None:
            masks["all_assistant_mask"] = (places.assistant_masks, False)
        columns[spec.masks_key] = _laid(Masks, masks, places, spec)
    if spec.log_probs_key is not None:
        scores = [as_floats(c.input_log_probs) for c in completions]
        columns[spec.log_probs_key] = _laid(LogProbs, {"full": (scores, 0.0)}, places, spec)
    if spec.text_key is not None and prompts.texts is not None:
        columns[spec.text_key] = [_whole(Text, non_tensor(text)) for text in prompts.texts]
    if spec.history_key is not None and prompts.history is not None:
        columns[spec.history_key] = [_whole(ChatHistory, row) for row in prompts.history.unbind(0)]
    return stacked(columns, len(completions))


Values = dict[str, tuple[list[torch.Tensor], Any]]  # by name: a value per row, and what pads it


def _laid(kind: Any, values: Values, places: Places, spec: OutputSpec) -> list[Any]:
    """One object per row, of values that are laid out alike."""
    padded = MetaData(spec.padded, batch_size=[])
    rows = [places.lay(given, fill, spec.padded) for given, fill in values.values()]
    return [
        kind._from_tensordict(
            TensorDict({**dict(zip(values, row, strict=True)), "padded": padded}, batch_size=[])
        )
        for row in zip(*rows, strict=True)
    ]


def _whole(kind: Any, full: Any) -> Any:
    return kind._from_tensordict(TensorDict({"full": full}, batch_size=[]))
