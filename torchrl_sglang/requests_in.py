"""From whatever a user hands to ``generate`` to a list of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import ConfigError, InputError
from .protocol import GenerateRequest
from .sampling import SamplingParams, plain


def to_requests(
    prompts: Any,
    sampling_params: SamplingParams | Mapping[str, Any] | None,
    options: Mapping[str, Any] | None = None,
    *,
    input_ids: Any = None,
    fit_context: bool = True,
) -> tuple[list[GenerateRequest], bool]:
    """The requests, and whether a single prompt was given.

    Args:
        prompts: text, token ids, a `GenerateRequest`, or a sequence of any of these.
        sampling_params: how to sample; not with a `GenerateRequest`.
        options: sampling options, laid over ``sampling_params``.
        input_ids: token ids, or a sequence of such, instead of ``prompts``.
        fit_context: of the requests; False also for a `GenerateRequest`.

    Raises:
        InputError: something that is none of these, or both of them.
        ConfigError: sampling parameters beside a request that brings its own.
    """
    if (prompts is None) == (input_ids is None):
        raise InputError("give prompts or input_ids: one of the two.")
    prompts = plain(input_ids if prompts is None else prompts)
    single = isinstance(prompts, str | GenerateRequest) or _is_ids(prompts)
    if not single and (isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable)):
        raise InputError(
            f"prompts are text, token ids, GenerateRequests or a sequence of these, "
            f"got {prompts!r:.100}."
        )
    sampling = None
    if sampling_params is not None or options:
        sampling = SamplingParams.of(sampling_params).updated(options or {})
    items = [prompts] if single else list(prompts)
    requests = [_to_request(item, sampling) for item in items]
    if not fit_context:
        requests = [replace(request, fit_context=False) for request in requests]
    return requests, single


def requests_of(batch: Any) -> list[GenerateRequest]:
    """A batch that holds nothing but requests.

    Raises:
        InputError: it is none, or holds something else.
    """
    if isinstance(batch, GenerateRequest | str | bytes) or not isinstance(batch, Iterable):
        raise InputError(f"a batch is a sequence of GenerateRequests, got {batch!r:.100}.")
    requests = list(batch)
    for index, request in enumerate(requests):
        if not isinstance(request, GenerateRequest):
            raise InputError(
                f"item {index} of the batch is no GenerateRequest but {request!r:.100}: "
                "`generate` takes texts and token ids too."
            )
    return requests


def _is_ids(value: Any) -> bool:
    """Whether it is one prompt of ids, right or wrong, rather than a sequence of prompts."""
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(plain(value[0]), int)


def _to_request(item: Any, sampling: SamplingParams | None) -> GenerateRequest:
    if isinstance(item, GenerateRequest):
        if sampling is not None:
            raise ConfigError("a GenerateRequest has its own sampling: leave sampling_params out.")
        return item
    sampling = sampling or SamplingParams()
    if isinstance(item, str):
        return GenerateRequest(text=item, sampling=sampling)
    item = plain(item)
    if not isinstance(item, Sequence) or isinstance(item, bytes):
        raise InputError(
            f"a prompt is text, token ids (integers >= 0) or a GenerateRequest, got {item!r:.100}."
        )
    request = GenerateRequest(input_ids=tuple(item), sampling=sampling)
    if min(request.input_ids or (0,)) < 0:
        raise InputError(f"a prompt's token ids are integers >= 0, got {item!r:.100}.")
    return request
