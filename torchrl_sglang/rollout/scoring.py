"""Log-probs of text, history or tokens that are there already: no token is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, MetaData, TensorDict
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from ..completions import Completion
from ..errors import ResponseError, UnsupportedOptionError
from ..outputs import OutputSpec
from ..prompts import Prompts
from ..sampling import SamplingParams

Lay = Callable[[list[torch.Tensor], Any], Any]


def check_scoring(sampling: SamplingParams) -> None:
    """Raises `UnsupportedOptionError` for an option that scoring can't follow.

    SGLang scores prompts at temperature 1, without penalties, biases or truncation.
    """
    neutral = SamplingParams(max_new_tokens=sampling.max_new_tokens, ignore_eos=sampling.ignore_eos)
    fields = ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty")
    changed = [
        name
        for name in (*fields, "top_p", "top_k", "min_p", "logit_bias")
        if getattr(sampling, name) != getattr(neutral, name)
    ]
    if changed:
        raise UnsupportedOptionError(
            f"generate=False scores at temperature 1 without {', '.join(changed)}, whatever is "
            "asked: leave them out. To score at another temperature, use a TransformersWrapper."
        )


def build_scores(
    prompts: Prompts, completions: Sequence[Completion], spec: OutputSpec
) -> LazyStackedTensorDict:
    """The scores of one batch, as a lazy stack of one row per text.

    Shapes: ``full`` and masks ``[T]`` per row; padded on the left where ``spec.padded``. Log-probs
    are float32, at temperature 1, and NaN for the first token, which nothing precedes; 0 in
    padding, as TorchRL has it.
    """
    if len(prompts.ids) != len(completions):
        raise ResponseError(f"{len(completions)} scores for {len(prompts.ids)} texts.")
    out = TensorDict(batch_size=[len(completions)]).to_lazystack(0)
    lay: Lay = _left_padded if spec.padded else _as_it_is
    padded = MetaData(spec.padded)
    if spec.tokens_key is not None:
        tokens = Tokens._from_tensordict(out.empty())
        tokens.full = lay([torch.tensor(ids) for ids in prompts.ids], spec.pad_id)
        tokens.padded = padded
        out.set(spec.tokens_key, tokens)
    if spec.masks_key is not None:
        masks = Masks._from_tensordict(out.empty())
        attended = [torch.ones(len(ids), dtype=torch.bool) for ids in prompts.ids]
        masks.all_attention_mask = lay(attended, False)
        if prompts.assistant_masks is not None:
            written = [torch.tensor(mask, dtype=torch.bool) for mask in prompts.assistant_masks]
            masks.all_assistant_mask = lay(written, False)
        masks.padded = padded
        out.set(spec.masks_key, masks)
    if spec.log_probs_key is not None:
        log_probs = LogProbs._from_tensordict(out.empty())
        scores = [torch.tensor(c.input_log_probs, dtype=torch.float32) for c in completions]
        log_probs.full = lay(scores, 0.0)
        log_probs.padded = padded
        out.set(spec.log_probs_key, log_probs)
    if spec.text_key is not None and prompts.texts is not None:
        text = Text._from_tensordict(out.empty())
        text.full = prompts.texts
        out.set(spec.text_key, text)
    if spec.history_key is not None and prompts.history is not None:
        history = ChatHistory._from_tensordict(out.empty())
        history.full = prompts.history
        out.set(spec.history_key, history)
    return out


def _as_it_is(rows: list[torch.Tensor], fill: Any) -> list[torch.Tensor]:
    return rows


def _left_padded(rows: list[torch.Tensor], fill: Any) -> torch.Tensor:
    return pad_sequence(rows, True, fill, padding_side="left")
