"""Rollouts that were aborted half-way: going on with them, and putting the parts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from .completions import Completion, VersionSpan
from .errors import ConfigError
from .protocol import GenerateRequest, new_rid

T = TypeVar("T")


def continuation(request: GenerateRequest, so_far: Completion) -> GenerateRequest:
    """The request that goes on where an aborted one stopped.

    Its prompt is the prompt and what was sampled; ``max_new_tokens`` and ``min_new_tokens`` count
    from the start of the first part.

    Raises:
        ConfigError: the completion was not aborted, or the request has no ids, or several samples.
    """
    if so_far.finish_type != "abort":
        raise ConfigError(f"request {so_far.rid} ended with {so_far.finish_type!r}: it is whole.")
    if request.input_ids is None or request.num_samples != 1:
        raise ConfigError("only requests of token ids with one sample can go on after an abort.")
    done = len(so_far.output_ids)
    sampling = request.sampling
    left = sampling.max_new_tokens - done
    if left < 1:
        raise ConfigError(f"request {so_far.rid} has its {sampling.max_new_tokens} tokens already.")
    return replace(
        request,
        input_ids=(*request.input_ids, *so_far.output_ids),
        sampling=replace(
            sampling, max_new_tokens=left, min_new_tokens=max(0, sampling.min_new_tokens - done)
        ),
        rid=new_rid(),
    )


def joined(before: Completion, after: Completion) -> Completion:
    """One completion of two parts, each with its own log-probs and versions.

    Raises:
        ConfigError: one has log-probs and the other has none.
    """
    if (before.log_probs is None) != (after.log_probs is None):
        raise ConfigError("one part has log-probs and the other has none: ask for both alike.")
    shift = len(before.output_ids)
    moved = [
        VersionSpan(version=span.version, start=span.start + shift, end=span.end + shift)
        for span in after.version_spans
    ]
    return replace(
        after,
        output_ids=[*before.output_ids, *after.output_ids],
        log_probs=_both(before.log_probs, after.log_probs),
        sampling_mask=_both(before.sampling_mask, after.sampling_mask),
        sampling_log_probs=_both(before.sampling_log_probs, after.sampling_log_probs),
        top_log_probs=_both(before.top_log_probs, after.top_log_probs),
        text=None,
        prompt_tokens=before.prompt_tokens,
        input_log_probs=before.input_log_probs,
        version_spans=tuple(
            span for span in (*before.version_spans, *moved) if span.end > span.start
        ),
    )


def _both(before: Sequence[T] | None, after: Sequence[T] | None) -> list[T] | None:
    return None if before is None or after is None else [*before, *after]
