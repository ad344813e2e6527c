"""Offers `SGLangWrapper`: the policy that a TorchRL collector calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torchrl.modules.llm.policies.common import LLMWrapperBase

from ..errors import (
    ConfigError,
    InputError,
    InputTypeError,
    SGLangError,
    UnsupportedOptionError,
)
from ..generate.completion import Completion
from ..generate.request import LogitProcessor
from ..generate.sampling import SamplingParams
from ..service.service import AsyncSGLang, find_service
from .arguments import Arguments, settle
from .call import Call, Sampling, shared_batcher
from .resume import Resuming
from .score import Scoring


class SGLangWrapper(LLMWrapperBase):
    """A TorchRL policy that samples from an `AsyncSGLang`, or scores with it.

    Takes a TensorDict of 0, 1 or more batch dimensions with history, text or tokens, and writes
    `Text`, `Tokens`, `Masks`, `LogProbs` and, in history mode, `ChatHistory`, laid out as
    TorchRL's `TransformersWrapper` does. Prompts are tokenised once and sent as ids; all prompts of
    a call are in flight at once. Log-probs are float32, after temperature and penalties, and NaN
    at prompt positions. ``masks.all_assistant_mask`` marks exactly the tokens that this call
    sampled: those of earlier turns are part of the prompt. In history mode, and in text mode with a
    TensorDict that carries the turn before, a prompt that goes on begins with that turn's tokens.

    Args:
        service: the rollout service, or the URL of a router or server.
        model: the same, under the name that TorchRL's wrappers use.
        tokenizer: Hugging Face tokenizer, or a folder or hub name; the served model's by default.
        input_mode: ``"history"``, ``"text"`` or ``"tokens"``.
        input_key: where the prompts are; by default ``(input_mode, "prompt")``, or ``"full"``
            without ``generate``.
        attention_mask_key: mask of padded token prompts. Without one, pads at the ends of a padded
            tensor's rows are dropped, where EOS is the pad but one at the end; rows of a lazy stack
            have no padding, unless their ``Tokens.padded`` says so.
        generate: False scores what is there: log-probs at temperature 1, no token is generated.
        generate_kwargs: sampling options, see `SamplingParams`; ``max_new_tokens`` is 128 unless
            given. On servers without a tokenizer, ``stop`` is matched here: they generate on, and
            what comes after the stop is dropped.
        tokenizer_kwargs: options for tokenising in text mode; in history mode, for the template:
            ``tools``, ``documents``, and what it reads itself, such as ``enable_thinking``.
        pad_output: pad prompts on the left and responses on the right, instead of ragged rows.
        inplace: True writes into the input, False returns the outputs alone, ``"empty"`` an empty
            copy of the input with the outputs. With ``num_samples``: False.
        device: device of the outputs; the input's by default. Outputs that are written into a
            TensorDict which has a device are on that one.
        layout: only ``torch.strided`` (the default).
        num_samples: completions per prompt, in a last batch dimension of their own.
        chat_template_name: name of one of TorchRL's templates, for history mode.
        chat_template: a template, or the name of one of the tokenizer's, for history mode; the
            tokenizer's own by default.
        return_log_probs: whether to return log-probs (default True).
        history_key, text_key, tokens_key, masks_key, log_probs_key: output keys; None leaves that
            output out.
        batching: calls of several threads share requests; ``min_batch_size`` rows are sent at once,
            fewer after ``batching_timeout`` seconds, at most ``max_batch_size`` together.
        prefer_tokens: in history mode, send ``(tokens_key, "prompt")`` where it is there and says
            what the chat says.
        carry_turns: a prompt that goes on from an earlier turn begins with that turn's very tokens,
            also where the template would write that turn otherwise now, as those do that drop
            earlier thoughts. False renders and tokenises every prompt anew.
        continue_final_message: in history mode, an assistant's message at the end of a chat is
            continued; ``history.response`` is then that message as a whole.
        pad_model_input: must be None; nothing is padded on its way to SGLang.
        log_probs_mode: ``"reported"``: as SGLang reports them, without top-k, top-p and min-p, and
            at temperature 1 where it is greedy. ``"corrected"``: of the distribution that was
            sampled from; top-p and min-p then choose among the 4096 likeliest tokens (the servers'
            ``sampling_mask_max_tokens``). ``"strict"``: settings for which the two differ are
            refused. By default reported, with a `BehaviourLogProbWarning` for top-k, top-p and
            min-p.
        processor: a change to the logits for every row, see `allowed_tokens` and its like.
        lora: name of a loaded LoRA adapter for every row.
        sampling_key: a TensorDict of the input with options per row, not the same ones in every
            row: sampling options, ``action_mask``, ``lora``, ``session``, ``rid`` (for ``abort``),
            and ``images``, ``videos``, ``audios``: URLs, files of the servers or base64.
        partial_rollouts: aborted rows come back with what they had and ``finish_reason`` "abort";
            `resume` goes on with them. Otherwise they raise `RequestAbortedError`.
        fit_context: a row whose ``max_new_tokens`` do not fit into the context is asked for what
            fits, and ends with ``finish_reason`` "length". False: it raises `PromptTooLongError`
            before anything is sent.
        rollout_key: where ``finish_reason`` and ``weight_version`` per row, ``policy_version`` per
            token ``[P + R]`` (-1 in prompts), and extras go; None leaves them out.
        extras: what else comes back: names, or ``{"top_log_probs": 5}``.

    Raises:
        UnsupportedOptionError: an unknown sampling option, or one that can't be served.
        ConfigError: arguments that contradict each other.
        TokenizerError: no tokenizer was found.
    """

    def __init__(
        self,
        service: AsyncSGLang | str | None = None,
        *,
        model: AsyncSGLang | str | None = None,
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
        carry_turns: bool = True,
        continue_final_message: bool = False,
        log_probs_mode: Literal["reported", "corrected", "strict"] | None = None,
        processor: LogitProcessor | None = None,
        lora: str | None = None,
        sampling_key: NestedKey | None = "sampling",
        partial_rollouts: bool = False,
        fit_context: bool = True,
        rollout_key: NestedKey | None = "rollout",
        extras: Sequence[str] | Mapping[str, Any] = (),
    ) -> None:
        super().__init__()
        self.service = _service(service, model)
        self._given = Arguments(
            tokenizer=tokenizer,
            input_mode=input_mode,
            input_key=input_key,
            attention_mask_key=attention_mask_key,
            generate=generate,
            generate_kwargs=generate_kwargs,
            tokenizer_kwargs=tokenizer_kwargs,
            pad_output=pad_output,
            pad_model_input=pad_model_input,
            inplace=inplace,
            device=device,
            layout=layout,
            num_samples=num_samples,
            chat_template_name=chat_template_name,
            chat_template=chat_template,
            return_log_probs=return_log_probs,
            history_key=history_key,
            text_key=text_key,
            tokens_key=tokens_key,
            masks_key=masks_key,
            log_probs_key=log_probs_key,
            batching=batching,
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            batching_timeout=batching_timeout,
            prefer_tokens=prefer_tokens,
            carry_turns=carry_turns,
            continue_final_message=continue_final_message,
            log_probs_mode=log_probs_mode,
            processor=processor,
            lora=lora,
            sampling_key=sampling_key,
            partial_rollouts=partial_rollouts,
            fit_context=fit_context,
            rollout_key=rollout_key,
            extras=extras,
        )
        self._settled = settled = settle(self._given, self.service.info.tokenizer_path)
        self._device = torch.device(device) if device is not None else None
        self._batcher = shared_batcher(self.service, settled.batching)
        # What TorchRL and its users read of its own wrappers.
        self.input_mode, self.generate = settled.mode, settled.generate
        self.inplace = settled.inplace
        self.num_samples, self.layout, self.pad_output = settled.num_samples, layout, pad_output
        self.tokenizer, self.prefer_tokens = settled.tokenizer, prefer_tokens
        self.return_log_probs = settled.call.return_log_probs
        self.input_key = settled.prompts.input_key
        self.in_keys, self.out_keys = [self.input_key], settled.out_keys
        self.text_key, self.tokens_key, self.masks_key = text_key, tokens_key, masks_key
        self.log_probs_key, self.history_key = log_probs_key, history_key
        self._min_batch_size = settled.batching.min_size if settled.batching else None
        self._max_batch_size = settled.batching.max_size if settled.batching else None
        self._batching_timeout = batching_timeout
        self.return_text, self.return_tokens, self.return_masks, self.return_history = (
            key is not None
            for key in (
                settled.outputs.text_key,
                settled.outputs.tokens_key,
                settled.outputs.masks_key,
                settled.outputs.history_key,
            )
        )
        self.generate_kwargs = dict(generate_kwargs or {})
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.chat_template, self.chat_template_name = (
            settled.prompts.chats.template,
            chat_template_name,
        )
        self.attention_mask_key, self.pad_model_input = attention_mask_key, False
        self.padding_value = settled.outputs.pad_id

    @property
    def sampling(self) -> SamplingParams:
        """How it samples."""
        return self._settled.call.sampling

    @property
    def sampling_params(self) -> SamplingParams:
        """The same, under the name that ``vLLMWrapper`` uses."""
        return self.sampling

    @property
    def device(self) -> torch.device | None:
        """Device of the outputs; None follows the input."""
        return self._device

    @property
    def model(self) -> AsyncSGLang:
        """The service, under the name that TorchRL's wrappers use."""
        return self.service

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Samples a response for every row, or scores every row.

        Args:
            tensordict: prompts, of any number of batch dimensions.
            tensordict_out: where to write instead of what ``inplace`` says.
            **kwargs: sampling options for this call, laid over ``generate_kwargs``.

        Raises:
            InputError: an empty batch, a missing key, an empty or a too long prompt.
            UnsupportedOptionError: an option that is unknown or can't be served.
            ServiceError: the servers refused, failed or did not answer in time.
        """
        self._check_target(tensordict, tensordict_out, self.num_samples)
        call = self._call(tensordict, kwargs)
        return self._place(tensordict, call.outputs(self._complete(call)), tensordict_out)

    async def agenerate(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Same as calling it, awaited; cancelling it aborts its requests on the servers.

        Nothing blocks the event loop: prompts are read, and outputs made, in threads.

        Raises:
            UnsupportedOptionError: the policy batches over threads, see ``batching``.
        """
        if self._batcher is not None:
            raise UnsupportedOptionError(
                "agenerate sends its prompts at once, while this policy (batching=True, or a "
                "min_batch_size or max_batch_size) collects those of several threads: await one "
                "without, or call this one in threads."
            )
        self._check_target(tensordict, tensordict_out, self.num_samples)
        call = await asyncio.to_thread(self._call, tensordict, kwargs)
        completions = await self.service.acomplete(call.requests, call.arrive)
        out = await asyncio.to_thread(call.outputs, completions)
        return await asyncio.to_thread(self._place, tensordict, out, tensordict_out)

    def resume(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        """Goes on with the aborted rows of a partial rollout; the other rows stay as they are.

        Args:
            tensordict: what the policy returned (``partial_rollouts=True``), in tokens.
            **kwargs: as for the call that was aborted; ``max_new_tokens`` counts from its start.

        Returns:
            The same rows, with what was sampled before and now put together: tokens, log-probs
            and the version of each token.

        Raises:
            InputError: tokens, masks, log-probs or finish reasons are missing.
        """
        self._check_target(tensordict, None, None)
        call = Resuming(tensordict, self._settled, self.service, kwargs)
        completions = self._complete(call) if call.requests else []
        return self._place(tensordict, call.outputs(completions), None)

    def _call(self, tensordict: TensorDictBase, kwargs: Mapping[str, Any]) -> Call:
        kind = Sampling if self.generate else Scoring
        return kind(tensordict, self._settled, self.service, kwargs)

    def _complete(self, call: Call) -> list[Completion]:
        if self._batcher is None:
            return self.service.complete(call.requests, call.arrive)
        self.service.check(call.requests)
        groups = self._batcher.call(call.requests, len(call.requests))
        completions: list[Completion] = []
        for group in groups:
            if isinstance(group, SGLangError):
                raise group
            completions += group
        return completions

    def _check_target(
        self,
        source: TensorDictBase,
        target: TensorDictBase | None,
        num_samples: int | None,
    ) -> None:
        """Raises `InputError` where the outputs can't be written, before anything is sampled."""
        if not is_tensor_collection(source):
            raise InputTypeError(
                f"a policy is called with a TensorDict, got {type(source).__name__}: put the "
                f"prompts under {self.input_key!r}."
            )
        if target is None and self.inplace is not True:
            return
        into = source if target is None else target
        size = (*source.batch_size, *([] if num_samples is None else [num_samples]))
        if into.batch_size != torch.Size(size):
            raise InputError(
                f"the outputs have batch size {tuple(size)}; what they are to be written into has "
                f"{tuple(into.batch_size)}."
            )
        if into.is_locked:
            raise InputError(
                "the outputs are to be written into a TensorDict that is locked: unlock_() it, or "
                "use inplace=False or 'empty', which leave it as it is."
            )
        for key in self.out_keys:
            base = key[:-1] if isinstance(key, tuple) else ()
            held = into.get(base, None) if base else None
            if held is not None and not is_tensor_collection(held):
                raise InputError(f"{key!r} can't be written: {base!r} holds a value of its own.")

    def _place(
        self, source: TensorDictBase, out: TensorDictBase, target: TensorDictBase | None
    ) -> TensorDictBase:
        """Writes the outputs to where the caller wants them.

        A TensorDict that is written into has its values on its own device, if it has one.
        """
        device = self._device or source.device
        if target is None:
            if self.inplace is False:
                return out if device is None else out.to(device)
            target = source if self.inplace is True else source.empty(device=device)
        device = target.device or device
        if device is not None:
            out = out.to(device)
        target = target.exclude(*self.out_keys, inplace=True)
        return target.update(out, keys_to_update=self.out_keys)

    def get_new_version(self, **kwargs: Any) -> SGLangWrapper:
        """A wrapper with other arguments, such as ``generate=False``; the rest stays the same.

        Where ``input_mode`` or ``generate`` changes, ``input_key`` follows unless it is given.
        """
        given = dict(vars(self._given))
        now = {"input_mode": self.input_mode, "generate": self.generate}
        if now != {name: kwargs.get(name, value) for name, value in now.items()}:
            given["input_key"] = None
        if kwargs.get("generate") is False:
            given |= {"return_log_probs": None, "num_samples": None, "generate_kwargs": None}
            given |= {"processor": None, "extras": ()}
        service = kwargs.pop("service", kwargs.pop("model", self.service))
        return type(self)(service, **{**given, "tokenizer": self.tokenizer, **kwargs})

    def get_dist(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: SGLang returns log-probs of tokens, never whole distributions."""
        raise NotImplementedError(
            "SGLang does not return logits, so get_dist is not available; use a "
            "TransformersWrapper of the trainer's model."
        )

    # What TorchRL's losses choose among; the base class would ask `forward` for logits.
    _get_dist_with_prompt_mask = _get_dist_with_assistant_mask = get_dist
    _get_dist_with_attention_mask = _get_dist_with_custom_mask = get_dist

    def log_prob(self, data: TensorDictBase, **get_kwargs: Any) -> Any:
        """Log-probs of ``data``'s whole sequences; needs ``generate=False``.

        Args:
            data: what `forward` takes.
            **get_kwargs: for the TensorDict's ``get``, such as ``as_list=True``.

        Raises:
            RuntimeError: this wrapper generates.
        """
        if self.generate:
            raise RuntimeError("log_prob not callable when generate=True.")
        return self(data).get((self.log_probs_key, "full"), **get_kwargs)

    def get_batching_state(self) -> dict[str, Any]:
        """What waits to be sent and what is being generated, to look into a loop that seems stuck.

        ``queue_size`` calls wait for others; ``pending_futures`` counts these and those whose
        prompts are being generated, for which ``processing`` is True and ``lock_state`` "locked".
        Without batching: ``batching_enabled=False`` alone.
        """
        if self._batcher is None:
            return {"batching_enabled": False}
        waiting, pending = self._batcher.counts()
        return {
            "batching_enabled": True,
            "min_batch_size": self._min_batch_size,
            "max_batch_size": self._max_batch_size,
            "queue_size": waiting,
            "pending_futures": pending,
            "processing": pending > waiting,
            "lock_state": "locked" if pending > waiting else "unlocked",
            "timeout": self._batching_timeout,
        }

    def cleanup_batching(self, *, flush: bool = False) -> None:
        """Ends every call's wait for others; what is being generated goes on.

        Args:
            flush: what waits is sent now; else its callers get a `ServiceError`.
        """
        batcher = getattr(self, "_batcher", None)  # TorchRL's __del__ calls this, come what may
        if batcher is not None:
            batcher.release(run=flush)


def _service(service: AsyncSGLang | str | None, model: AsyncSGLang | str | None) -> AsyncSGLang:
    """The rollout service, under whichever of its two names it was given."""
    if (service is None) == (model is None):
        raise ConfigError("pass exactly one of service and model, which is TorchRL's name for it.")
    given = model if service is None else service
    if isinstance(given, str):
        given = find_service(given) or AsyncSGLang.connect(given)
    if given is None or not hasattr(given, "complete"):  # as a service has it
        raise ConfigError(
            f"service must be an AsyncSGLang or the URL of a router or server, got "
            f"{type(given).__name__}."
        )
    return given
