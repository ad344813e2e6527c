"""Makes requests of prompts, from what holds for the whole call and what each row says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tensordict import (
    LazyStackedTensorDict,
    NestedKey,
    NonTensorStack,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
)

from ...errors import ConfigError, InputError, UnsupportedOptionError, warn
from ...generate.processors.make import allowed_tokens, combined
from ...generate.request import GenerateRequest, LogitProcessor, Returns
from ...generate.sampling import DISTRIBUTION, SamplingParams
from ...servers.info import Features
from ...service.service import AsyncSGLang
from ..prompts.media import MEDIA_OPTIONS, Media, media_of, row_media
from ..prompts.read import Prompts

LogProbsMode = Literal["reported", "corrected", "strict"]
LOG_PROBS_MODES: tuple[LogProbsMode, ...] = ("reported", "corrected", "strict")

# What a row can say beside sampling options.
ROW_OPTIONS = ("action_mask", "lora", "session", "rid", *MEDIA_OPTIONS)

# Sampling options that change the text alone.
TEXT_OPTIONS = ("skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")


# What changes the distribution, and can't be had when a prompt is scored.
NOT_SCORED = (*DISTRIBUTION, "logit_bias", "min_new_tokens")


class BehaviourLogProbWarning(UserWarning):
    """The reported log-probs are not those of the distribution that was sampled from."""


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What holds for every row of a call, unless the row says otherwise.

    Attributes:
        sampling: how to sample.
        log_probs_mode: which log-probs come back, see `SGLangWrapper`; None reports and warns.
        return_log_probs: whether any come back.
        returns: what else comes back.
        processor: a change to the logits.
        lora: name of a LoRA adapter.
        partial_allowed: aborted rows come back as far as they got.
        fit_context: rows are asked for what fits into the context.
    """

    sampling: SamplingParams
    log_probs_mode: LogProbsMode | None
    return_log_probs: bool
    returns: Returns
    processor: LogitProcessor | None = None
    lora: str | None = None
    partial_allowed: bool = False
    fit_context: bool = True


def overlaid(options: CallOptions, kwargs: Mapping[str, Any]) -> CallOptions:
    """The options of a policy under those of one call, which are not checked yet."""
    own = dict(kwargs)
    lora = own.pop("lora", options.lora)
    processor = own.pop("processor", options.processor)
    sampling = options.sampling.updated(own, ("lora", "processor"))
    return replace(options, sampling=sampling, lora=lora, processor=processor)


def check_log_probs_mode(mode: Any) -> LogProbsMode | None:
    """Raises `ConfigError` for an unknown mode."""
    if mode is None or mode in LOG_PROBS_MODES:
        known: LogProbsMode | None = mode
        return known
    raise ConfigError(f"log_probs_mode must be one of {LOG_PROBS_MODES}, got {mode!r}.")


def check_log_probs(options: CallOptions) -> None:
    """Tells of log-probs that are not the behaviour policy's, or refuses them.

    Raises:
        UnsupportedOptionError: in strict mode, for a setting whose log-probs are not exact.
    """
    sampling = options.sampling
    if not options.return_log_probs or options.log_probs_mode in ("reported", "corrected"):
        return
    if options.log_probs_mode == "strict":
        inexact = [*sampling.truncates, *(["temperature=0"] if sampling.temperature == 0 else [])]
        if inexact:
            raise UnsupportedOptionError(
                f"log_probs_mode='strict' refuses {', '.join(inexact)}: the log-probs that SGLang "
                "reports are those before truncation, and of sampling where it is greedy. Use "
                "log_probs_mode='corrected', or sample from the whole distribution."
            )
    elif sampling.truncates:
        verb = "truncates" if len(sampling.truncates) == 1 else "truncate"
        warn(
            f"{', '.join(sampling.truncates)} {verb} the distribution that is sampled from, but "
            "the log-probs that SGLang reports are those before truncation: importance ratios "
            "computed from them are biased. Use log_probs_mode='corrected', or 'reported' if that "
            "is what you want.",
            BehaviourLogProbWarning,
        )


