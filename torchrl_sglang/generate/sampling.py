"""Checks sampling parameters when they are made, and writes what SGLang is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..config import is_number
from ..errors import ConfigError, UnsupportedOptionError
from .sampling_names import canonical, no_mapping

# Sent only where they are set: older servers do not know all of them.
OPTIONAL = (
    "stop",
    "stop_token_ids",
    "stop_regex",
    "regex",
    "json_schema",
    "ebnf",
    "structural_tag",
    "logit_bias",
    "sampling_seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
)
GRAMMARS = ("regex", "json_schema", "ebnf", "structural_tag")
# What tokens are sampled from, biases aside.
DISTRIBUTION = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "regex",
    "json_schema",
    "ebnf",
    "structural_tag",
)
# SGLang's own bounds on what it matches while it generates.
MAX_STOPS = 32
MAX_STOP_REGEX_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled.

    Whatever has a default here is sent too, so that no default of a server or of a model's
    ``generation_config`` applies in silence.

    Attributes:
        max_new_tokens: most tokens to generate, >= 1.
        min_new_tokens: fewest tokens before EOS or a stop token is allowed.
        temperature: 0 is greedy; reported log-probs are those after the temperature, and at
            temperature 1 where it is greedy.
        top_p: nucleus mass in (0, 1]; see ``log_probs_mode`` of `SGLangWrapper`.
        top_k: number of candidates, -1 for all; see ``log_probs_mode``. 1 is greedy, and is sent as
            temperature 0: else the reported log-probs would depend on the batch's other requests.
        min_p: smallest probability relative to the most likely token; see ``log_probs_mode``.
        repetition_penalty: 1 is off; included in the reported log-probs.
        frequency_penalty: 0 is off; included in the reported log-probs.
        presence_penalty: 0 is off; included in the reported log-probs.
        logit_bias: what is added to the logits of token ids; included in the reported log-probs.
        stop: strings that end the generation; their tokens are kept in ``output_ids``.
        stop_token_ids: token ids that end the generation, beside the model's EOS.
        stop_regex: regular expressions that end the generation.
        ignore_eos: go on past EOS; not with ``stop_token_ids``, which SGLang would pass too.
        regex: a regular expression that the text must match.
        json_schema: a JSON schema that the text must match, as a mapping or as JSON.
        ebnf: a grammar in EBNF that the text must match.
        structural_tag: SGLang's structural tags, as a mapping or as JSON.
        n: completions of each prompt.
        sampling_seed: seed; used where the server runs deterministically. Sample ``i`` of a prompt
            gets ``sampling_seed + i``.
        skip_special_tokens: leave special tokens out of the text. None: the server does in its
            text, `SGLangWrapper` does not, as TorchRL's wrappers.
        spaces_between_special_tokens: as in Hugging Face's tokenizers; None: their default.
        no_stop_trim: keep the stop at the end of the text; None as above. Tokens always keep it.

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
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    ebnf: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    n: int = 1
    sampling_seed: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        object.__setattr__(self, "logit_bias", _as_biases(self.logit_bias))
        for name in ("stop", "stop_token_ids", "stop_regex"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for name in ("json_schema", "structural_tag"):
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        for name, (valid, rule) in _RULES.items():
            value = getattr(self, name)
            if not _holds(valid, value):
                raise UnsupportedOptionError(f"{name}={value!r}: must be {rule}.")
        if self.min_new_tokens > self.max_new_tokens:
            raise UnsupportedOptionError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens="
                f"{self.max_new_tokens}."
            )
        if self.ignore_eos and self.stop_token_ids:
            raise UnsupportedOptionError(
                "stop_token_ids with ignore_eos=True: SGLang then goes on past these too. Give one "
                "of the two; logit_bias={eos: -100.0} keeps EOS away as well."
            )
        grammars = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(grammars) > 1:
            raise UnsupportedOptionError(f"{' and '.join(grammars)} are given: choose one.")

    @classmethod
    def of(cls, given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
        """Parameters as they are, a user's dictionary, or nothing; errors as in `from_kwargs`."""
        return given if isinstance(given, SamplingParams) else cls.from_kwargs(given)

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any] | None) -> SamplingParams:
        """Builds the parameters from a user's dictionary.

        Args:
            kwargs: names of SGLang, TorchRL, vLLM or Hugging Face, and their values.

        Raises:
            ConfigError: no mapping.
            UnsupportedOptionError: an unknown name (with the nearest known one), a name given
                twice under two spellings, or a value out of range.
        """
        return cls().updated({} if kwargs is None else kwargs)

    def updated(self, kwargs: Mapping[str, Any], others: Collection[str] = ()) -> SamplingParams:
        """These parameters with ``kwargs`` laid over them; errors as in `from_kwargs`.

        ``others`` names what else can be said in the same place: an error offers it too.
        """
        if not isinstance(kwargs, Mapping):
            raise ConfigError(no_mapping(kwargs))
        known = {f.name for f in fields(self)}
        return replace(self, **canonical(kwargs, known, self.temperature, others))

    def body(self) -> dict[str, Any]:
        """The ``sampling_params`` object of SGLang's ``/generate``."""
        sent = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in OPTIONAL:
            if sent[name] is None or sent[name] == ():
                del sent[name]
        if self.logit_bias is not None:
            sent["logit_bias"] = {str(i): bias for i, bias in self.logit_bias.items()}
        if self.n == 1:
            del sent["n"]
        if self.greedy:
            sent["temperature"] = 0.0
        return sent

    @property
    def max_tokens(self) -> int:
        """``max_new_tokens``, under the name that vLLM has for it."""
        return self.max_new_tokens

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with probability 1."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def truncates(self) -> tuple[str, ...]:
        """The active settings that the reported log-probs do not reflect."""
        active = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        return tuple(name for name, on in active.items() if on and self.temperature > 0)

    @property
    def grammar(self) -> str | None:
        """Name of the option that constrains the text, if one does."""
        return next((name for name in GRAMMARS if getattr(self, name) is not None), None)


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """One string, a sequence or None, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(plain(each) for each in value)
    raise UnsupportedOptionError(f"{name}={value!r}: must be a sequence.")


def _as_biases(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {plain(token_id): plain(bias) for token_id, bias in value.items()}


def _as_json(name: str, value: Any) -> str | None:
    """A mapping, or text that is JSON already, as JSON."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            json.loads(value)
            return value
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UnsupportedOptionError(f"{name}={value!r:.200}: is no JSON ({error}).") from error


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Whether it can be sent: a string without lone surrogates, which are no characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: object) -> bool:
    return value is None or (is_text(value) and bool(value))


