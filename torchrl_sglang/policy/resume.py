"""Goes on with the aborted rows of an earlier call of the policy."""

from __future__ import annotations

import base64
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

from ..errors import ConfigError, InputError
from ..generate.completion import Completion, joined, spans_of
from ..generate.partial import sampling_left
from ..generate.request import GenerateRequest
from ..generate.room import room_for
from ..generate.seeds import own_seeds
from ..service.service import AsyncSGLang
from .arguments import Settled, flattened, unflattened
from .call import exact, updated_options
from .outputs.writer import RowWriter
from .prompts.padding import below, rows_of
from .prompts.read import read_prompts
from .requests.rows import ROW_OPTIONS, make_requests, read_row_options
from .requests.stops import cut_after, take_over


class Resuming:
    """A call that goes on with the rows whose finish reason is ``"abort"``.

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
        flat = flattened(td)
        self._batch_size = td.batch_size
        self._settled = settled
        call = replace(settled.call, sampling=replace(settled.call.sampling, n=1))
        self._options = updated_options(call, kwargs, None)
        self._writer = RowWriter(settled, self._options.sampling)
        self._before = flat
        ids, parts = _read_parts(flat, settled)
        longest = service.max_input_len if self._options.fit_context else None
        self._parts = [_unless_full(part, longest) for part in parts]
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
        seeds = self._seeds(rows, service)
        changed = [{**self._rest_of(rows[i], i), "sampling_seed": seeds[i]} for i in going_on]
        requests = make_requests(prompts, changed, self._options, service)
        self._seams = {i: r.sampling.stop for i, r in zip(going_on, requests, strict=True)}
        requests = [self._moved_on(r, i) for i, r in zip(going_on, requests, strict=True)]
        return take_over(requests, service.info.features, self._settled.tokenizer)[0]

    def _seeds(self, rows: Sequence[Mapping[str, Any]], service: AsyncSGLang) -> list[int | None]:
        """The seed of every row, as in the call that was aborted: of the prompts that it had."""
        whole = [{k: v for k, v in row.items() if k not in ("session", "rid")} for row in rows]
        requests = make_requests(self._prompts, whole, self._options, service)
        return [request.sampling.sampling_seed for request in own_seeds(requests)]

    def _rest_of(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A row's options for what is still to be sampled."""
        own = {name: value for name, value in row.items() if name not in ROW_OPTIONS}
        others = {name: value for name, value in row.items() if name in ROW_OPTIONS}
        # A session keeps the tokens behind a stop, and routed experts are not cut.
        kept_whole = row.get("session") is not None or self._options.returns.routed_experts
        matched = self._settled.tokenizer is not None and not kept_whole
        done = len(self._parts[index].output_ids)
        with _noted(index):
            sampling = self._options.sampling.updated(own, ROW_OPTIONS)
            left = sampling_left(sampling, done, stops_matched=matched)
        return {**others, **vars(left)}

    def _moved_on(self, request: GenerateRequest, index: int) -> GenerateRequest:
        """The request with its processor from where it was."""
        if request.processor is None:
            return request
        with _noted(index):
            processor = request.processor.after(len(self._parts[index].output_ids))
        return replace(request, processor=processor)

    def arrive(self, completions: Sequence[Completion]) -> None:
        """Does nothing: what arrives is but the second part of a row."""

    def outputs(self, completions: Sequence[Completion]) -> TensorDictBase:
        """All rows; those that were aborted with both of their parts."""
        fresh = iter(exact(self.requests, completions, self._options))
        whole = [
            self._whole(part, next(fresh), index) if part.finish_type == "abort" else part
            for index, part in enumerate(self._parts)
        ]
        out = self._writer.rows(self._prompts, whole)
        for row, before, part in zip(
            out.unbind(0), self._before.unbind(0), self._parts, strict=True
        ):
            if part.finish_type != "abort":
                self._keep_text(row, before)
                self._keep_info(row, before)
        return unflattened(out, self._batch_size, None)

    def _whole(self, part: Completion, rest: Completion, index: int) -> Completion:
        """Both parts as one, up to a stop string that began in the first."""
        done, tokenizer = len(part.output_ids), self._settled.tokenizer
        if tokenizer is None:
            return joined(part, rest)
        return cut_after(done, joined(part, rest), self._seams[index], tokenizer)

    def _keep_text(self, row: TensorDictBase, before: TensorDictBase) -> None:
        """What ended a completion, and is left out of its text, can't be read from its tokens."""
        for key in (self._settled.outputs.text_key, self._settled.outputs.history_key):
            value = None if key is None else before.get(key, None)
            if key is not None and value is not None:
                row.set(key, value)

    def _keep_info(self, row: TensorDictBase, before: TensorDictBase) -> None:
        """What the call before said of a row, and this wrapper would not: extras of its own."""
        key = self._settled.info.key
        old = None if key is None else before.get(key, None)
        if key is None or old is None:
            return
        new = row.get(key)
        for name in set(old.keys()) - set(new.keys()):
            new.set(name, old.get(name))


