"""Reads strictly what ``/generate`` answers. Needs only the standard library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestAbortedError, ResponseError, SGLangError
from ..servers.info import INITIAL_VERSION
from .completion import Completion, VersionSpan
from .experts import as_sampled
from .request import GenerateRequest

MINUS_INFINITY = float("-inf")
# To keep what an aborted request has, instead of raising.
KEEP_PARTS = (
    "SGLangWrapper(partial_rollouts=True) or GenerateRequest(partial_allowed=True) returns what "
    "there is, to go on with."
)

Group = list[Completion] | SGLangError  # what a request came to: its samples, or an error


def parse_completions(answer: object, request: GenerateRequest) -> list[Completion]:
    """Reads the answer to one non-streaming ``/generate``: one completion per sample.

    Raises:
        ResponseError: something is missing, of another length, not finite, or of another request.
        RequestAbortedError: the engine aborted the request, which does not allow partial answers.
    """
    several = request.num_samples > 1
    answers = answer if several and isinstance(answer, list) else [answer]
    if len(answers) != request.num_samples:
        raise ResponseError(
            f"request {request.rid}: {len(answers)} completions instead of {request.num_samples}."
        )
    try:
        return [_parse(one, request, index) for index, one in enumerate(answers)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ResponseError(
            f"request {request.rid}: the answer lacks what was asked for "
            f"({type(error).__name__}: {error}); it begins {str(answer)[:200]!r}."
        ) from error


def _parse(answer: Any, request: GenerateRequest, index: int) -> Completion:
    meta, output_ids = answer["meta_info"], answer["output_ids"]
    _check_id(meta["id"], request, index)
    reason = meta["finish_reason"]
    kind = reason["type"]
    if kind == "abort" and not request.partial_allowed:
        raise RequestAbortedError(
            f"request {request.rid} was aborted after {len(output_ids)} tokens: "
            f"{reason.get('message', 'no reason given')}. {KEEP_PARTS}"
        )
    if kind == "abort" and "prompt_tokens" not in meta:
        meta, output_ids = _aborted_while_waiting(meta, output_ids, request)
    if kind not in ("stop", "length", "abort"):
        raise ResponseError(f"request {request.rid}: unknown finish reason {reason!r}.")
    _check_ids(output_ids, meta, request, may_be_empty=kind == "abort" or request.scoring)
    _check_prompt(meta["prompt_tokens"], request)
    returns = request.returns
    log_probs = _output_log_probs(meta, output_ids, request) if request.return_log_probs else None
    mask = _sampling_mask(meta, output_ids, request) if returns.sampling_mask else (None, None)
    return Completion(
        rid=meta["id"],
        output_ids=output_ids,
        log_probs=log_probs,
        text=answer.get("text"),
        finish_type=kind,
        matched_stop=_matched(reason.get("matched"), request),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta.get("cached_tokens", 0),
        version_spans=_version_spans(meta, len(output_ids), request),
        latency_s=meta.get("e2e_latency"),
        input_log_probs=_input_log_probs(meta, request) if returns.input_log_probs else None,
        top_log_probs=_top_log_probs(meta, output_ids, request) if returns.top_log_probs else None,
        sampling_mask=mask[0],
        sampling_log_probs=mask[1],
        hidden_states=_hidden_states(meta, output_ids, request) if returns.hidden_states else None,
        routed_experts=_routed(meta, output_ids, request) if returns.routed_experts else None,
    )


def _matched(stop: str | int | None, request: GenerateRequest) -> str | int | None:
    """What ended a completion; of a regular expression the server only gives the pattern."""
    sampling = request.sampling
    return None if stop in sampling.stop_regex and stop not in sampling.stop else stop


def never_ran(request: GenerateRequest) -> list[Completion]:
    """What a request comes to that was aborted before it ran, where the server says no more.

    Raises:
        RequestAbortedError: it does not allow partial answers.
    """
    if not request.partial_allowed:
        raise RequestAbortedError(f"request {request.rid} was aborted before it ran. {KEEP_PARTS}")
    returns = request.returns
    empty = Completion(
        rid=request.rid,
        output_ids=[],
        log_probs=[] if request.return_log_probs else None,
        text=None,
        finish_type="abort",
        matched_stop=None,
        prompt_tokens=len(request.input_ids or ()),
        cached_tokens=0,
        version_spans=_adapter_span(request, 0),
        top_log_probs=[] if returns.top_log_probs else None,
        sampling_mask=[] if returns.sampling_mask else None,
        sampling_log_probs=[] if returns.sampling_mask else None,
    )
    return [empty] * request.num_samples


def _aborted_while_waiting(
    meta: Mapping[str, Any], output_ids: list[int], request: GenerateRequest
) -> tuple[Mapping[str, Any], list[int]]:
    """What SGLang leaves out of its answer to a request that it aborts in its queue.

    Such a request has no tokens, or those from before it was retracted. These are not kept where
    they lack what was asked for: they are then sampled again.
    """
    returns = request.returns
    if returns.sampling_mask or returns.hidden_states or returns.routed_experts:
        output_ids = []
        meta = {
            **meta,
            "completion_tokens": 0,
            "weight_versions": None,
            "output_token_logprobs": [],
            "output_top_logprobs": [],
            "output_token_sampling_mask": [],
            "output_token_sampling_logprobs": [],
            "hidden_states": [],
            "routed_experts": "",
        }
    return {**meta, "prompt_tokens": len(request.input_ids or ())}, output_ids


def _check_id(given: object, request: GenerateRequest, index: int) -> None:
    """The server makes ids of its own for the samples of its own ``n``."""
    if request.num_samples == 1 and given != request.rid:
        raise ResponseError(f"request {request.rid} got the answer of request {given!r}.")
    if not isinstance(given, str):
        raise ResponseError(f"request {request.rid}, sample {index}: has no id, but {given!r}.")


def _check_ids(
    output_ids: Any, meta: Mapping[str, Any], request: GenerateRequest, *, may_be_empty: bool
) -> None:
    if not isinstance(output_ids, list) or not set(map(type, output_ids)) <= {int}:
        raise ResponseError(f"request {request.rid}: output ids are no list of integers.")
    if len(output_ids) != meta["completion_tokens"] or not (output_ids or may_be_empty):
        raise ResponseError(
            f"request {request.rid}: {len(output_ids)} output ids, "
            f"completion_tokens={meta['completion_tokens']}."
        )


def _check_prompt(prompt_tokens: int, request: GenerateRequest) -> None:
    """The server adds tokens for media and for what a session holds, and to nothing else."""
    if request.input_ids is None or request.media is not None or request.session is not None:
        return
    if prompt_tokens != len(request.input_ids):
        raise ResponseError(
            f"request {request.rid} has {len(request.input_ids)} prompt tokens; the answer is of a "
            f"prompt of {prompt_tokens}."
        )


def _output_log_probs(
    meta: Mapping[str, Any], output_ids: Sequence[int], request: GenerateRequest
) -> list[float]:
    rows = meta["output_token_logprobs"]
    if request.scoring:
        return []  # a busy server sends one, of a token that it does not generate
    if [row[1] for row in rows] != output_ids:
        raise ResponseError(
            f"request {request.rid}: log-probs for {len(rows)} tokens do not belong to the "
            f"{len(output_ids)} output ids."
        )
    return _finite([row[0] for row in rows], request)


def _input_log_probs(meta: Mapping[str, Any], request: GenerateRequest) -> list[float] | None:
    """Log-probs of the prompt; the first token has none. None: aborted before they were made."""
    rows = meta["input_token_logprobs"]
    if not rows and meta["finish_reason"]["type"] == "abort":
        return None
    ids = [row[1] for row in rows]
    expected = list(request.input_ids) if request.input_ids is not None else ids
    if not _same_prompt(ids, expected) or len(ids) != meta["prompt_tokens"]:
        raise ResponseError(
            f"request {request.rid}: log-probs for {len(ids)} prompt tokens do not belong to the "
            f"{meta['prompt_tokens']} ids of the prompt."
        )
    return [math.nan, *_finite([row[0] for row in rows[1:]], request, "of the prompt", first=1)]


def _same_prompt(ids: list[int], expected: list[int]) -> bool:
    """SGLang writes 0 for the last id of the vocabulary, which some models have as their EOS."""
    if ids == expected:
        return True
    return len(ids) == len(expected) and all(
        given in (wanted, 0) for given, wanted in zip(ids, expected, strict=True)
    )


def _top_log_probs(
    meta: Mapping[str, Any], output_ids: Sequence[int], request: GenerateRequest
) -> list[list[tuple[float, int]]]:
    positions = meta["output_top_logprobs"]
    if len(positions) != len(output_ids):
        raise ResponseError(
            f"request {request.rid}: top log-probs for {len(positions)} positions, not for the "
            f"{len(output_ids)} output ids."
        )
    for index, position in enumerate(positions):
        if position and all(row[0] is None for row in position):
            raise _not_finite(request, index, "among the top log-probs")
    # Tokens that a mask, a bias or a grammar rules out have minus infinity, which JSON has not.
    return [
        [(MINUS_INFINITY if row[0] is None else row[0], row[1]) for row in position]
        for position in positions
    ]


def _sampling_mask(
    meta: Mapping[str, Any], output_ids: Sequence[int], request: GenerateRequest
) -> tuple[list[list[int]], list[float]]:
    kept = meta["output_token_sampling_mask"]
    log_probs = meta["output_token_sampling_logprobs"]
    if len(kept) != len(output_ids) or len(log_probs) != len(output_ids):
        raise ResponseError(
            f"request {request.rid}: {len(kept)} sampling masks and {len(log_probs)} log-probs "
            f"for {len(output_ids)} output ids."
        )
    for token, ids in zip(output_ids, kept, strict=True):
        if token not in ids:
            raise ResponseError(f"request {request.rid}: token {token} is not in its own mask.")
    return kept, _finite(log_probs, request, "among the ids kept")


def _finite(
    log_probs: list[float], request: GenerateRequest, what: str = "sampled", first: int = 0
) -> list[float]:
    """Log-probs as they are; null is what SGLang writes for those that are not finite.

    Args:
        log_probs: of one token after the other.
        request: whose they are.
        what: which tokens' they are, for the message.
        first: position of the first one.

    Raises:
        ResponseError: one is not finite.
    """
    if None in log_probs or not math.isfinite(sum(log_probs)):
        wrong = (i for i, p in enumerate(log_probs) if p is None or not math.isfinite(p))
        raise _not_finite(request, first + next(wrong, 0), what)
    return log_probs


def _not_finite(request: GenerateRequest, position: int, what: str) -> ResponseError:
    return ResponseError(
        f"request {request.rid}: a log-prob is not finite, that of token {position} {what}: do the "
        "weights hold NaN?"
    )


def _asked(meta: Mapping[str, Any], name: str, request: GenerateRequest) -> Any:
    value = meta.get(name)
    if value is None:
        raise ResponseError(f"request {request.rid}: {name} were asked for and did not come.")
    return value


def _routed(meta: Mapping[str, Any], output_ids: Sequence[int], request: GenerateRequest) -> str:
    return as_sampled(_asked(meta, "routed_experts", request), meta, len(output_ids))


def _hidden_states(
    meta: Mapping[str, Any], output_ids: Sequence[int], request: GenerateRequest
) -> list[Any]:
    """The prompt's states, then one per token but the first.

    A request that was retracted computes its prompt and its tokens anew, and SGLang puts all of
    these states where those of one token belong: the last of them.
    """
    prompt, *sampled = _asked(meta, "hidden_states", request) or [[]]
    again = [bool(state) and isinstance(state[0], list) for state in sampled]
    states = [s[-1] if block else s for s, block in zip(sampled, again, strict=True)]
    num_states = len(states) + 1 if prompt else 0
    if any(None in row for row in (*states, *(prompt if prompt else ()))):
        raise ResponseError(
            f"request {request.rid}: a hidden state is not finite: do the weights hold NaN?"
        )
    # Servers that draft tokens may send states of some that they did not keep, at the end.
    if num_states < len(output_ids) or (any(again) and num_states > len(output_ids)):
        raise ResponseError(
            f"request {request.rid}: hidden states of {num_states} tokens, not of the "
            f"{len(output_ids)} output ids."
        )
    return [prompt, *states[: max(0, len(output_ids) - 1)]] if prompt else []


def _version_spans(
    meta: Mapping[str, Any], num_tokens: int, request: GenerateRequest
) -> tuple[VersionSpan, ...]:
    if request.adapter_version is not None:
        return _adapter_span(request, num_tokens)  # it stays, whatever the servers are told since
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


def _adapter_span(request: GenerateRequest, num_tokens: int) -> tuple[VersionSpan, ...]:
    """The version of a pushed adapter, which a request keeps to its end; nothing without one."""
    if request.adapter_version is None:
        return ()
    return (VersionSpan(version=str(request.adapter_version), start=0, end=num_tokens),)
