"""`SGLangWrapper`: the policy that a TorchRL collector calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, lazy_stack, set_list_to_stack
from torchrl.modules.llm.policies.common import LLMWrapperBase

from .errors import ConfigError, EmptyBatchError, TokenizerError, UnsupportedOptionError
from .outputs import OutputSpec, build_outputs
from .prompts import (
    Prompts,
    PromptSpec,
    check_mode,
    default_tokenizer_kwargs,
    load_tokenizer,
    read_prompts,
)
from .protocol import GenerateRequest
from .sampling import SamplingParams
from .service import AsyncSGLang


class BehaviourLogProbWarning(UserWarning):
    """The reported log-probs are not those of the distribution that was sampled from."""


class SGLangWrapper(LLMWrapperBase):
    """A TorchRL policy that samples from an `AsyncSGLang`.

    Takes a TensorDict of 0, 1 or more batch dimensions with history, text or tokens, and writes
    `Text`, `Tokens`, `Masks`, `LogProbs` and, in history mode, `ChatHistory`, laid out as
    TorchRL's `TransformersWrapper` does. Prompts are tokenised once and sent as ids; all prompts of
    a call are in flight at once. Log-probs are float32, after temperature and penalties, and NaN
    at prompt positions. ``masks.all_assistant_mask`` marks exactly the sampled tokens.

    Args:
        service: the rollout service, or the URL of a router or server.
        tokenizer: Hugging Face tokenizer, or a folder or hub name; the served model's by default.
        input_mode: ``"history"``, ``"text"`` or ``"tokens"``.
        input_key: where the prompts are; by default ``(input_mode, "prompt")``.
        attention_mask_key: mask of padded token prompts; without one, pads at the ends are dropped.
        generate: must be True for now.
        generate_kwargs: sampling options, see `SamplingParams`; ``max_new_tokens`` is 128 unless
            given.
        tokenizer_kwargs: options for tokenising in text mode.
        pad_output: pad prompts on the left and responses on the right, instead of ragged rows.
        inplace: True writes into the input, False returns the outputs alone, ``"empty"`` an empty
            copy of the input with the outputs.
        device: device of the outputs; the input's by default.
        layout: only ``torch.strided`` (the default).
        num_samples: must be None for now.
        chat_template_name: name of one of TorchRL's templates, for history mode.
        chat_template: a template, for history mode; the tokenizer's own by default.
        return_log_probs: whether to return log-probs (default True).
        history_key, text_key, tokens_key, masks_key, log_probs_key: output keys; None leaves that
            output out.
        batching, min_batch_size, max_batch_size: must be unset for now.
        batching_timeout: used with ``batching`` only.
        prefer_tokens: in history mode, send ``(tokens_key, "prompt")`` where it is there.
        pad_model_input: must be None; nothing is padded on its way to SGLang.

    Raises:
        UnsupportedOptionError: an unknown sampling option, or one that can't be served.
        ConfigError: arguments that contradict each other.
        TokenizerError: no tokenizer was found.
    """

    def __init__(
        self,
        service: AsyncSGLang | str,
        *,
        tokenizer: Any = None,
        input_mode: str = "history",
        input_key: NestedKey | None = None,
        attention_mask_key: NestedKey = "attention_mask",
        generate: bool = True,
        generate_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        pad_output: bool = False,
        pad_model_input: bool | None = None,
        inplace: Literal[True, False, "empty"] | None = None,
        device: torch.device | str | int | None = None,
        layout: torch.layout | None = None,
        num_samples: int | None = None,
        chat_template_name: str | None = None,
        chat_template: str | None = None,
        return_log_probs: bool | None = None,
        history_key: NestedKey | None = "history",
        text_key: NestedKey | None = "text",
        tokens_key: NestedKey | None = "tokens",
        masks_key: NestedKey | None = "masks",
        log_probs_key: NestedKey | None = "log_probs",
        batching: bool | None = None,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        batching_timeout: float = 10.0,
        prefer_tokens: bool = False,
    ) -> None:
        super().__init__()
        _refuse(
            generate=(generate is not True, "scoring is not available yet"),
            num_samples=(num_samples is not None, "repeat the prompts in the batch instead"),
            batching=(bool(batching), "rows of one call are in flight together already"),
            min_batch_size=(min_batch_size is not None, "it belongs to batching"),
            max_batch_size=(max_batch_size is not None, "it belongs to batching"),
            pad_model_input=(pad_model_input is not None, "SGLang takes ragged prompts"),
            layout=(layout not in (None, torch.strided), "only torch.strided is made"),
        )
        mode = check_mode(input_mode)
        if inplace not in (None, True, False, "empty"):
            raise ConfigError(f"inplace must be True, False or 'empty', got {inplace!r}.")
        if not isinstance(pad_output, bool):
            raise ConfigError(f"pad_output must be True or False, got {pad_output!r}.")
        if chat_template is not None and chat_template_name is not None:
            raise ConfigError("chat_template and chat_template_name are both given: leave one out.")
        self.service = AsyncSGLang.connect(service) if isinstance(service, str) else service
        self.input_mode = mode
        self.generate = True
        self.pad_output = pad_output
        self.inplace = True if inplace is None else inplace
        self.num_samples = None
        self.layout = layout
        self.prefer_tokens = prefer_tokens
        self.return_log_probs = return_log_probs is not False
        self.sampling = SamplingParams.from_kwargs(generate_kwargs)
        self.tokenizer = load_tokenizer(tokenizer, self.service.info.tokenizer_path, mode)
        self._device = torch.device(device) if device is not None else None
        self._min_batch_size = self._max_batch_size = None
        self._batching_timeout = batching_timeout
        self.input_key = input_key if input_key is not None else (mode, "prompt")
        self.in_keys = [self.input_key]
        self._prompt_spec = PromptSpec(
            mode=mode,
            input_key=self.input_key,
            attention_mask_key=attention_mask_key,
            masks_key=masks_key,
            tokens_key=tokens_key,
            prefer_tokens=prefer_tokens,
            tokenizer=self.tokenizer,
            tokenizer_kwargs=default_tokenizer_kwargs(tokenizer_kwargs),
            template=_template(mode, self.tokenizer, chat_template, chat_template_name),
        )
        self._output_spec = OutputSpec(
            text_key=text_key if self.tokenizer is not None else None,
            tokens_key=tokens_key,
            masks_key=masks_key,
            log_probs_key=log_probs_key if self.return_log_probs else None,
            history_key=history_key if mode == "history" else None,
            padded=pad_output,
            tokenizer=self.tokenizer,
            pad_id=self.tokenizer.pad_token_id if self.tokenizer is not None else 0,
        )
        keys = self._output_spec
        self.text_key, self.tokens_key, self.masks_key = text_key, tokens_key, masks_key
        self.log_probs_key, self.history_key = log_probs_key, history_key
        self.out_keys = [
            key
            for key in (
                keys.text_key,
                keys.masks_key,
                keys.tokens_key,
                keys.log_probs_key,
                keys.history_key,
            )
            if key is not None
        ]
        if not self.out_keys:
            raise ConfigError("every output key is None: nothing would be returned.")
        _warn_if_truncated(self.sampling, self.return_log_probs)

    @property
    def device(self) -> torch.device | None:
        """Device of the outputs; None follows the input."""
        return self._device

    @property
    def model(self) -> AsyncSGLang:
        """The service, under the name that TorchRL's wrappers use."""
        return self.service

    @set_list_to_stack(True)
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Samples a response for every row.

        Args:
            tensordict: prompts, of any number of batch dimensions.
            tensordict_out: where to write instead of what ``inplace`` says.
            **kwargs: sampling options for this call, laid over ``generate_kwargs``.

        Raises:
            InputError: an empty batch, a missing key, an empty or a too long prompt.
            ServiceError: the servers refused, failed or did not answer in time.
        """
        if tensordict.numel() == 0:
            raise EmptyBatchError(f"the batch is empty: batch size {tuple(tensordict.batch_size)}.")
        prompts = read_prompts(_flatten(tensordict), self._prompt_spec)
        completions = self.service.complete(self._requests(prompts, kwargs))
        out = build_outputs(prompts, completions, self._output_spec)
        return self._place(tensordict, _unflatten(out, tensordict.batch_size), tensordict_out)

    def _requests(self, prompts: Prompts, kwargs: Mapping[str, Any]) -> list[GenerateRequest]:
        sampling = self.sampling.updated(kwargs) if kwargs else self.sampling
        if kwargs:
            _warn_if_truncated(sampling, self.return_log_probs)
        return [
            GenerateRequest(
                input_ids=tuple(ids), sampling=sampling, return_log_probs=self.return_log_probs
            )
            for ids in prompts.ids
        ]

    def _place(
        self, source: TensorDictBase, out: TensorDictBase, target: TensorDictBase | None
    ) -> TensorDictBase:
        """Writes the outputs to where the caller wants them."""
        device = self._device or source.device
        if device is not None:
            out = out.to(device)
        if target is None:
            if self.inplace is False:
                return out
            target = source if self.inplace is True else source.empty()
        target = target.exclude(*self.out_keys, inplace=True)
        return target.update(out, keys_to_update=self.out_keys)

    def get_dist(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: SGLang returns log-probs of tokens, never whole distributions."""
        raise NotImplementedError(
            "SGLang does not return logits, so get_dist is not available; use a "
            "TransformersWrapper of the trainer's model."
        )

    def log_prob(self, *args: Any, **kwargs: Any) -> Any:
        """Not available yet."""
        raise NotImplementedError(
            "scoring is not available yet; use a TransformersWrapper of the trainer's model."
        )


