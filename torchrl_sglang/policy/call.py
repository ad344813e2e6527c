"""One call of the policy: from its TensorDict to requests, and from completions to its outputs."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensordict import LazyStackedTensorDict, TensorDictBase, lazy_stack

from ..errors import EmptyBatchError, InputError
from ..generate.completion import Completion
from ..generate.parse import Group
from ..generate.request import GenerateRequest
from ..generate.seeds import own_seeds
from ..service.service import AsyncSGLang
from .arguments import Settled, flattened, text_options, unflattened
from .batching import Batcher, BatchingConfig, Done
from .outputs.extras import build_info
from .outputs.tensors import Arrived, build_outputs, make_rows, stacked
from .outputs.texts import as_messages, contents
from .prompts.read import Prompts, read_prompts
from .prompts.turns import Turn, chat_key
from .requests.rows import CallOptions, check_log_probs, make_requests, read_row_options
from .requests.stops import Stops, cut_at_stops, take_over
from .score import build_scores, check_scoring, read_places, scoring_requests

Groups = list[Group]


def shared_batcher(
    service: AsyncSGLang, config: BatchingConfig | None
) -> Batcher[Sequence[GenerateRequest], Groups] | None:
    """What lets several threads share requests; None where they are not to."""
    return None if config is None else Batcher(SharedCalls(service), config)


@dataclass(frozen=True)
class SharedCalls:
    """Sends the requests of several calls together. A class, since closures can't be pickled."""

    service: AsyncSGLang

    def __call__(self, calls: list[Sequence[GenerateRequest]], done: Done[Groups]) -> None:
        """Runs the calls; each is done as soon as its own requests are."""
        rows = [(call, row) for call, requests in enumerate(calls) for row in range(len(requests))]
        arrived: list[dict[int, Group]] = [{} for _ in calls]

        def arrive(index: int, group: Group) -> None:
            call, row = rows[index]
            groups = arrived[call]
            groups[row] = group
            if len(groups) == len(calls[call]):
                done(call, [groups[row] for row in range(len(groups))])

        batch = [calls[call][row] for call, row in rows]
        self.service.complete_each(batch, [row for _, row in rows], arrive)


