"""What a server can do for generation, and the refusal of what it can't, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedOptionError
from .protocol import GenerateRequest

# SGLang's own default of --sampling-mask-max-tokens.
DEFAULT_MASK_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a server was started with, as far as requests depend on it.

    Attributes:
        tokenizer: it has one: text, stop strings and grammars work.
        deterministic: requests with one seed come out identical.
        sampling_mask_tokens: most ids of a sampling mask; 0 where the server has none.
        hidden_states: it returns hidden states.
        routed_experts: it returns the experts of a mixture of experts.
        processors: it runs custom logit processors.
        lora: it runs LoRA adapters.
        max_adapters: how many it holds at once; None: any number.
        sessions: it holds sessions.
        images, audio: the model understands them.
        eos_ids: ids at which a row ends by itself; None where nothing tells.
    """

    tokenizer: bool = True
    deterministic: bool = False
    sampling_mask_tokens: int = 0
    hidden_states: bool = False
    routed_experts: bool = False
    processors: bool = False
    lora: bool = False
    max_adapters: int | None = None
    sessions: bool = False
    images: bool = False
    audio: bool = False
    eos_ids: tuple[int, ...] | None = None

    def check(self, request: GenerateRequest) -> None:
        """Raises `UnsupportedOptionError` for a request that this server would refuse, or worse.

        SGLang ignores media for a model without eyes, and routed experts that it does not keep.
        """
        if not self.tokenizer:
            self._check_without_tokenizer(request)
        if self.deterministic and request.sampling.min_p > 0:
            raise UnsupportedOptionError(MIN_P)
        returns, media = request.returns, request.media
        for asked, offered, what in (
            (returns.hidden_states, self.hidden_states, HIDDEN_STATES),
            (returns.routed_experts, self.routed_experts, ROUTED_EXPERTS),
            (request.processor is not None, self.processors, PROCESSORS),
            (request.lora is not None, self.lora, LORA),
            (request.session is not None, self.sessions, SESSIONS),
            (media is not None and bool(media.images or media.videos), self.images, IMAGES),
            (media is not None and bool(media.audios), self.audio, AUDIO),
            (media is not None and returns.input_log_probs, False, MEDIA_LOG_PROBS),
            (media is not None and returns.routed_experts, False, MEDIA_EXPERTS),
        ):
            if asked and not offered:
                raise UnsupportedOptionError(what)
        if returns.sampling_mask:
            self._check_sampling_mask(request)

    def check_openai(self) -> None:
        """Raises `UnsupportedOptionError` where chats and texts can't be served."""
        if not self.tokenizer:
            raise UnsupportedOptionError(OPENAI)

    def _check_without_tokenizer(self, request: GenerateRequest) -> None:
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

    def _check_sampling_mask(self, request: GenerateRequest) -> None:
        most, top_k = self.sampling_mask_tokens, request.sampling.top_k
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


OPENAI = (
    "chats and texts of OpenAI's clients need the servers' tokenizer, which these run without "
    "(skip_tokenizer_init): start them with it, or generate from ids, with service.generate or "
    "SGLangWrapper, which has a tokenizer of its own."
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


def parse_features(
    server_info: Mapping[str, Any],
    model_info: Mapping[str, Any],
    *,
    fields: frozenset[str],
    routes: frozenset[str],
) -> Features:
    """Reads ``/server_info`` and ``/model_info``.

    Args:
        server_info: how the server was started.
        model_info: what it serves.
        fields: of its ``/generate``; empty where it does not list them.
        routes: that it has.
    """
    has_mask = "return_sampling_mask" in fields
    mask_tokens = server_info.get("sampling_mask_max_tokens") or DEFAULT_MASK_TOKENS
    return Features(
        tokenizer=not server_info.get("skip_tokenizer_init"),
        deterministic=bool(
            server_info.get("enable_deterministic_inference")
            or server_info.get("rl_on_policy_target")
        ),
        sampling_mask_tokens=mask_tokens if has_mask else 0,
        # SGLang before 0.5.17, which has no masks either, cuts a batch's states by whole prompts,
        # as if no prefix of them had been cached.
        hidden_states=bool(server_info.get("enable_return_hidden_states"))
        and (has_mask or bool(server_info.get("disable_radix_cache"))),
        routed_experts=bool(server_info.get("enable_return_routed_experts")),
        processors=bool(server_info.get("enable_custom_logit_processor")),
        lora=bool(server_info.get("enable_lora")),
        max_adapters=server_info.get("max_loaded_loras"),
        sessions="/open_session" in routes,
        images=bool(model_info.get("has_image_understanding")),
        audio=bool(model_info.get("has_audio_understanding")),
    )
