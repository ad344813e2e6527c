"""Reads routed experts as SGLang sends them: base64 of int32 ``[tokens, layers * experts]``.

SGLang reads them from where a request's keys and values are when it ends. Needs only the standard
library.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ResponseError

UNKNOWN = b"\xff"  # four of them are -1


def as_sampled(encoded: str, meta: Mapping[str, Any], num_sampled: int) -> str:
    """The experts of an answer, with -1 for tokens whose experts then are not known any more.

    A request that was retracted computes its tokens anew when it goes on: under other weights, if
    they changed meanwhile, and then their experts are not those behind their log-probs.

    Args:
        encoded: the experts of all tokens but the last.
        meta: what the server says of the request.
        num_sampled: tokens that were sampled.

    Raises:
        ResponseError: they are not of so many tokens.
    """
    spans: Sequence[Mapping[str, Any]] = meta.get("weight_versions") or ()
    retracted = meta.get("num_retractions", len(spans) > 1)
    if not encoded or not retracted or len(spans) == 1:
        return encoded
    # Without spans nobody knows whether the weights changed.
    changed = spans[-1]["start"] if spans else num_sampled
    num_tokens = meta["prompt_tokens"] + num_sampled - 1
    raw = _decoded(encoded, num_tokens)
    # The last token before the change is what the first one after it was sampled from.
    unknown = max(0, meta["prompt_tokens"] + changed - 1) * (len(raw) // num_tokens)
    return _encoded(UNKNOWN * unknown + raw[unknown:])


def joined_routes(before: str | None, after: str | None, num_before: int) -> str | None:
    """The experts of two parts of a completion: of the first part's tokens its own.

    Args:
        before: of the first part.
        after: of the second, whose prompt is the first part, computed anew.
        num_before: tokens of the first part, prompt included, less one.
    """
    if not before or not after:
        return after or before
    first, second = _decoded(before, num_before), _decoded(after, None)
    return _encoded(first + second[len(first) :])


def _decoded(encoded: str, num_tokens: int | None) -> bytes:
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ResponseError(f"routed experts are no base64: {encoded!r:.100}.") from error
    if num_tokens is not None and (num_tokens < 1 or len(raw) % (4 * num_tokens)):
        raise ResponseError(f"routed experts of {len(raw)} bytes are not those of {num_tokens}.")
    return raw


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