@contextlib.contextmanager
def _noted(index: int) -> Iterator[None]:
    """Says in an error which row it is about."""
    try:
        yield
    except ConfigError as error:
        error.add_note(f"row {index} of the batch")
        raise


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
    for index, (row, everything, answer, version, reason, scores) in enumerate(
        zip(tokens, attended, sampled, versions, reasons, log_probs, strict=True)
    ):
        asked = everything & ~answer
        ids.append(row[asked].tolist())
        part = Completion(
            rid="before",
            output_ids=row[answer].tolist(),
            log_probs=None if scores is None else scores[answer].tolist(),
            text=None,
            finish_type=reason,
            matched_stop=None,
            prompt_tokens=len(ids[-1]),
            cached_tokens=0,
            version_spans=spans_of(version[answer].tolist()),
        )
        if settled.info.extras:
            part = _with_extras(
                part, flat[index], settled, None if scores is None else scores[asked]
            )
        parts.append(part)
    return ids, parts


def _unless_full(part: Completion, longest: int | None) -> Completion:
    """A part that no server would go on with, since the context is full, has ended there."""
    held = part.prompt_tokens + len(part.output_ids)
    if part.finish_type == "abort" and part.output_ids and room_for(held, longest) == 0:
        return replace(part, finish_type="length")
    return part


def _with_extras(
    part: Completion, row: TensorDictBase, settled: Settled, prompt: torch.Tensor | None
) -> Completion:
    """A part with the extras that came with it."""
    key = settled.info.key
    assert key is not None  # extras have nowhere else to be

    def extra(name: str) -> Any:
        value = row.get(below(key, name), None)
        return value.tolist() if isinstance(value, torch.Tensor) else getattr(value, "data", value)

    read: dict[str, Any] = {}
    for name in settled.info.extras:
        if name == "top_log_probs":
            table = zip(extra("top_log_probs"), extra("top_token_ids"), strict=True)
            read[name] = [list(zip(scores, ids, strict=True)) for scores, ids in table]
        elif name == "sampling_mask":
            kept, offsets = extra("sampling_mask_ids"), extra("sampling_mask_offsets")
            read[name] = [kept[a:b] for a, b in itertools.pairwise(offsets)]
        elif name == "hidden_states":
            first, *others = extra(name) or [[]]
            read[name] = [[first], *others] if first else None
        elif name == "routed_experts":
            experts = row.get(below(key, name))
            read[name] = base64.b64encode(experts.cpu().numpy().tobytes()).decode()
        elif name == "input_log_probs":
            known = prompt is not None and not bool(prompt[1:].isnan().any())
            read[name] = prompt.tolist() if known and prompt is not None else None
        else:
            field = {"request_id": "rid", "latency": "latency_s"}.get(name, name)
            read[field] = extra({"latency": "latency_s"}.get(name, name))
    return replace(part, **read)


def _rows(flat: TensorDictBase, key: NestedKey | None, *parts: str) -> list[torch.Tensor]:
    path = None if key is None else below(key, *parts)
    rows = None if path is None else rows_of(flat, path)
    if rows is None:
        what = f"{' '.join(parts)!r} under an output key of None" if key is None else f"{path!r}"
        raise InputError(
            f"resume reads {what} of what the policy returned, which is missing: leave no output "
            "key out with partial_rollouts=True."
        )
    return rows


def _reasons(flat: TensorDictBase, key: NestedKey | None) -> list[Any]:
    reasons = None if key is None else flat.get(below(key, "finish_reason"), None)
    if reasons is None:
        raise InputError(f"resume reads the finish reasons under {key!r}, which are missing.")
    return reasons if isinstance(reasons, list) else list(reasons.tolist())