def check_scoring(sampling: SamplingParams, processor: Any = None) -> None:
    """Raises `UnsupportedOptionError` for an option that scoring can't follow.

    SGLang scores prompts at temperature 1, without penalties, biases, grammars or truncation.
    """
    neutral = SamplingParams()
    changed = [n for n in NOT_SCORED if getattr(sampling, n) != getattr(neutral, n)]
    if processor is not None:
        changed.append("processor")
    if changed:
        raise UnsupportedOptionError(
            f"generate=False scores at temperature 1 and can't follow {', '.join(changed)}: leave "
            "that out. To score at another temperature, use a TransformersWrapper."
        )


def make_requests(
    prompts: Prompts,
    row_options: Sequence[Mapping[str, Any]],
    options: CallOptions,
    service: AsyncSGLang,
) -> list[GenerateRequest]:
    """One request per prompt.

    Raises:
        ConfigError, InputError: an option that a row can't have; its note names the row.
    """
    features = service.info.features
    if options.log_probs_mode == "corrected":
        options = corrected(options, features)
    media = _media(prompts)
    plain: dict[str, Any] = {
        "sampling": options.sampling,
        "return_log_probs": options.return_log_probs,
        "returns": options.returns,
        "processor": options.processor,
        "lora": options.lora,
        "partial_allowed": options.partial_allowed,
        "fit_context": options.fit_context,
    }
    requests = []
    named = given_rids(row_options)
    for index, ids in enumerate(prompts.ids):
        fields = plain
        if row_options and row_options[index]:
            fields = _row_fields(row_options[index], options, features, media[index], index)
            fields |= named[index]
        elif media[index] is not None:
            fields = {**plain, "media": media[index]}
        if fields.get("session") is not None:
            request = _in_session(service, ids, fields, index)
        else:
            request = GenerateRequest(input_ids=tuple(ids), **fields)
        requests.append(request)
    return requests