def _refuse(**options: tuple[bool, str]) -> None:
    for name, (given, reason) in options.items():
        if given:
            raise UnsupportedOptionError(f"{name} is not supported: {reason}.")


def _template(
    mode: str, tokenizer: Any, template: str | None, template_name: str | None
) -> dict[str, str]:
    """The chat template to render with: the user's, else the tokenizer's own."""
    if mode != "history":
        return {}
    if template_name is not None:
        return {"chat_template_name": template_name}
    if template is None:
        template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise TokenizerError(
            "input_mode='history' renders chats, but the tokenizer has no chat template: pass "
            "chat_template= or chat_template_name= (such as 'chatml_format')."
        )
    return {"chat_template": template}


def _warn_if_truncated(sampling: SamplingParams, return_log_probs: bool) -> None:
    if return_log_probs and sampling.truncates:
        warnings.warn(
            f"{', '.join(sampling.truncates)} truncate the distribution that is sampled from, but "
            "the log-probs that SGLang reports are those before truncation: importance ratios "
            "computed from them are biased. Sample with top_p=1, top_k=-1 and min_p=0.",
            BehaviourLogProbWarning,
            stacklevel=3,
        )


def _flatten(td: TensorDictBase) -> TensorDictBase:
    if td.ndim == 1:
        return td
    return lazy_stack([td]) if td.ndim == 0 else td.reshape(-1)


def _unflatten(out: TensorDictBase, batch_size: torch.Size) -> TensorDictBase:
    if len(batch_size) == 1:
        return out
    return out[0] if len(batch_size) == 0 else out.view(batch_size)
