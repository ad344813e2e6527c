"""Writes what a completion says of itself: why it ended, which weights sampled it, and extras."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDict

from ...errors import ConfigError, ResponseError, UnsupportedOptionError
from ...generate.completion import NO_VERSION, Completion
from ...generate.request import Returns
from .tensors import Rows, as_floats, as_ids
from .texts import non_tensor
from .token_versions import as_count, row_version, token_versions

# Extras that take a value, and those that are on or off.
EXTRAS = (
    "top_log_probs",
    "input_log_probs",
    "sampling_mask",
    "hidden_states",
    "routed_experts",
    "cached_tokens",
    "request_id",
    "latency",
)


@dataclass(frozen=True, kw_only=True)
class InfoSpec:
    """What is written into one nested TensorDict.

    ``finish_reason``: ``"stop"``, ``"length"`` or ``"abort"`` per row; ``weight_version``: version
    that sampled the row's last token, int64 ``[]``, -1 where it has none; ``policy_version``:
    version that sampled each token, int64 ``[P + R]``, -1 at prompt tokens; and what ``extras``
    names.

    Attributes:
        key: where the TensorDict goes; None leaves it out.
        extras: what else is wanted, and ``top_log_probs``'s k.
    """

    key: NestedKey | None
    extras: dict[str, int] = field(default_factory=dict)

    def returns(self) -> Returns:
        """What has to be asked of the server."""
        extras = self.extras
        return Returns(
            input_log_probs="input_log_probs" in extras,
            top_log_probs=extras.get("top_log_probs", 0),
            sampling_mask="sampling_mask" in extras,
            hidden_states="hidden_states" in extras,
            routed_experts="routed_experts" in extras,
        )


def parse_extras(given: Any) -> dict[str, int]:
    """A sequence of names, or a mapping of names to True, False or a number.

    Raises:
        UnsupportedOptionError: an unknown name.
        ConfigError: a value that is none.
    """
    pairs = given.items() if hasattr(given, "items") else ((name, True) for name in given or ())
    extras: dict[str, int] = {}
    for name, value in pairs:
        if name not in EXTRAS:
            raise UnsupportedOptionError(f"extra {name!r} is unknown; known are {list(EXTRAS)}.")
        if not isinstance(value, bool | int) or value < 0:
            raise ConfigError(f"extras[{name!r}]={value!r}: must be True, False or a number.")
        if name == "top_log_probs" and value is True:
            raise ConfigError("extras: say how many, as in {'top_log_probs': 5}.")
        if value:
            extras[name] = int(value)
    return extras


def build_info(rows: Rows, completions: Sequence[Completion], spec: InfoSpec) -> list[TensorDict]:
    """What `InfoSpec` names, one TensorDict per completion."""
    reasons = {c.finish_type: non_tensor(c.finish_type) for c in completions}
    unknown = [torch.full_like(prompt, NO_VERSION) for prompt in rows.prompts]
    sampled = [token_versions(c) for c in completions]
    columns: dict[str, Sequence[Any]] = {
        "finish_reason": [reasons[c.finish_type] for c in completions],
        "weight_version": [row_version(c) for c in completions],
        "policy_version": rows.layout(unknown, sampled, NO_VERSION)[2],
    }
    for name in spec.extras:
        columns |= _EXTRA_VALUES[name](completions, rows)
    return [
        TensorDict({name: values[i] for name, values in columns.items()}, batch_size=[])
        for i in range(len(completions))
    ]


def _top(completions: Sequence[Completion], rows: Rows) -> dict[str, Any]:
    """``top_log_probs`` float32 and ``top_token_ids`` int64, ``[R, k]``."""
    tables = [
        torch.tensor(c.top_log_probs, dtype=torch.float64, device="cpu").view(
            len(c.output_ids), -1, 2
        )
        if c.top_log_probs
        else torch.empty(0, 0, 2, dtype=torch.float64, device="cpu")
        for c in completions
    ]
    return {
        "top_log_probs": [table[..., 0].float() for table in tables],
        "top_token_ids": [table[..., 1].long() for table in tables],
    }


def _masks(completions: Sequence[Completion], rows: Rows) -> dict[str, Any]:
    """Ids kept at each position, one after the other, and where each position's begin.

    ``sampling_mask_ids`` int64 ``[sum of counts]``, ``sampling_mask_offsets`` int64 ``[R + 1]``:
    position ``i`` kept ``ids[offsets[i]:offsets[i + 1]]``.
    """
    ids, offsets = [], []
    for completion in completions:
        kept = completion.sampling_mask or []
        counts = as_ids([0, *map(len, kept)])
        ids.append(as_ids([i for position in kept for i in position]))
        offsets.append(counts.cumsum(0))
    return {"sampling_mask_ids": ids, "sampling_mask_offsets": offsets}


def _hidden_states(completions: Sequence[Completion], rows: Rows) -> dict[str, Any]:
    """``hidden_states`` float32 ``[R, hidden]``: what each token was sampled from.

    The server sends the prompt's states first, without those of a cached prefix; their last row is
    what the first token was sampled from.
    """
    states = []
    for completion in completions:
        if not completion.output_ids or not completion.hidden_states:
            states.append(torch.empty(0, 0, dtype=torch.float32, device="cpu"))
            continue
        prompt, *sampled = completion.hidden_states
        states.append(as_floats([prompt[-1], *sampled][: len(completion.output_ids)]))
    return {"hidden_states": states}


def _routed_experts(completions: Sequence[Completion], rows: Rows) -> dict[str, Any]:
    """``routed_experts`` int32 ``[P + R - 1, layers * experts per token]``, -1 where unknown.

    Raises:
        ResponseError: they are not of so many tokens.
    """
    experts = []
    for completion, prompt in zip(completions, rows.prompts, strict=True):
        if not completion.routed_experts:  # aborted before it began
            experts.append(torch.empty(0, 0, dtype=torch.int32, device="cpu"))
            continue
        raw = bytearray(base64.b64decode(completion.routed_experts))
        num_tokens = len(prompt) + len(completion.output_ids) - 1
        if not num_tokens or len(raw) % (4 * num_tokens):
            raise ResponseError(
                f"request {completion.rid}: {len(raw)} bytes of routed experts are not those of "
                f"{num_tokens} tokens."
            )
        experts.append(torch.frombuffer(raw, dtype=torch.int32).reshape(num_tokens, -1))
    return {"routed_experts": experts}


def _latency(completions: Sequence[Completion], rows: Rows) -> dict[str, Any]:
    values = [math.nan if c.latency_s is None else c.latency_s for c in completions]
    return {
        "latency_s": [torch.tensor(value, dtype=torch.float32, device="cpu") for value in values]
    }


_EXTRA_VALUES = {
    "top_log_probs": _top,
    "input_log_probs": lambda completions, rows: {},  # they go into `LogProbs.prompt`
    "sampling_mask": _masks,
    "hidden_states": _hidden_states,
    "routed_experts": _routed_experts,
    "cached_tokens": lambda completions, rows: {
        "cached_tokens": [as_count(c.cached_tokens) for c in completions]
    },
    "request_id": lambda completions, rows: {
        "request_id": [non_tensor(c.rid) for c in completions]
    },
    "latency": _latency,
}
