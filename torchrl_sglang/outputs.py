"""From completions to TorchRL's Text, Tokens, Masks, LogProbs and ChatHistory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, MetaData, NestedKey, TensorDict, lazy_stack
from torch.nn.utils.rnn import pad_sequence
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from .completions import Completion
from .errors import ResponseError
from .prompts import Prompts

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How sampled ids become text.

    Attributes:
        skip_special_tokens: leave special tokens out of the response.
        spaces_between_special_tokens: as in Hugging Face's tokenizers; None: their default.
        keep_stop: keep the EOS or stop at the end of the response.
    """

    skip_special_tokens: bool = False
    spaces_between_special_tokens: bool | None = None
    keep_stop: bool = True


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What is written, and how it is laid out. A key of None leaves that output out.

    Attributes:
        text_key, tokens_key, masks_key, log_probs_key, history_key: where each output goes.
        padded: prompts padded on the left, responses on the right; else ragged rows.
        tokenizer: decodes the response; None leaves text and history out.
        pad_id: id to pad with.
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
    text: TextOptions = field(default_factory=TextOptions)


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
    layout: Layout
    pad_id: int


Layout = Callable[[list[torch.Tensor], list[torch.Tensor], Any], tuple[Any, Any, Any]]


def make_rows(prompts: Prompts, completions: Sequence[Completion], spec: OutputSpec) -> Rows:
    """Tensors of one batch.

    Raises:
        ResponseError: not one completion per prompt.
    """
    if len(prompts.ids) != len(completions):
        raise ResponseError(f"{len(completions)} completions for {len(prompts.ids)} prompts.")
    return Rows(
        prompts=[torch.tensor(ids, dtype=torch.int64) for ids in prompts.ids],
        responses=[torch.tensor(c.output_ids, dtype=torch.int64) for c in completions],
        layout=_padded if spec.padded else _ragged,
        pad_id=spec.pad_id,
    )


def build_outputs(
    rows: Rows, prompts: Prompts, completions: Sequence[Completion], spec: OutputSpec
) -> LazyStackedTensorDict:
    """The outputs of one batch, as a lazy stack of one row per completion.

    Shapes: ``prompt [P]``, ``response [R]``, ``full`` and masks ``[P + R]`` per row; padded to the
    longest prompt and the longest response of the batch where ``spec.padded``. Token ids are
    int64, masks bool, log-probs float32 and NaN at prompt positions that have none.
    """
    out = TensorDict(batch_size=[len(completions)]).to_lazystack(0)
    if spec.tokens_key is not None:
        tokens = Tokens._from_tensordict(out.empty())
        tokens.prompt, tokens.response, tokens.full = rows.layout(
            rows.prompts, rows.responses, rows.pad_id
        )
        tokens.padded = MetaData(spec.padded)
        out.set(spec.tokens_key, tokens)
    if spec.masks_key is not None:
        out.set(spec.masks_key, _masks(out, rows, spec))
    if spec.log_probs_key is not None:
        out.set(spec.log_probs_key, _log_probs(out, rows, completions, spec))
    if spec.tokenizer is not None:
        _add_text_and_history(out, prompts, completions, spec)
    return out


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


def _masks(out: LazyStackedTensorDict, rows: Rows, spec: OutputSpec) -> Masks:
    """Attention: everything but padding. Assistant: exactly the tokens that were sampled."""
    sampled = [torch.ones_like(r, dtype=torch.bool) for r in rows.responses]
    attended = [torch.ones_like(p, dtype=torch.bool) for p in rows.prompts]
    masks = Masks._from_tensordict(out.empty())
    masks.all_attention_mask = rows.layout(attended, sampled, False)[2]
    masks.all_assistant_mask = rows.layout([~mask for mask in attended], sampled, False)[2]
    masks.padded = MetaData(spec.padded)
    return masks


