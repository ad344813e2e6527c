"""Makes the request that goes on with a rollout which was aborted half-way."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError, UnsupportedOptionError
from .completion import Completion
from .request import GenerateRequest, new_rid
from .sampling import SamplingParams


def continuation(request: GenerateRequest, so_far: Completion) -> GenerateRequest:
    """The request that goes on where an aborted one stopped.

    Its prompt is the prompt and what was sampled; ``max_new_tokens`` and ``min_new_tokens`` count
    from the start of the first part, and `progress_temperature` goes on from where it was.

    Raises:
        ConfigError: the completion was not aborted, or the request has no ids, or several samples.
        UnsupportedOptionError: there are tokens, and a grammar, a penalty, a stop string or regular
            expression, or a processor of a user's own class: SGLang would begin these again.
    """
    if so_far.finish_type != "abort":
        raise ConfigError(f"request {so_far.rid} ended with {so_far.finish_type!r}: it is whole.")
    if request.input_ids is None or request.num_samples != 1:
        raise ConfigError("only requests of token ids with one sample can go on after an abort.")
    done = len(so_far.output_ids)
    return replace(
        request,
        input_ids=(*request.input_ids, *so_far.output_ids),
        sampling=sampling_left(request.sampling, done),
        processor=None if request.processor is None else request.processor.after(done),
        rid=new_rid(),
    )


def sampling_left(
    sampling: SamplingParams, done: int, *, stops_matched: bool = False
) -> SamplingParams:
    """How to sample on after ``done`` tokens; limits count from the first of them.

    Args:
        sampling: how the first of them were sampled.
        done: how many there are.
        stops_matched: the caller looks for stop strings that begin in one part and end in the next.

    Raises:
        ConfigError: there are as many as there may be.
        UnsupportedOptionError: a grammar, or what else SGLang would begin again.
    """
    left = sampling.max_new_tokens - done
    if left < 1:
        raise ConfigError(
            f"a completion was aborted after {done} tokens, and max_new_tokens="
            f"{sampling.max_new_tokens} counts from its start: give a larger one."
        )
    if sampling.grammar is not None and done > 0:
        raise UnsupportedOptionError(
            f"a completion with {sampling.grammar} was aborted after {done} tokens: it can't go on "
            "from there, since the grammar would begin again. Generate it anew."
        )
    forgotten = _forgotten(sampling, stops_matched)
    if forgotten and done > 0:
        raise UnsupportedOptionError(
            f"a completion with {', '.join(forgotten)} was aborted after {done} tokens: it can't "
            "go on from there: these tokens are then part of the prompt, where SGLang neither "
            "penalises them nor looks for a stop. Generate it anew, or go on without "
            f"{', '.join(forgotten)}."
        )
    fewest = max(0, sampling.min_new_tokens - done)
    return replace(sampling, max_new_tokens=left, min_new_tokens=fewest)


def _forgotten(sampling: SamplingParams, stops_matched: bool) -> list[str]:
    """Options that depend on all tokens sampled so far."""
    active = {
        "frequency_penalty": sampling.frequency_penalty != 0,
        "presence_penalty": sampling.presence_penalty != 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "stop": bool(sampling.stop) and not stops_matched,
        "stop_regex": bool(sampling.stop_regex),
    }
    return [name for name, on in active.items() if on]
