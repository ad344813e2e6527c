"""What comes back for a request. Needs only the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FinishType = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """The weights that sampled ``output_ids[start:end]``."""

    version: str
    start: int
    end: int


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
