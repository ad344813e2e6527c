"""What comes back for a request, and its algebra: cut, put together, versions per token.

A new field with one value per sampled token goes into `Completion`, `PER_TOKEN` and `parse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError
from ..servers.info import INITIAL_VERSION
from .experts import joined_routes

FinishType = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """The weights that sampled ``output_ids[start:end]``."""

    version: str
    start: int
    end: int

    def shifted(self, by: int) -> VersionSpan:
        """The same of tokens that stand ``by`` later."""
        return replace(self, start=self.start + by, end=self.end + by)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for one sample of one request.

    Attributes:
        rid: id under which the server ran it.
        output_ids: sampled token ids, the EOS or stop token included.
        log_probs: log-prob of each sampled token after temperature and penalties, same length;
            None if they were not asked for.
        text: the server's own decoding, without the stop; None from a server without a tokenizer.
        finish_type: ``"stop"`` (EOS or a stop), ``"length"``, or ``"abort"`` where the request
            allows partial answers.
        matched_stop: the stop string or token id that ended it; None for a regular expression,
            whose match stays in the text.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, how many the prefix cache had.
        version_spans: the weights behind each part of ``output_ids``; one span that covers all
            from servers that report one version per request.
        latency_s: seconds from arrival to the end, as the server measured it; None if it did not.
        input_log_probs: log-prob of each prompt token at temperature 1, NaN for the first.
        top_log_probs: per sampled token, pairs of log-prob and id, the most likely first.
        sampling_mask: per sampled token, the ids that top-k, top-p and min-p kept.
        sampling_log_probs: log-prob of each sampled token among the ids kept.
        hidden_states: the prompt's rows first, without those of a cached prefix, of which the last
            is what the first token was sampled from; then one row per further token.
        routed_experts: base64 of int32 ``[tokens, layers, top_k]``, of all tokens but the last; -1
            for tokens that were computed anew under other weights than those that sampled them.
    """

    rid: str
    output_ids: list[int]
    log_probs: list[float] | None
    text: str | None
    finish_type: FinishType
    matched_stop: str | int | None
    prompt_tokens: int
    cached_tokens: int
    version_spans: tuple[VersionSpan, ...]
    latency_s: float | None = None
    input_log_probs: list[float] | None = None
    top_log_probs: Sequence[Sequence[tuple[float, int]]] | None = None
    sampling_mask: list[list[int]] | None = None
    sampling_log_probs: list[float] | None = None
    hidden_states: list[Any] | None = None
    routed_experts: str | None = None

    @property
    def finish_reason(self) -> str:
        """Same as ``finish_type``."""
        return self.finish_type

    @property
    def weight_version(self) -> str | None:
        """The version that sampled the last token, or scored the prompt; None: it never ran."""
        return self.version_spans[-1].version if self.version_spans else None


# What has one value per sampled token.
PER_TOKEN = ("output_ids", "log_probs", "top_log_probs", "sampling_mask", "sampling_log_probs")


def cut(completion: Completion, length: int) -> Completion:
    """The first tokens of a completion, and what belongs to them."""
    first: dict[str, Any] = {
        name: None if values is None else values[:length]
        for name in (*PER_TOKEN, "hidden_states")
        for values in [getattr(completion, name)]
    }
    spans = [span for span in completion.version_spans if span.start < length]
    kept = tuple(replace(span, end=min(span.end, length)) for span in spans)
    return replace(completion, **first, version_spans=kept)


def joined(before: Completion, after: Completion) -> Completion:
    """One completion of two parts, each with its own log-probs and versions.

    Raises:
        ConfigError: one has log-probs and the other has none.
    """
    if (before.log_probs is None) != (after.log_probs is None):
        raise ConfigError("one part has log-probs and the other has none: ask for both alike.")
    done = len(before.output_ids)
    both: dict[str, Any] = {
        name: None if first is None or second is None else [*first, *second]
        for name in PER_TOKEN
        for first, second in [(getattr(before, name), getattr(after, name))]
    }
    spans = (*before.version_spans, *(span.shifted(done) for span in after.version_spans))
    took_s = before.latency_s, after.latency_s
    return replace(
        after,
        **both,
        text=None,
        prompt_tokens=before.prompt_tokens,
        cached_tokens=before.cached_tokens,
        latency_s=None if None in took_s else sum(filter(None, took_s)),
        input_log_probs=_prompt_log_probs(before, after),
        hidden_states=_states(before, after),
        routed_experts=joined_routes(
            before.routed_experts, after.routed_experts, before.prompt_tokens + done - 1
        ),
        version_spans=tuple(span for span in spans if span.end > span.start),
    )


def _prompt_log_probs(before: Completion, after: Completion) -> list[float] | None:
    """The second part's prompt begins with the first part's, which may have none of its own."""
    if before.input_log_probs is not None or after.input_log_probs is None:
        return before.input_log_probs
    return after.input_log_probs[: before.prompt_tokens]


def _states(before: Completion, after: Completion) -> list[Any] | None:
    """The last row of the second part's prompt is what its first token was sampled from."""
    if not before.output_ids or not before.hidden_states or not after.hidden_states:
        return after.hidden_states
    prompt, *sampled = after.hidden_states
    return [*before.hidden_states[: len(before.output_ids)], prompt[-1], *sampled]


# At prompt tokens and padding, in rows without a token, and where a server's version is no number.
NO_VERSION = -1


def version_number(version: str) -> int:
    """A version as a number: 0 for the weights that a server loaded itself."""
    if version == INITIAL_VERSION:
        return 0
    return int(version) if version.isdecimal() else NO_VERSION


def spans_of(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """The spans of tokens whose versions are known by number: runs of equal ones."""
    spans: list[VersionSpan] = []
    start = 0
    for index in range(1, len(versions) + 1):
        if index == len(versions) or versions[index] != versions[start]:
            name = INITIAL_VERSION if versions[start] == 0 else str(versions[start])
            spans.append(VersionSpan(version=name, start=start, end=index))
            start = index
    return tuple(spans)
