"""From completions to TorchRL's Text, Tokens, Masks, LogProbs and ChatHistory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, MetaData, NestedKey, TensorDict, lazy_stack
from torch.nn.utils.rnn import pad_sequence
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from .errors import ResponseError
from .prompts import Prompts
from .protocol import Completion


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What is written, and how it is laid out. A key of None leaves that output out.

    Attributes:
        text_key, tokens_key, masks_key, log_probs_key, history_key: where each output goes.
        padded: prompts padded on the left, responses on the right; else ragged rows.
        tokenizer: decodes the response; None leaves text and history out.
        pad_id: id to pad with.
    """

    text_key: NestedKey | None
    tokens_key: NestedKey | None
    masks_key: NestedKey | None
    log_probs_key: NestedKey | None
    history_key: NestedKey | None
    padded: bool
    tokenizer: Any
    pad_id: int


def build_outputs(
    prompts: Prompts, completions: Sequence[Completion], spec: OutputSpec
) -> LazyStackedTensorDict:
    """The outputs of one batch, as a lazy stack of one row per prompt.

    Shapes: ``prompt [P]``, ``response [R]``, ``full`` and masks ``[P + R]`` per row; padded to the
    longest prompt and the longest response of the batch where ``spec.padded``. Token ids are
    int64, masks bool, log-probs float32 and NaN at prompt positions.
    """
    if len(prompts.ids) != len(completions):
        raise ResponseError(f"{len(completions)} completions for {len(prompts.ids)} prompts.")
    out = TensorDict(batch_size=[len(completions)]).to_lazystack(0)
    prompt_ids = [torch.tensor(ids, dtype=torch.int64) for ids in prompts.ids]
    response_ids = [torch.tensor(c.output_ids, dtype=torch.int64) for c in completions]
    layout = _padded if spec.padded else _ragged
    if spec.tokens_key is not None:
        tokens = Tokens._from_tensordict(out.empty())
        tokens.prompt, tokens.response, tokens.full = layout(prompt_ids, response_ids, spec.pad_id)
        tokens.padded = MetaData(spec.padded)
        out.set(spec.tokens_key, tokens)
    if spec.masks_key is not None:
        out.set(spec.masks_key, _masks(out, prompt_ids, response_ids, layout, spec))
    if spec.log_probs_key is not None:
        out.set(spec.log_probs_key, _log_probs(out, prompt_ids, completions, layout, spec))
    if spec.tokenizer is not None:
        _add_text_and_history(out, prompts, completions, spec)
    return out


Layout = Callable[[list[torch.Tensor], list[torch.Tensor], Any], tuple[Any, Any, Any]]


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


def _masks(
    out: LazyStackedTensorDict,
    prompts: list[torch.Tensor],
    responses: list[torch.Tensor],
    layout: Layout,
    spec: OutputSpec,
) -> Masks:
    """Attention: everything but padding. Assistant: exactly the tokens that were sampled."""
    sampled = [torch.ones_like(r, dtype=torch.bool) for r in responses]
    attended = [torch.ones_like(p, dtype=torch.bool) for p in prompts]
    masks = Masks._from_tensordict(out.empty())
    masks.all_attention_mask = layout(attended, sampled, False)[2]
    masks.all_assistant_mask = layout([~mask for mask in attended], sampled, False)[2]
    masks.padded = MetaData(spec.padded)
    return masks


def _log_probs(
    out: LazyStackedTensorDict,
    prompts: list[torch.Tensor],
    completions: Sequence[Completion],
    layout: Layout,
    spec: OutputSpec,
) -> LogProbs:
    """Prompts have no log-prob: NaN, which GRPOLoss leaves out, while 0 would be log 1."""
    unknown = [torch.full((len(p),), float("nan")) for p in prompts]
    known = [torch.tensor(c.log_probs, dtype=torch.float32) for c in completions]
    log_probs = LogProbs._from_tensordict(out.empty())
    log_probs.prompt, log_probs.response, log_probs.full = layout(
        unknown, known, (float("nan"), 0.0)
    )
    log_probs.padded = MetaData(spec.padded)
    return log_probs


def _add_text_and_history(
    out: LazyStackedTensorDict,
    prompts: Prompts,
    completions: Sequence[Completion],
    spec: OutputSpec,
) -> None:
    decode = spec.tokenizer.batch_decode
    if spec.text_key is not None:
        text = Text._from_tensordict(out.empty())
        prompt_texts = prompts.texts
        if prompt_texts is None:
            prompt_texts = decode(prompts.ids, skip_special_tokens=False)
        response_texts = decode([c.output_ids for c in completions], skip_special_tokens=False)
        text.prompt = prompt_texts
        text.response = response_texts
        text.full = [p + r for p, r in zip(prompt_texts, response_texts, strict=True)]
        out.set(spec.text_key, text)
    if spec.history_key is not None and prompts.history is not None:
        contents = decode([content_ids(c) for c in completions], skip_special_tokens=False)
        turns = [
            lazy_stack([_assistant_turn(_before_stop(text, c), c)])
            for text, c in zip(contents, completions, strict=True)
        ]
        history = ChatHistory._from_tensordict(out.empty())
        history.prompt = prompts.history
        history.response = lazy_stack(turns)
        history.full = prompts.history.extend(history.response, inplace=False, dim=-1)
        out.set(spec.history_key, history)


def _assistant_turn(content: str, completion: Completion) -> History:
    is_complete = completion.finish_type == "stop"
    return History(role="assistant", content=content, is_complete=is_complete, batch_size=())


def content_ids(completion: Completion) -> list[int]:
    """The sampled ids without the EOS or stop token that ended them."""
    ids = completion.output_ids
    stop = completion.matched_stop
    ends_with_stop = isinstance(stop, int) and ids[-1] == stop
    return ids[:-1] if ends_with_stop else ids


def _before_stop(text: str, completion: Completion) -> str:
    stop = completion.matched_stop
    return text[: text.rfind(stop)] if isinstance(stop, str) and stop in text else text
