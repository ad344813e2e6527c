"""A call of the policy that goes on with the aborted rows of a call before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

from ..completions import INITIAL_VERSION, Completion, VersionSpan
from ..errors import InputError
from ..partial import joined
from ..prompts import read_prompts
from ..protocol import GenerateRequest
from ..service import AsyncSGLang
from .call import Call, exact, updated_options
from .padding import rows_of
from .row_requests import make_requests, read_row_options
from .setup import Settled, flattened, unflattened


class ResumedCall(Call):
    """Goes on with the rows whose finish reason is ``"abort"``.

    Attributes:
        requests: one per aborted row, in order.
    """

    def __init__(
        self,
        td: TensorDictBase,
        settled: Settled,
        service: AsyncSGLang,
        kwargs: Mapping[str, Any],
    ) -> None:
        self._batch_size = td.batch_size
        self._settled = settled
        call = replace(settled.call, sampling=replace(settled.call.sampling, n=1))
        self._options = updated_options(call, kwargs, replace(settled, num_samples=None))
        flat = flattened(td)
        ids, self._parts = _read_parts(flat, settled)
        self._prompts = replace(read_prompts(flat, settled.prompts), ids=ids)
        self.requests = self._make_requests(flat, service)

    def _make_requests(self, flat: TensorDictBase, service: AsyncSGLang) -> list[GenerateRequest]:
        """Requests for what is missing: their prompt is the prompt and what was sampled."""
        rows = read_row_options(flat, self._settled.sampling_key) or [{} for _ in self._parts]
        going_on = [i for i, part in enumerate(self._parts) if part.finish_type == "abort"]
        prompts = replace(
            self._prompts,
            ids=[[*self._prompts.ids[i], *self._parts[i].output_ids] for i in going_on],
            chats=None
            if self._prompts.chats is None
            else [self._prompts.chats[i] for i in going_on],
        )
        changed = [self._limits(rows[i], len(self._parts[i].output_ids)) for i in going_on]
        return make_requests(prompts, changed, self._options, service)

    def _limits(self, row: Mapping[str, Any], done: int) -> dict[str, Any]:
        """A row's options with its limits counted from where it stopped."""
        sampling = self._options.sampling
        most = row.get("max_new_tokens", sampling.max_new_tokens)
        fewest = row.get("min_new_tokens", sampling.min_new_tokens)
        if most <= done:
            raise InputError(
                f"a row was aborted after {done} tokens, and max_new_tokens={most} counts from its "
                "start: give a larger one."
            )
        return {**row, "max_new_tokens": most - done, "min_new_tokens": max(0, fewest - done)}

    def outputs(self, completions: Sequence[Completion]) -> TensorDictBase:
        """All rows; those that were aborted with both of their parts."""
        fresh = iter(exact(self.requests, completions, self._options))
        whole = [
            joined(part, next(fresh)) if part.finish_type == "abort" else part
            for part in self._parts
        ]
        return unflattened(self._rows(self._prompts, whole), self._batch_size, None)


def _read_parts(flat: TensorDictBase, settled: Settled) -> tuple[list[list[int]], list[Completion]]:
    """Prompts, and what was sampled after them, from the outputs of an earlier call."""
    keys = settled.outputs
    tokens = _rows(flat, keys.tokens_key, "full")
    attended = _rows(flat, keys.masks_key, "all_attention_mask")
    sampled = _rows(flat, keys.masks_key, "all_assistant_mask")
    versions = _rows(flat, settled.info.key, "policy_version")
    reasons = _reasons(flat, settled.info.key)
    log_probs: Sequence[torch.Tensor | None] = [None] * len(tokens)
    if keys.log_probs_key is not None:
        log_probs = _rows(flat, keys.log_probs_key, "full")
    ids, parts = [], []
    for row, everything, answer, version, reason, scores in zip(
        tokens, attended, sampled, versions, reasons, log_probs, strict=True
    ):
        ids.append(row[everything & ~answer].tolist())
        part = Completion(
            rid="before",
            output_ids=row[answer].tolist(),
            log_probs=None if scores is None else scores[answer].tolist(),
            text=None,
            finish_type=reason,
            matched_stop=None,
            prompt_tokens=len(ids[-1]),
            cached_tokens=0,
            version_spans=_spans(version[answer].tolist()),
        )
        parts.append(part)
    return ids, parts


def _rows(flat: TensorDictBase, key: NestedKey | None, *below: str) -> list[torch.Tensor]:
    base = key if isinstance(key, tuple) else (key,)
    rows = None if key is None else rows_of(flat, (*base, *below))
    if rows is None:
        raise InputError(
            f"resume reads {key!r}{below or ''} of what the policy returned, which is missing: "
            "leave no output key out with partial_rollouts=True."
        )
    return rows


def _reasons(flat: TensorDictBase, key: NestedKey | None) -> list[Any]:
    base = key if isinstance(key, tuple) else (key,)
    reasons = None if key is None else flat.get((*base, "finish_reason"), None)
    if reasons is None:
        raise InputError(f"resume reads the finish reasons under {key!r}, which are missing.")
    return reasons if isinstance(reasons, list) else list(reasons.tolist())


def _spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions."""
    spans: list[VersionSpan] = []
    start = 0
    for index in range(1, len(versions) + 1):
        if index == len(versions) or versions[index] != versions[start]:
            name = INITIAL_VERSION if versions[start] == 0 else str(versions[start])
            spans.append(VersionSpan(version=name, start=start, end=index))
            start = index
    return tuple(spans)
