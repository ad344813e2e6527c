"""Sampling parameters: the names that users write, and what SGLang is sent."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import UnsupportedOptionError

# Other backends' names for the same thing: TorchRL's common names, vLLM's, Hugging Face's.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_generate_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_sequences": "stop",
    "seed": "sampling_seed",
}

# Known names that a single request can't serve, with what to do instead.
REFUSED = {
    "n": "one prompt gives one completion for now; repeat the prompt in the batch.",
    "num_return_sequences": "one prompt gives one completion for now; repeat the prompt.",
    "num_beams": "SGLang samples; beam search gives no behaviour log-probs to train on.",
    "length_penalty": "it belongs to beam search, which is not supported.",
    "early_stopping": "it belongs to beam search, which is not supported.",
    "logprobs": "use SGLangWrapper(return_log_probs=...).",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled. Every field is sent, so no server-side default applies silently.

    Attributes:
        max_new_tokens: most tokens to generate, >= 1.
        min_new_tokens: fewest tokens before a stop is allowed.
        temperature: 0 is greedy; reported log-probs are those after the temperature.
        top_p: nucleus mass in (0, 1]; NOT reflected in the reported log-probs.
        top_k: number of candidates, -1 for all; NOT reflected in the reported log-probs.
        min_p: smallest probability relative to the most likely token; NOT reflected.
        repetition_penalty: 1 is off; included in the reported log-probs.
        frequency_penalty: 0 is off; included in the reported log-probs.
        presence_penalty: 0 is off; included in the reported log-probs.
        stop: strings that end the generation; their tokens are kept in ``output_ids``.
        stop_token_ids: token ids that end the generation, beside the model's EOS.
        ignore_eos: go on past EOS.
        sampling_seed: seed of this request; used where the server runs deterministically.

    Source: SGLang's ``sampling/sampling_params.py``.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop))
        ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        for name, (valid, rule) in _RULES.items():
            value = getattr(self, name)
            if not _holds(valid, value):
                raise UnsupportedOptionError(f"{name}={value!r}: must be {rule}.")
        if self.min_new_tokens > self.max_new_tokens:
            raise UnsupportedOptionError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens="
                f"{self.max_new_tokens}."
            )

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any] | None) -> SamplingParams:
        """Builds the parameters from a user's dictionary.

        Args:
            kwargs: names of SGLang, TorchRL, vLLM or Hugging Face, and their values.

        Raises:
            UnsupportedOptionError: an unknown name (with the nearest known one), a name given
                twice under two spellings, or a value out of range.
        """
        return cls().updated(kwargs or {})

    def updated(self, kwargs: Mapping[str, Any]) -> SamplingParams:
        """These parameters with ``kwargs`` laid over them; errors as in `from_kwargs`."""
        return replace(self, **_canonical(kwargs, self.temperature))

    def body(self) -> dict[str, Any]:
        """The ``sampling_params`` object of SGLang's ``/generate``."""
        sent = {f.name: getattr(self, f.name) for f in fields(self)}
        sent["stop"] = list(self.stop) or None
        sent["stop_token_ids"] = list(self.stop_token_ids) or None
        return sent

    @property
    def truncates(self) -> tuple[str, ...]:
        """The active settings that the reported log-probs do not reflect."""
        active = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        return tuple(name for name, on in active.items() if on and self.temperature > 0)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """One string, a sequence or None, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(value)
    raise UnsupportedOptionError(f"{name}={value!r}: must be a sequence.")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _holds(rule: Any, value: Any) -> bool:
    return bool(rule(value))


_RULES: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (lambda v: _count(v) and v >= 1, "an integer >= 1"),
    "min_new_tokens": (lambda v: _count(v) and v >= 0, "an integer >= 0"),
    "temperature": (lambda v: _number(v) and v >= 0, "a number >= 0"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "top_k": (lambda v: _count(v) and (v == -1 or v >= 1), "an integer >= 1, or -1 for all"),
    "min_p": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "repetition_penalty": (lambda v: _number(v) and 0 < v <= 2, "a number in (0, 2]"),
    "frequency_penalty": (lambda v: _number(v) and -2 <= v <= 2, "a number in [-2, 2]"),
    "presence_penalty": (lambda v: _number(v) and -2 <= v <= 2, "a number in [-2, 2]"),
    "stop": (lambda v: all(isinstance(s, str) and s for s in v), "non-empty strings"),
    "stop_token_ids": (lambda v: all(_count(i) and i >= 0 for i in v), "integers >= 0"),
    "ignore_eos": (lambda v: isinstance(v, bool), "True or False"),
    "sampling_seed": (
        lambda v: v is None or (_count(v) and abs(v) < 2**63),
        "an integer of 64 bits or None",
    ),
}


def _canonical(kwargs: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """User names to field names; ``do_sample`` becomes a temperature."""
    known = {f.name for f in fields(SamplingParams)}
    result: dict[str, Any] = {}
    for given, value in kwargs.items():
        if given == "do_sample":
            continue
        name = ALIASES.get(given, given)
        if name not in known:
            raise UnsupportedOptionError(_unknown(given, known))
        if name in result:
            raise UnsupportedOptionError(f"{given!r} and another spelling of {name!r} are given.")
        result[name] = value
    if "do_sample" in kwargs:
        _apply_do_sample(kwargs["do_sample"], result, temperature)
    return result


def _apply_do_sample(do_sample: Any, result: dict[str, Any], temperature: float) -> None:
    """Hugging Face's switch: False is temperature 0; True must not meet a temperature of 0."""
    if not isinstance(do_sample, bool):
        raise UnsupportedOptionError(f"do_sample={do_sample!r}: must be True or False.")
    if do_sample and result.get("temperature", temperature) == 0:
        raise UnsupportedOptionError(
            "do_sample=True, but the temperature is 0, which is greedy: give a temperature above 0."
        )
    if not do_sample:
        if result.get("temperature", 0) != 0:
            raise UnsupportedOptionError(
                f"do_sample=False is greedy, but temperature={result['temperature']!r} is given: "
                "leave one out."
            )
        result["temperature"] = 0.0


def _unknown(name: str, known: set[str]) -> str:
    if name in REFUSED:
        return f"sampling option {name!r} is not supported: {REFUSED[name]}"
    near = difflib.get_close_matches(name, [*known, *ALIASES, "do_sample"], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
    return f"unknown sampling option {name!r}.{hint}"
