"""From whatever a user hands to ``generate`` to a list of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import ConfigError, InputError
from .protocol import GenerateRequest
from .sampling import SamplingParams


def to_requests(
    prompts: Any, sampling_params: SamplingParams | Mapping[str, Any] | None
) -> tuple[list[GenerateRequest], bool]:
    """The requests, and whether a single prompt was given.

    Args:
        prompts: text, token ids, a `GenerateRequest`, or a sequence of any of these.
        sampling_params: how to sample; not with a `GenerateRequest`.

    Raises:
        InputError: something that is none of these.
        ConfigError: sampling parameters beside a request that brings its own.
    """
    single = isinstance(prompts, str | GenerateRequest) or _is_ids(prompts)
    if not single and (isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable)):
        raise InputError(
            f"prompts are text, token ids, GenerateRequests or a sequence of these, "
            f"got {prompts!r:.100}."
        )
    sampling = None if sampling_params is None else _sampling(sampling_params)
    items = [prompts] if single else list(prompts)
    return [_to_request(item, sampling) for item in items], single


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], int)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sampling(given: SamplingParams | Mapping[str, Any]) -> SamplingParams:
    if isinstance(given, SamplingParams):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"sampling_params are SamplingParams or a mapping, got {given!r}.")
    return SamplingParams.from_kwargs(given)


def _to_request(item: Any, sampling: SamplingParams | None) -> GenerateRequest:
    if isinstance(item, GenerateRequest):
        if sampling is not None:
            raise ConfigError("a GenerateRequest has its own sampling: leave sampling_params out.")
        return item
    sampling = sampling or SamplingParams()
    if isinstance(item, str):
        return GenerateRequest(text=item, sampling=sampling)
    if hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, Sequence) and not isinstance(item, bytes) and all(map(_is_id, item)):
        return GenerateRequest(input_ids=tuple(item), sampling=sampling)
    raise InputError(
        f"a prompt is text, token ids (integers >= 0) or a GenerateRequest, got {item!r:.100}."
    )
