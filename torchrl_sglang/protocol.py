"""Every body that crosses HTTP, and its strict reading. Needs only the standard library."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import (
    ConfigError,
    EmptyPromptError,
    RequestAbortedError,
    ResponseError,
)
from .sampling import SamplingParams

FinishType = Literal["stop", "length"]
INITIAL_VERSION = "default"  # what a server calls the weights that it loaded itself


def _new_rid() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt on its way to a server.

    Attributes:
        input_ids: the prompt as token ids; or
        text: the prompt as text, which the server tokenises itself (it may add a BOS).
        sampling: how to sample.
        return_log_probs: ask for the log-prob of every sampled token.
        rid: request id, unique per attempt.
    """

    input_ids: tuple[int, ...] | None = None
    text: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    return_log_probs: bool = True
    rid: str = field(default_factory=_new_rid)

    def __post_init__(self) -> None:
        if (self.input_ids is None) == (self.text is None):
            raise ConfigError("a GenerateRequest takes exactly one of input_ids and text.")
        if not (self.input_ids or self.text):
            raise EmptyPromptError("a prompt is empty: it needs at least one token.")
        if self.input_ids is not None:
            object.__setattr__(self, "input_ids", tuple(self.input_ids))

    def body(self, cache_salt: str | None = None) -> dict[str, Any]:
        """The JSON object for ``/generate``.

        Args:
            cache_salt: prefixes cached under another salt are not reused; None sends no salt.
        """
        body: dict[str, Any] = {
            "rid": self.rid,
            "sampling_params": self.sampling.body(),
            "return_logprob": self.return_log_probs,
            "stream": False,
        }
        if self.input_ids is not None:
            body["input_ids"] = self.input_ids
        else:
            body["text"] = self.text
        if cache_salt is not None:
            body["extra_key"] = cache_salt
        return body


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """The weights that sampled ``output_ids[start:end]``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for one request.

    Attributes:
        rid: id of the request.
        output_ids: sampled token ids, the EOS or stop token included.
        log_probs: log-prob of each sampled token after temperature and penalties, same length;
            None if they were not asked for.
        text: the server's own decoding, without the stop; None from a server without a tokenizer.
        finish_type: ``"stop"`` (EOS or a stop) or ``"length"``.
        matched_stop: the stop string or token id that ended it.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, how many the prefix cache had.
        version_spans: the weights behind each part of ``output_ids``; one span that covers all
            from servers that report one version per request.
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

    @property
    def finish_reason(self) -> str:
        """Same as ``finish_type``."""
        return self.finish_type


def parse_completion(answer: object, request: GenerateRequest) -> Completion:
    """Reads the answer to one non-streaming ``/generate``.

    Raises:
        ResponseError: something is missing, of another length, not finite, or of another request.
        RequestAbortedError: the engine aborted the request.
    """
    try:
        return _parse_completion(answer, request)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ResponseError(
            f"request {request.rid}: the answer lacks what was asked for "
            f"({type(error).__name__}: {error}); it begins {str(answer)[:200]!r}."
        ) from error


def _parse_completion(answer: Any, request: GenerateRequest) -> Completion:
    meta, output_ids = answer["meta_info"], answer["output_ids"]
    if meta["id"] != request.rid:
        raise ResponseError(f"request {request.rid} got the answer of request {meta['id']!r}.")
    reason = meta["finish_reason"]
    if reason["type"] == "abort":
        raise RequestAbortedError(
            f"request {request.rid} was aborted after {len(output_ids)} tokens: "
            f"{reason.get('message', 'no reason given')}"
        )
    if reason["type"] not in ("stop", "length"):
        raise ResponseError(f"request {request.rid}: unknown finish reason {reason!r}.")
    if not isinstance(output_ids, list) or not all(type(i) is int for i in output_ids):
        raise ResponseError(f"request {request.rid}: output ids are no list of integers.")
    if not output_ids or len(output_ids) != meta["completion_tokens"]:
        raise ResponseError(
            f"request {request.rid}: {len(output_ids)} output ids, "
            f"completion_tokens={meta['completion_tokens']}."
        )
    return Completion(
        rid=request.rid,
        output_ids=output_ids,
        log_probs=_log_probs(meta, output_ids, request) if request.return_log_probs else None,
        text=answer.get("text"),
        finish_type=reason["type"],
        matched_stop=reason.get("matched"),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta.get("cached_tokens", 0),
        version_spans=_version_spans(meta, len(output_ids), request),
    )


def _log_probs(
    meta: Mapping[str, Any], output_ids: Sequence[int], request: GenerateRequest
) -> list[float]:
    rows = meta["output_token_logprobs"]
    log_probs = [row[0] for row in rows]
    if [row[1] for row in rows] != output_ids:
        raise ResponseError(
            f"request {request.rid}: log-probs for {len(rows)} tokens do not belong to the "
            f"{len(output_ids)} output ids."
        )
    if not math.isfinite(sum(log_probs)):
        raise ResponseError(f"request {request.rid}: a log-prob is not finite.")
    return log_probs


def _version_spans(
    meta: Mapping[str, Any], num_tokens: int, request: GenerateRequest
) -> tuple[VersionSpan, ...]:
    spans = meta.get("weight_versions")
    if not spans:
        version = meta.get("weight_version", INITIAL_VERSION)
        return (VersionSpan(version=version, start=0, end=num_tokens),)
    parsed = tuple(VersionSpan(version=s["version"], start=s["start"], end=s["end"]) for s in spans)
    bounds = [0, *(span.end for span in parsed)]
    if bounds[-1] != num_tokens or any(
        s.start != b or s.end < b for s, b in zip(parsed, bounds[:-1], strict=True)
    ):
        raise ResponseError(
            f"request {request.rid}: version spans {spans} do not cover {num_tokens} tokens."
        )
    return parsed