def _log_probs(
    out: LazyStackedTensorDict, rows: Rows, completions: Sequence[Completion], spec: OutputSpec
) -> LogProbs:
    """Prompts have no log-prob: NaN, which GRPOLoss leaves out, while 0 would be log 1."""
    scored = [
        torch.tensor(c.input_log_probs, dtype=torch.float32)
        if c.input_log_probs is not None
        else torch.full((len(p),), NAN)
        for p, c in zip(rows.prompts, completions, strict=True)
    ]
    sampled = [torch.tensor(c.log_probs, dtype=torch.float32) for c in completions]
    log_probs = LogProbs._from_tensordict(out.empty())
    log_probs.prompt, log_probs.response, log_probs.full = rows.layout(scored, sampled, (NAN, 0.0))
    log_probs.padded = MetaData(spec.padded)
    return log_probs


def _add_text_and_history(
    out: LazyStackedTensorDict,
    prompts: Prompts,
    completions: Sequence[Completion],
    spec: OutputSpec,
) -> None:
    with_history = spec.history_key is not None and prompts.history is not None
    if spec.text_key is None and not with_history:
        return
    decoded = decode_responses(completions, spec.tokenizer)
    if spec.text_key is not None:
        out.set(spec.text_key, _text(out, prompts, completions, decoded, spec))
    if spec.history_key is not None and prompts.history is not None:
        turns = [
            lazy_stack([_assistant_turn(text, completion, spec.tokenizer)])
            for text, completion in zip(decoded, completions, strict=True)
        ]
        history = ChatHistory._from_tensordict(out.empty())
        history.prompt = prompts.history
        history.response = lazy_stack(turns)
        history.full = prompts.history.extend(history.response, inplace=False, dim=-1)
        out.set(spec.history_key, history)


def decode_responses(completions: Sequence[Completion], tokenizer: Any) -> list[str]:
    """The sampled ids as text, special tokens included."""
    texts: list[str] = tokenizer.batch_decode(
        [c.output_ids for c in completions], skip_special_tokens=False
    )
    return texts


def _text(
    out: LazyStackedTensorDict,
    prompts: Prompts,
    completions: Sequence[Completion],
    decoded: list[str],
    spec: OutputSpec,
) -> Text:
    text = Text._from_tensordict(out.empty())
    prompt_texts = prompts.texts
    if prompt_texts is None:
        prompt_texts = spec.tokenizer.batch_decode(prompts.ids, skip_special_tokens=False)
    responses = _styled(completions, decoded, spec)
    text.prompt = prompt_texts
    text.response = responses
    text.full = [p + r for p, r in zip(prompt_texts, responses, strict=True)]
    return text


def _styled(completions: Sequence[Completion], decoded: list[str], spec: OutputSpec) -> list[str]:
    """The responses as the sampling options want them to be written."""
    options, responses = spec.text, decoded
    if not options.keep_stop:
        responses = [
            content(text, completion, spec.tokenizer)
            for text, completion in zip(decoded, completions, strict=True)
        ]
    if options.skip_special_tokens or options.spaces_between_special_tokens is not None:
        kwargs = {"skip_special_tokens": options.skip_special_tokens}
        if options.spaces_between_special_tokens is not None:
            kwargs["spaces_between_special_tokens"] = options.spaces_between_special_tokens
        whole = spec.tokenizer.batch_decode([c.output_ids for c in completions], **kwargs)
        responses = (
            whole
            if options.keep_stop
            else [
                _before_stop(text, completion)
                for text, completion in zip(whole, completions, strict=True)
            ]
        )
    return responses


def _assistant_turn(text: str, completion: Completion, tokenizer: Any) -> History:
    return History(
        role="assistant",
        content=content(text, completion, tokenizer),
        is_complete=completion.finish_type == "stop",
        batch_size=(),
    )


def content(text: str, completion: Completion, tokenizer: Any) -> str:
    """A response without the EOS, stop token or stop string that ended it."""
    stop = completion.matched_stop
    if isinstance(stop, int) and completion.output_ids[-1:] == [stop]:
        return text.removesuffix(tokenizer.decode([stop], skip_special_tokens=False))
    return _before_stop(text, completion)


def _before_stop(text: str, completion: Completion) -> str:
    stop = completion.matched_stop
    return text[: text.rfind(stop)] if isinstance(stop, str) and stop in text else text