class Call:
    """One call of the policy.

    Attributes:
        requests: what to send, one per row of the flattened input.
    """

    _stops: Stops = ()  # of each request; empty where the servers match them

    def __init__(
        self,
        td: TensorDictBase,
        settled: Settled,
        service: AsyncSGLang,
        kwargs: Mapping[str, Any],
    ) -> None:
        if 0 in td.batch_size:  # numel() is at least 1
            raise EmptyBatchError(f"the batch is empty: batch size {tuple(td.batch_size)}.")
        self._batch_size = td.batch_size
        self._settled = settled
        self._options = updated_options(settled.call, kwargs, settled)
        flat = flattened(td)
        self._prompts = read_prompts(flat, settled.prompts)
        self.requests = self._make_requests(flat, service)

    def _make_requests(self, flat: TensorDictBase, service: AsyncSGLang) -> list[GenerateRequest]:
        rows = read_row_options(flat, self._settled.sampling_key)
        if not self._settled.generate:
            self._places = read_places(flat, self._prompts, self._settled.prompts)
            return scoring_requests(self._prompts, rows, self._options)
        requests = make_requests(self._prompts, rows, self._options, service)
        requests, self._stops = take_over(requests, service.info.features, self._settled.tokenizer)
        return own_seeds(requests)  # here, since several calls may share a batch

    @functools.cached_property
    def _arrived(self) -> Arrived:
        settled = self._settled
        needs_text = settled.outputs.text_key is not None or settled.mode == "history"
        return Arrived(settled.tokenizer if needs_text and settled.generate else None)

    def arrive(self, completions: Sequence[Completion]) -> None:
        """Does what can be done as soon as one request is finished."""
        if self._settled.generate and not self._stops:
            for completion in completions:
                self._arrived.take(completion)

    def outputs(self, completions: Sequence[Completion]) -> TensorDictBase:
        """The outputs, in the input's batch dimensions (and one of samples)."""
        settled, prompts = self._settled, self._prompts
        if not settled.generate:
            scores = build_scores(prompts, completions, self._places, settled.outputs)
            return unflattened(scores, self._batch_size, None)
        if self._options.sampling.n > 1:
            prompts = repeated(prompts, self._options.sampling.n)
        completions = cut_at_stops(completions, self.requests, self._stops, settled.tokenizer)
        out = self._rows(prompts, exact(self.requests, completions, self._options))
        return unflattened(out, self._batch_size, settled.num_samples)

    def _rows(self, prompts: Prompts, completions: Sequence[Completion]) -> LazyStackedTensorDict:
        settled = self._settled
        spec = replace(settled.outputs, text=text_options(self._options.sampling))
        rows = make_rows(prompts, completions, self._arrived, spec)
        decoded = self._arrived.texts(completions)
        columns = build_outputs(rows, prompts, completions, decoded, spec)
        if settled.info.key is not None:
            columns[settled.info.key] = build_info(rows, completions, settled.info)
        if decoded is not None and prompts.texts is not None:
            given_out = None if spec.text_key is None else columns[spec.text_key]
            self._keep_turns(prompts, completions, decoded, given_out)
        return stacked(columns, len(completions))

    def _keep_turns(
        self,
        prompts: Prompts,
        completions: Sequence[Completion],
        decoded: list[str],
        given_out: Sequence[Any] | None,
    ) -> None:
        """Remembers the tokens of this turn, for prompts that go on from it.

        These go on from the messages, or else from the texts that were given out.
        """
        prompted, outputs = self._settled.prompts, self._settled.outputs
        if prompts.chats is not None:
            decoded = as_messages(decoded, prompts.begun, outputs.tokenizer)
            answers = contents(completions, decoded, outputs.tokenizer, outputs.special)
        elif given_out is not None:
            answers = [text.response for text in given_out]
        else:
            return
        assert prompts.texts is not None
        for row, (completion, said, answer) in enumerate(
            zip(completions, decoded, answers, strict=True)
        ):
            if not completion.output_ids:
                continue
            text = prompts.texts[row] + answer
            turn = Turn(
                ids=[*prompts.ids[row], *completion.output_ids],
                text=text,
                cut=said[len(answer) :] if said.startswith(answer) else self._ending(completion),
                answered=bool(answer),
                chat=text if prompts.chats is None else self._chat(prompts, row, answer),
            )
            prompted.memory.keep(turn)

    def _ending(self, completion: Completion) -> str:
        """The special token that ended a text which was given out without any."""
        last, outputs = completion.output_ids[-1:], self._settled.outputs
        ended = outputs.special.ids.issuperset(last)
        return str(outputs.tokenizer.decode(last, skip_special_tokens=False)) if ended else ""

    @staticmethod
    def _chat(prompts: Prompts, row: int, answer: str) -> Hashable:
        """What identifies the chat that a turn ended."""
        assert prompts.chats is not None
        messages = list(prompts.chats[row])
        begun = prompts.begun[row] if prompts.begun is not None else None
        if begun is not None:
            messages.pop()
        content = (begun or "") + answer
        return chat_key([*messages, {"role": "assistant", "content": content}])


def updated_options(
    options: CallOptions, kwargs: Mapping[str, Any], settled: Settled
) -> CallOptions:
    """The call's own options, laid over those of the wrapper."""
    if not kwargs:
        return options
    own = dict(kwargs)
    lora = own.pop("lora", options.lora)
    processor = own.pop("processor", options.processor)
    sampling = options.sampling.updated(own, ("lora", "processor"))
    options = replace(options, sampling=sampling, lora=lora, processor=processor)
    if not settled.generate:
        check_scoring(sampling, processor)
        return options
    if sampling.n != (settled.num_samples or 1):
        raise InputError(
            f"n={sampling.n} would change the shape of the outputs, which num_samples="
            f"{settled.num_samples} gives: use get_new_version(num_samples={sampling.n})."
        )
    check_log_probs(options)
    return options


def exact(
    requests: Sequence[GenerateRequest], completions: Sequence[Completion], options: CallOptions
) -> Sequence[Completion]:
    """In corrected mode, log-probs of the distribution that was sampled from."""
    if options.log_probs_mode != "corrected" or not options.return_log_probs:
        return completions
    asked = [request for request in requests for _ in range(request.num_samples)]
    return [
        replace(completion, log_probs=[0.0] * len(completion.output_ids))
        if request.sampling.greedy
        else replace(completion, log_probs=completion.sampling_log_probs or completion.log_probs)
        for request, completion in zip(asked, completions, strict=True)
    ]


def repeated(prompts: Prompts, count: int) -> Prompts:
    """Every prompt ``count`` times, one after the other."""

    def each(values: Any) -> Any:
        return None if values is None else [value for value in values for _ in range(count)]

    history = prompts.history
    if history is not None:
        history = lazy_stack(each(history.unbind(0)))
    return Prompts(
        ids=each(prompts.ids),
        texts=each(prompts.texts),
        history=history,
        chats=each(prompts.chats),
        begun=each(prompts.begun),
    )