def given_rids(row_options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The request ids that rows name, as fields of their requests; nothing where they name none.

    Raises:
        InputError: no id, or one that another row's begins with: SGLang would abort both.
    """
    rids = [row.get("rid") for row in row_options]
    for index, rid in enumerate(rids):
        if rid is not None and (not isinstance(rid, str) or not rid):
            raise InputError(f"row {index} has rid={rid!r:.100}: must be a string, not empty.")
    for one, other in itertools.pairwise(sorted(rid for rid in rids if rid is not None)):
        if other.startswith(one):
            raise InputError(
                f"two rows have rid={one!r} and rid={other!r}: none may begin with another's, or "
                "SGLang aborts both."
            )
    return [{} if rid is None else {"rid": rid} for rid in rids]


def _in_session(
    service: AsyncSGLang, ids: Sequence[int], fields: Mapping[str, Any], index: int
) -> GenerateRequest:
    try:
        return service.sessions.request(ids, **fields)
    except (ConfigError, InputError) as error:
        error.add_note(f"row {index} of the batch")
        raise


def _media(prompts: Prompts) -> Sequence[Media | None]:
    if prompts.chats is None:
        return [None] * len(prompts.ids)
    return [media_of(messages) for messages in prompts.chats]


def _row_fields(
    row: Mapping[str, Any],
    options: CallOptions,
    features: Features,
    media: Media | None,
    index: int,
) -> dict[str, Any]:
    """A row's own options, laid over the call's."""
    try:
        own = {k: v for k, v in row.items() if k not in ROW_OPTIONS}
        changed = options
        if own:
            sampling = options.sampling.updated(own, ROW_OPTIONS)
            changed = replace(options, sampling=sampling)
            check_row_sampling(sampling, options.sampling)
            check_log_probs(changed)
        if changed.log_probs_mode == "corrected":
            changed = corrected(changed, features)
        processor = options.processor
        if row.get("action_mask") is not None:
            mask = allowed_tokens(row["action_mask"])
            processor = mask if processor is None else combined(processor, mask)
        media = row_media(media, row)
        if media is not None and row.get("session") is not None:
            raise UnsupportedOptionError("a session is given with media: it holds tokens alone.")
    except (ConfigError, InputError) as error:
        error.add_note(f"row {index} of the batch")
        raise
    return {
        "sampling": changed.sampling,
        "return_log_probs": changed.return_log_probs,
        "returns": changed.returns,
        "processor": processor,
        "lora": row.get("lora", options.lora),
        "media": media,
        "session": row.get("session"),
        "partial_allowed": options.partial_allowed,
        "fit_context": options.fit_context,
    }


def check_row_sampling(row: SamplingParams, call: SamplingParams) -> None:
    """Raises `UnsupportedOptionError` for what can't differ from row to row."""
    if row.n != call.n:
        raise UnsupportedOptionError(
            f"a row has n={row.n}, the call {call.n}: every row of a batch has the same number of "
            "samples."
        )
    for name in TEXT_OPTIONS:
        if getattr(row, name) != getattr(call, name):
            raise UnsupportedOptionError(
                f"a row has {name}={getattr(row, name)!r}, the call {getattr(call, name)!r}: how "
                "text is written is the same for all rows of a batch."
            )


def corrected(options: CallOptions, features: Features) -> CallOptions:
    """Asks for the log-prob among the tokens kept, wherever that differs from the reported one.

    SGLang computes it only with a finite ``top_k``: without one, the largest that the servers take
    is set, and is accounted for like any other.
    """
    sampling = options.sampling
    if not options.return_log_probs or sampling.greedy or not sampling.truncates:
        return options  # greedy: probability 1, see `exact`
    if sampling.top_k == -1 and features.sampling_mask_tokens:
        sampling = replace(sampling, top_k=features.sampling_mask_tokens)
    return replace(options, sampling=sampling, returns=replace(options.returns, sampling_mask=True))


def read_row_options(td: TensorDictBase, key: NestedKey | None) -> list[dict[str, Any]]:
    """Each row's options under ``key``, which may differ from row to row; none: an empty list.

    Raises:
        InputError: something that does not hold one value per row.
    """
    if key is None:
        return []
    if isinstance(td, LazyStackedTensorDict):  # rows that lack the key, or options of others
        rows = [row.get(key, None) for row in td.unbind(0)]
        if all(options is None for options in rows):
            return []
    else:
        stacked = td.get(key, None)
        if stacked is None:
            return []
        if not _is_options(stacked) or stacked.batch_size[:1] != td.batch_size:
            raise InputError(_no_options(key, stacked))
        rows = stacked.unbind(0)
    for options in rows:
        if options is not None and not _is_options(options):
            raise InputError(_no_options(key, options))
    return [{} if options is None else _plain(options) for options in rows]


def _is_options(value: Any) -> bool:
    return is_tensor_collection(value) and not is_non_tensor(value)


def _no_options(key: NestedKey, given: Any) -> str:
    return (
        f"{key!r} should be a TensorDict of the input's batch size with one value per row, such "
        f"as {{'temperature': tensor of shape [batch]}}, got {given!r:.200}."
    )


def _plain(options: TensorDictBase) -> dict[str, Any]:
    """One row's options as Python values; masks stay tensors, and None is left out."""
    plain = {}
    for name in options.keys():  # noqa: SIM118  # iterating a TensorDict gives its rows
        value = options.get(name)
        if isinstance(value, torch.Tensor):
            value = value if name == "action_mask" else value.tolist()
        elif isinstance(value, NonTensorStack):
            value = value.tolist()
        else:
            value = getattr(value, "data", value)
        if value is not None:
            plain[name] = value
    return plain
