"""Settles the arguments of `SGLangWrapper`: what TorchRL's wrappers take is honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, lazy_stack

from ..errors import ConfigError, EmptyBatchError, TokenizerError, UnsupportedOptionError
from ..generate.request import LogitProcessor
from ..generate.sampling import SamplingParams
from ..generate.sampling_names import SAMPLES, no_mapping
from .batching import BatchingConfig
from .outputs.extras import InfoSpec, parse_extras
from .outputs.tensors import OutputSpec
from .outputs.texts import TextOptions
from .prompts.chats import ChatFormat
from .prompts.read import InputMode, PromptSpec, check_mode
from .prompts.turn_memory import SpecialTokens
from .requests.rows import (
    CallOptions,
    LogProbsMode,
    check_log_probs,
    check_log_probs_mode,
    check_scoring,
)
from .tokenizers import (
    choose_template,
    load_tokenizer,
    special_tokens,
    template_options,
    tokenizer_options,
)

Inplace = Literal[True, False, "empty"]
INPLACE: tuple[Inplace, ...] = (True, False, "empty")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of an `SGLangWrapper` as they were given; it says what they are."""

    tokenizer: Any
    input_mode: str
    input_key: NestedKey | None
    attention_mask_key: NestedKey
    generate: bool
    generate_kwargs: Mapping[str, Any] | None
    tokenizer_kwargs: Mapping[str, Any] | None
    pad_output: bool
    pad_model_input: bool | None
    inplace: Inplace | None
    device: torch.device | str | int | None
    layout: torch.layout | None
    num_samples: int | None
    chat_template_name: str | None
    chat_template: str | None
    return_log_probs: bool | None
    history_key: NestedKey | None
    text_key: NestedKey | None
    tokens_key: NestedKey | None
    masks_key: NestedKey | None
    log_probs_key: NestedKey | None
    batching: bool | None
    min_batch_size: int | None
    max_batch_size: int | None
    batching_timeout: float
    prefer_tokens: bool
    carry_turns: bool
    continue_final_message: bool
    log_probs_mode: LogProbsMode | None
    processor: LogitProcessor | None
    lora: str | None
    sampling_key: NestedKey | None
    partial_rollouts: bool
    fit_context: bool
    rollout_key: NestedKey | None
    extras: Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The arguments of a wrapper, checked and made definite.

    Attributes:
        mode: what the input holds.
        generate: sample, or else score.
        num_samples: size of the samples' dimension; None: no such dimension.
        inplace: where outputs go.
        tokenizer: the one in use.
        prompts: where prompts are and how they become ids.
        outputs: what is written.
        info: what else is written.
        call: what holds for every row of a call.
        batching: whether threads share requests, and how.
        sampling_key: where rows have options of their own.
    """

    mode: InputMode
    generate: bool
    num_samples: int | None
    inplace: Inplace
    tokenizer: Any
    prompts: PromptSpec
    outputs: OutputSpec
    info: InfoSpec
    call: CallOptions
    batching: BatchingConfig | None
    sampling_key: NestedKey | None

    @property
    def out_keys(self) -> list[NestedKey]:
        """Every key that is written."""
        out = self.outputs
        keys = [
            out.text_key,
            out.masks_key,
            out.tokens_key,
            out.log_probs_key,
            out.history_key,
        ]
        if self.generate:
            keys.append(self.info.key)
        return [key for key in keys if key is not None]


def settle(given: Arguments, served_tokenizer: str) -> Settled:
    """Checks the arguments of a wrapper.

    Args:
        given: as the wrapper got them.
        served_tokenizer: where the servers have their tokenizer.

    Raises:
        UnsupportedOptionError, ConfigError, TokenizerError: see `SGLangWrapper`.
    """
    refuse(pad_model_input=(given.pad_model_input is not None, "SGLang takes ragged prompts"))
    check_layout(given.layout, given.pad_output)
    mode, generate = check_mode(given.input_mode), bool(given.generate)
    sampling, num_samples = choose_sampling(given.generate_kwargs, given.num_samples, generate)
    if not generate:
        if given.return_log_probs is False:
            raise ConfigError("generate=False returns log-probs: return_log_probs can't be False.")
        check_scoring(sampling, given.processor)
        refuse(extras=(bool(parse_extras(given.extras)), "generate=False returns scores alone"))
    batching = BatchingConfig.chosen(
        given.batching,
        given.min_batch_size,
        given.max_batch_size,
        given.batching_timeout,
    )
    tokenizer = load_tokenizer(given.tokenizer, served_tokenizer, mode)
    special = special_tokens(tokenizer)
    info = InfoSpec(
        key=given.rollout_key,
        extras=parse_extras(given.extras),
    )
    check_extras(info, given, tokenizer)
    call = _call_options(given, sampling, info)
    if generate:
        check_log_probs(call)
    settled = Settled(
        mode=mode,
        generate=generate,
        num_samples=num_samples,
        inplace=choose_inplace(given.inplace, num_samples),
        tokenizer=tokenizer,
        prompts=_prompt_spec(given, mode, generate, tokenizer, special),
        outputs=_output_spec(given, mode, tokenizer, special, sampling),
        info=info,
        call=call,
        batching=batching,
        sampling_key=given.sampling_key,
    )
    if not settled.out_keys:
        raise ConfigError("every output key is None: nothing would be returned.")
    return settled


def check_extras(info: InfoSpec, given: Arguments, tokenizer: Any) -> None:
    """Raises `ConfigError` for extras that have nowhere to go, or more of them than there are."""
    for name in info.extras:
        key = "rollout_key"
        if name == "input_log_probs":
            key = "return_log_probs" if given.return_log_probs is False else "log_probs_key"
        if getattr(given, key) in (None, False):
            left_out = f"{key}={getattr(given, key)!r} leaves it out"
            raise ConfigError(f"extras has {name!r}, and {left_out}.")
    most = info.extras.get("top_log_probs", 0)
    if tokenizer is not None and most > len(tokenizer):
        # It would end the server.
        raise ConfigError(f"top_log_probs={most}, but there are {len(tokenizer)} tokens.")


def _call_options(given: Arguments, sampling: SamplingParams, info: InfoSpec) -> CallOptions:
    return CallOptions(
        sampling=sampling,
        log_probs_mode=check_log_probs_mode(given.log_probs_mode),
        return_log_probs=given.return_log_probs is not False,
        returns=info.returns(),
        processor=given.processor,
        lora=given.lora,
        partial_allowed=bool(given.partial_rollouts),
        fit_context=bool(given.fit_context),
    )


def _prompt_spec(
    given: Arguments,
    mode: InputMode,
    generate: bool,
    tokenizer: Any,
    special: SpecialTokens,
) -> PromptSpec:
    key = given.input_key
    return PromptSpec(
        mode=mode,
        input_key=(mode, "prompt" if generate else "full") if key is None else key,
        generate=generate,
        attention_mask_key=given.attention_mask_key,
        masks_key=given.masks_key,
        tokens_key=given.tokens_key,
        text_key=given.text_key,
        prefer_tokens=given.prefer_tokens,
        carry_turns=given.carry_turns,
        tokenizer_kwargs=tokenizer_options(given.tokenizer_kwargs if mode == "text" else None),
        chats=_chat_format(given, mode, generate, tokenizer, special),
    )


def _chat_format(
    given: Arguments,
    mode: InputMode,
    generate: bool,
    tokenizer: Any,
    special: SpecialTokens,
) -> ChatFormat:
    """How chats become ids; in text mode only how text does."""
    begun = bool(given.continue_final_message)
    if begun and not (mode == "history" and generate):
        raise ConfigError(
            "continue_final_message continues an assistant's message of a history: it needs "
            "input_mode='history' and generate=True."
        )
    if mode != "history":
        return ChatFormat(tokenizer=tokenizer, template=None, special=special)
    options = dict(given.tokenizer_kwargs or {})
    if not generate and not tokenizer.is_fast:
        raise TokenizerError(
            "generate=False with input_mode='history' marks what the assistant wrote, for which "
            f"the tokenizer has to be a fast one: {type(tokenizer).__name__} is none. Load it with "
            "use_fast=True, or score text or tokens."
        )
    template = choose_template(
        mode,
        tokenizer,
        given.chat_template or options.get("chat_template"),
        given.chat_template_name or options.get("chat_template_name"),
        tools=bool(options.get("tools")),
    )
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        options=template_options(options, str(template), generate),
        special=special,
        continue_final=begun or bool(options.get("continue_final_message")),
    )


def _output_spec(
    given: Arguments,
    mode: InputMode,
    tokenizer: Any,
    special: SpecialTokens,
    sampling: SamplingParams,
) -> OutputSpec:
    """A key of None, or nothing to write there, leaves an output out."""
    scoring_tokens = mode == "tokens" and not given.generate
    return OutputSpec(
        text_key=given.text_key if tokenizer is not None and not scoring_tokens else None,
        tokens_key=given.tokens_key,
        masks_key=given.masks_key,
        log_probs_key=given.log_probs_key if given.return_log_probs is not False else None,
        history_key=given.history_key if mode == "history" else None,
        padded=given.pad_output,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_token_id if tokenizer is not None else 0,
        special=special,
        text=text_options(sampling),
    )


def refuse(**options: tuple[bool, str]) -> None:
    """Raises `UnsupportedOptionError` for the first option that is given."""
    for name, (given, reason) in options.items():
        if given:
            raise UnsupportedOptionError(f"{name} is not supported: {reason}.")


def choose_sampling(
    generate_kwargs: Mapping[str, Any] | None, num_samples: int | None, generate: bool
) -> tuple[SamplingParams, int | None]:
    """How to sample, and the size of the samples' dimension (None: no such dimension).

    Raises:
        ConfigError: no mapping, or two numbers of samples.
    """
    given = sampling_options(generate_kwargs)
    if not generate:
        given.pop("max_new_tokens", None)  # TorchRL's own wrappers are given it for both
    sampling = SamplingParams.from_kwargs(given)
    explicit = bool(SAMPLES & set(given)) and sampling.n > 1
    if num_samples is None:
        num_samples = sampling.n if explicit else None
    elif explicit and sampling.n != num_samples:
        raise ConfigError(f"num_samples={num_samples} differs from generate_kwargs' {sampling.n}.")
    if num_samples is not None:
        if not generate:
            raise ConfigError("num_samples is given with generate=False, which samples nothing.")
        sampling = sampling.updated({"n": num_samples})
    return sampling, num_samples


def sampling_options(given: Any) -> dict[str, Any]:
    """The options in ``generate_kwargs``; raises `ConfigError` where it is no mapping."""
    if isinstance(given, SamplingParams):
        return dict(vars(given))
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(no_mapping(given))
    return dict(given or {})


def choose_inplace(inplace: Inplace | None, num_samples: int | None) -> Inplace:
    """Where outputs go: into the input, unless a dimension of samples makes that impossible.

    Raises:
        ConfigError: an unknown value, or True or ``"empty"`` with ``num_samples``.
    """
    if inplace is None:
        return num_samples is None
    if inplace not in INPLACE or not isinstance(inplace, bool | str):
        raise ConfigError(f"inplace must be True, False or 'empty', got {inplace!r}.")
    if num_samples is not None and inplace is not False:
        raise ConfigError(
            f"inplace={inplace!r} can't be with num_samples={num_samples}: the outputs have one "
            "more dimension than the input. Use inplace=False."
        )
    return inplace


def check_layout(layout: torch.layout | None, pad_output: Any) -> None:
    """Raises for a layout that can't be made."""
    if not isinstance(pad_output, bool):
        raise ConfigError(f"pad_output must be True or False, got {pad_output!r}.")
    refuse(layout=(layout not in (None, torch.strided), "only torch.strided is made"))


def text_options(sampling: SamplingParams) -> TextOptions:
    """TorchRL's wrappers keep special tokens and stops in the text unless told otherwise."""
    return TextOptions(
        skip_special_tokens=bool(sampling.skip_special_tokens),
        spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        keep_stop=sampling.no_stop_trim is not False,
    )


def flattened(td: TensorDictBase) -> TensorDictBase:
    """One batch dimension.

    Raises:
        EmptyBatchError: there is no row.
    """
    if 0 in td.batch_size:  # numel() is at least 1
        raise EmptyBatchError(f"the batch is empty: batch size {tuple(td.batch_size)}.")
    if td.ndim == 1:
        return td
    return lazy_stack([td]) if td.ndim == 0 else td.reshape(-1)


def unflattened(
    out: TensorDictBase, batch_size: torch.Size, num_samples: int | None
) -> TensorDictBase:
    """The input's batch dimensions, and one of samples where there is one."""
    if num_samples is not None:
        return out.view((*batch_size, num_samples))
    if len(batch_size) == 1:
        return out
    return out[0] if len(batch_size) == 0 else out.view(batch_size)