def _strings(value: Any) -> bool:
    return len(value) <= MAX_STOPS and all(is_text(s) and s for s in value)


def _stop_regex(pattern: str) -> bool:
    """SGLang compiles these with Python's own ``re``, and answers 500 where that fails."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return len(pattern.encode()) <= MAX_STOP_REGEX_LENGTH


def _biases(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(
        _count(token_id) and token_id >= 0 and is_number(bias) for token_id, bias in value.items()
    )


def _holds(rule: Any, value: Any) -> bool:
    return bool(rule(value))


_FLAG = (lambda v: isinstance(v, bool), "True or False")
_CHOICE = (lambda v: v is None or isinstance(v, bool), "True, False or None")
_GRAMMAR = (_text, "a non-empty string of Unicode characters or None")
_RULES: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (lambda v: _count(v) and v >= 1, "an integer >= 1"),
    "min_new_tokens": (lambda v: _count(v) and v >= 0, "an integer >= 0"),
    "temperature": (lambda v: is_number(v) and v >= 0, "a number >= 0"),
    "top_p": (lambda v: is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "top_k": (lambda v: _count(v) and (v == -1 or v >= 1), "an integer >= 1, or -1 for all"),
    "min_p": (lambda v: is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "repetition_penalty": (lambda v: is_number(v) and 0 < v <= 2, "a number in (0, 2]"),
    "frequency_penalty": (lambda v: is_number(v) and -2 <= v <= 2, "a number in [-2, 2]"),
    "presence_penalty": (lambda v: is_number(v) and -2 <= v <= 2, "a number in [-2, 2]"),
    "logit_bias": (_biases, "a mapping of token ids to numbers, such as {42: -5.0}, or None"),
    "stop": (_strings, f"at most {MAX_STOPS} non-empty strings of Unicode characters"),
    "stop_token_ids": (lambda v: all(_count(i) and i >= 0 for i in v), "integers >= 0"),
    "stop_regex": (
        lambda v: _strings(v) and all(map(_stop_regex, v)),
        f"at most {MAX_STOPS} regular expressions of at most {MAX_STOP_REGEX_LENGTH} bytes",
    ),
    "ignore_eos": _FLAG,
    "regex": _GRAMMAR,
    "json_schema": _GRAMMAR,
    "ebnf": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "n": (lambda v: _count(v) and v >= 1, "an integer >= 1"),
    "sampling_seed": (
        lambda v: v is None or (_count(v) and abs(v) < 2**62),
        "an integer of 62 bits or None",
    ),
    "skip_special_tokens": _CHOICE,
    "spaces_between_special_tokens": _CHOICE,
    "no_stop_trim": _CHOICE,
}
