"""Renames sampling options from what users write: TorchRL's, vLLM's, Hugging Face's names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import UnsupportedOptionError

# Other backends' names for the same thing.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_generate_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_sequences": "stop",
    "seed": "sampling_seed",
    "num_return_sequences": "n",
    "num_samples": "n",
    "include_stop_str_in_output": "no_stop_trim",
}

# Every spelling of the number of samples.
SAMPLES = {"n"} | {name for name, meant in ALIASES.items() if meant == "n"}

# Known names that can't be served, with what to do instead.
REFUSED = {
    "num_beams": "SGLang samples; beam search gives no behaviour log-probs to train on.",
    "beam_width": "beam search gives no behaviour log-probs to train on.",
    "best_of": "sample n completions and choose among them.",
    "length_penalty": "it belongs to beam search, which is not supported.",
    "early_stopping": "it belongs to beam search, which is not supported.",
    "logprobs": "use SGLangWrapper(return_log_probs=...), or extras={'top_log_probs': k}.",
    "prompt_logprobs": "use SGLangWrapper(extras={'input_log_probs': True}).",
    "return_logprobs": "log-probs come back unless GenerateRequest(return_log_probs=False) or "
    "SGLangWrapper(return_log_probs=False) says otherwise.",
    "return_text": "use SGLangWrapper(text_key=None) to leave the text out.",
    "timeout": "give the service Timeouts(request_s=...).",
    "detokenize": "use SGLangWrapper(text_key=None) to leave the text out.",
    "custom_params": "use SGLangWrapper(processor=...), which carries a processor's parameters.",
    "stream_interval": "answers are not streamed; service.as_completed yields whole completions.",
    "watermark": "it changes the distribution that is sampled from, and no log-prob says how.",
    "bad_words": "use SGLangWrapper(processor=disallowed_tokens(ids)), or logit_bias.",
    "allowed_token_ids": "use SGLangWrapper(processor=allowed_tokens(ids)).",
}


def no_mapping(given: Any) -> str:
    """What to say of sampling options that are no mapping, such as another library's object."""
    return (
        "sampling options are SamplingParams or a mapping of names to values, such as "
        "{'max_new_tokens': 64, 'temperature': 1.0, 'top_p': 0.9}, and not a "
        f"{type(given).__name__}: write the options that it sets as such a mapping. Got "
        f"{given!r:.200}."
    )


def canonical(
    kwargs: Mapping[str, Any],
    known: set[str],
    temperature: float,
    others: Collection[str] = (),
) -> dict[str, Any]:
    """User names to field names; ``do_sample`` becomes a temperature.

    Args:
        kwargs: what the user wrote.
        known: names of the fields.
        temperature: the one that holds where ``kwargs`` gives none.
        others: what else can be said in the same place, for whom a name may be meant.

    Raises:
        UnsupportedOptionError: an unknown or unsupported name, or one given under two spellings.
    """
    result: dict[str, Any] = {}
    for given, value in kwargs.items():
        if not isinstance(given, str):
            raise UnsupportedOptionError(f"a sampling option's name is a string, got {given!r}.")
        if given == "do_sample":
            continue
        name = ALIASES.get(given, given)
        if name not in known:
            raise UnsupportedOptionError(unknown(given, known, others))
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


def unknown(name: str, known: set[str], others: Collection[str] = ()) -> str:
    """What to say of a name that is no field."""
    if name in REFUSED:
        return f"sampling option {name!r} is not supported: {REFUSED[name]}"
    near = difflib.get_close_matches(name, [*known, *ALIASES, "do_sample", *others], n=1)
    names = ", ".join(sorted({*known, *others}))
    hint = f" Did you mean {near[0]!r}?" if near else f" Known: {names}."
    return f"unknown sampling option {name!r}.{hint}"
