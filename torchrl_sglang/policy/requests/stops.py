"""Matches stop strings that servers don't see, on what the sampled ids say.

A server without a tokenizer can't stop at a string, and none does at one that began before the
request was aborted. So it generates on, to EOS or to ``max_new_tokens``, and what comes after the
stop is dropped: the tokens are exactly those of a server that stops, and the time for those behind
them is lost.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...generate.completion import Completion, cut
from ...generate.request import GenerateRequest
from ...servers.info import Features
from ..outputs.texts import decode

Stops = Sequence[tuple[str, ...]]


def take_over(
    requests: list[GenerateRequest], features: Features, tokenizer: Any
) -> tuple[list[GenerateRequest], Stops]:
    """Requests without the stop strings that are to be matched here, and these for each request.

    None are taken over where the server matches them itself. Sessions, which would keep the tokens
    that are dropped, and routed experts are left to be refused.
    """
    if features.tokenizer or tokenizer is None:
        return requests, []
    stops = [
        () if r.session is not None or r.returns.routed_experts else r.sampling.stop
        for r in requests
    ]
    if not any(stops):
        return requests, []
    return [
        replace(r, sampling=replace(r.sampling, stop=())) if own else r
        for r, own in zip(requests, stops, strict=True)
    ], stops


def cut_at_stops(
    completions: Sequence[Completion],
    requests: Sequence[GenerateRequest],
    stops: Stops,
    tokenizer: Any,
) -> Sequence[Completion]:
    """Every completion up to the token that completes one of its request's stop strings."""
    if not stops:
        return completions
    each = [own for r, own in zip(requests, stops, strict=True) for _ in range(r.num_samples)]
    return [cut_after(0, c, own, tokenizer) for c, own in zip(completions, each, strict=True)]


def cut_after(
    done: int, completion: Completion, stops: tuple[str, ...], tokenizer: Any
) -> Completion:
    """A completion up to the token that completes a stop string; the first ``done`` do not."""
    ids = completion.output_ids

    def found(length: int) -> str | None:
        text = decode([ids[:length]], tokenizer)[0]
        return next((stop for stop in stops if stop in text), None)

    if not stops or found(len(ids)) is None or (done and found(done) is not None):
        return completion
    # What is in the text of some tokens is in that of more of them.
    lengths = range(done + 1, len(ids) + 1)
    length = lengths[bisect.bisect_left(lengths, True, key=lambda n: found(n) is not None)]
    return replace(
        cut(completion, length), finish_type="stop", matched_stop=found(length), text=None
    )
