"""Refuses requests that the servers can't serve, by name, before anything is sent.

SGLang up to 0.5.23 checks neither a prompt's ids, nor stop ids, nor how many log-probs are asked
for: one request beyond the vocabulary ends the whole server, and every request that it holds.
Needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError, UnsupportedOptionError
from ..servers.info import Features
from .request import GenerateRequest


def check_features(request: GenerateRequest, features: Features) -> None:
    """Raises `UnsupportedOptionError` for a request that a server would refuse, or worse.

    SGLang ignores media for a model without eyes, and routed experts that it does not keep.
    """
    if not features.tokenizer:
        _check_without_tokenizer(request)
    if features.deterministic and request.sampling.min_p > 0:
        raise UnsupportedOptionError(MIN_P)
    returns, media = request.returns, request.media
    for asked, offered, what in (
        (returns.hidden_states, features.hidden_states, HIDDEN_STATES),
        (returns.routed_experts, features.routed_experts, ROUTED_EXPERTS),
        (request.processor is not None, features.processors, PROCESSORS),
        (request.lora is not None, features.lora, LORA),
        (request.session is not None, features.sessions, SESSIONS),
        (media is not None and bool(media.images or media.videos), features.images, IMAGES),
        (media is not None and bool(media.audios), features.audio, AUDIO),
        (media is not None and returns.input_log_probs, False, MEDIA_LOG_PROBS),
        (media is not None and returns.routed_experts, False, MEDIA_EXPERTS),
    ):
        if asked and not offered:
            raise UnsupportedOptionError(what)
    if returns.sampling_mask:
        _check_sampling_mask(request, features.sampling_mask_tokens)


def _check_without_tokenizer(request: GenerateRequest) -> None:
    sampling = request.sampling
    needs = {
        "text": request.text is not None,
        "stop": bool(sampling.stop),
        "stop_regex": bool(sampling.stop_regex),
        sampling.grammar or "": sampling.grammar is not None,
    }
    asked = [name for name, given in needs.items() if given]
    if asked:
        raise UnsupportedOptionError(
            f"{', '.join(asked)} needs the server's tokenizer, which this one runs without "
            "(skip_tokenizer_init): send token ids, use stop_token_ids, or start the servers "
            "with their tokenizer. Stop strings SGLangWrapper matches itself, but not in "
            "sessions, with routed experts, in resume or without a tokenizer of its own."
        )


def _check_sampling_mask(request: GenerateRequest, most: int) -> None:
    top_k = request.sampling.top_k
    if request.processor is not None:
        raise UnsupportedOptionError(
            "SGLang gives no sampling mask beside a logit processor: with one, use neither "
            "extras={'sampling_mask': True} nor log_probs_mode='corrected' where something "
            "truncates."
        )
    if most == 0:
        raise UnsupportedOptionError(
            "this version of SGLang returns no sampling mask, which log_probs_mode='corrected' "
            "and extras={'sampling_mask': True} need; SGLang 0.5.17 and later do."
        )
    if request.sampling.temperature > 0 and not 1 <= top_k <= most:
        raise UnsupportedOptionError(
            f"a sampling mask needs a top_k from 1 to {most}, got {top_k}: choose one, or "
            "start the servers with a larger sampling_mask_max_tokens."
        )


MIN_P = (
    "min_p is given, but servers that sample deterministically end where one request has it: use "
    "top_p, or start them without enable_deterministic_inference."
)
HIDDEN_STATES = (
    "hidden states are asked for, which the servers don't return: start them with "
    "enable_return_hidden_states=True. SGLang before 0.5.17 needs disable_radix_cache=True too: it "
    "mixes up the states of prompts with a cached prefix."
)
ROUTED_EXPERTS = (
    "routed experts are asked for, which the servers don't return: that needs a mixture-of-experts "
    "model, and enable_return_routed_experts=True when they are started."
)
PROCESSORS = (
    "a logit processor or an action mask is given, but the servers run none: start them with "
    "enable_custom_logit_processor=True."
)
LORA = (
    "a LoRA adapter is named, but the servers run none: start them with enable_lora=True, "
    "max_lora_rank=... and lora_target_modules=[...]."
)
SESSIONS = "a session is given, but the servers hold none: they have no /open_session route."
IMAGES = "images or videos are given, but the model that is served reads text only."
AUDIO = "audio is given, but the model that is served does not hear."
MEDIA_LOG_PROBS = (
    "input_log_probs are asked for with images, videos or audio: SGLang puts tokens of its own in "
    "the places of their placeholders, so the log-probs would not belong to the prompt's ids. "
    "Leave one of the two out, or score with the trainer's model."
)
MEDIA_EXPERTS = (
    "routed experts are asked for with images, videos or audio: SGLang puts tokens of its own in "
    "the places of their placeholders, so the experts would not belong to the prompt's ids."
)


def check_ids(batch: Sequence[GenerateRequest], size: int | None) -> None:
    """Raises for ids outside of a vocabulary of ``size`` ids; None: it is not known.

    Raises:
        InputError: an id of a prompt. With media only a negative one: the placeholders of some
            models lie beyond the vocabulary.
        UnsupportedOptionError: a stop id, a biased id, or more log-probs than there are ids.
    """
    for index, request in enumerate(batch):
        ids = request.input_ids or (0,)
        lowest, highest = min(ids), max(ids)
        beyond = size is not None and highest >= size and request.media is None
        if lowest < 0 or beyond:
            wrong = lowest if lowest < 0 else highest
            known = "" if size is None else f", which has ids from 0 to {size - 1}"
            raise InputError(
                f"prompt {index} has the id {wrong}, at position {ids.index(wrong)}: it is outside "
                f"of the model's vocabulary{known}. Was it made with another tokenizer, or padded?"
            )
        if size is not None:
            _check_options(index, request, size)


def _check_options(index: int, request: GenerateRequest, size: int) -> None:
    sampling, asked = request.sampling, request.returns.top_log_probs
    for name, ids in (
        # Also without min_new_tokens: another request of the server's batch may have it.
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias or ()),
    ):
        wrong = max(ids, default=0)
        if wrong >= size:
            raise UnsupportedOptionError(
                f"prompt {index}: {name} has the id {wrong}, which is outside of the model's "
                f"vocabulary: it has ids from 0 to {size - 1}."
            )
    if asked > size:
        raise UnsupportedOptionError(
            f"prompt {index}: top_log_probs={asked}, but the model's vocabulary has {size} ids."
        )
