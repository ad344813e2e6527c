"""Samples for one call of the policy: from its TensorDict to requests, and back to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tensordict import TensorDictBase, lazy_stack

from ..errors import InputError
from ..generate.completion import Completion
from ..generate.parse import Group
from ..generate.request import GenerateRequest
from ..generate.seeds import own_seeds
from ..service.service import AsyncSGLang
from .arguments import Settled, flattened, unflattened
from .batching import Batcher, BatchingConfig, Done
from .outputs.writer import RowWriter
from .prompts.read import Prompts, read_prompts
from .requests.rows import (
    CallOptions,
    check_log_probs,
    make_requests,
    overlaid,
    read_row_options,
)
from .requests.stops import cut_at_stops, take_over

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


class Call(Protocol):
    """One call of the policy: sampling, scoring, or resuming."""

    @property
    def requests(self) -> list[GenerateRequest]:
        """What to send."""

    def arrive(self, completions: Sequence[Completion]) -> None:
        """Does what can be done as soon as one request is finished."""

    def outputs(self, completions: Sequence[Completion]) -> TensorDictBase:
        """What the policy returns, from the completions of all requests."""


class Sampling:
    """A call that samples.

    Attributes:
        requests: what to send, one per row of the flattened input.
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
        self._options = updated_options(settled.call, kwargs, settled.num_samples)
        self._prompts = read_prompts(flat, settled.prompts)
        self._writer = RowWriter(settled, self._options.sampling)
        rows = read_row_options(flat, settled.sampling_key)
        requests = make_requests(self._prompts, rows, self._options, service)
        # Stops of each request that are matched here; none where the servers match them.
        requests, self._stops = take_over(requests, service.info.features, settled.tokenizer)
        self.requests = own_seeds(requests)  # here, since several calls may share a batch

    def arrive(self, completions: Sequence[Completion]) -> None:
        """Does what can be done as soon as one request is finished."""
        if not self._stops:
            self._writer.arrive(completions)

    def outputs(self, completions: Sequence[Completion]) -> TensorDictBase:
        """The rows, in the input's batch dimensions and one of samples."""
        settled, prompts = self._settled, self._prompts
        if self._options.sampling.n > 1:
            prompts = repeated(prompts, self._options.sampling.n)
        completions = cut_at_stops(completions, self.requests, self._stops, settled.tokenizer)
        out = self._writer.rows(prompts, exact(self.requests, completions, self._options))
        return unflattened(out, self._batch_size, settled.num_samples)


def updated_options(
    options: CallOptions, kwargs: Mapping[str, Any], num_samples: int | None
) -> CallOptions:
    """The call's own options, laid over those of the wrapper."""
    if not kwargs:
        return options
    options = overlaid(options, kwargs)
    if options.sampling.n != (num_samples or 1):
        raise InputError(
            f"n={options.sampling.n} would change the shape of the outputs, which num_samples="
            f"{num_samples} gives: use get_new_version(num_samples={options.sampling.n})."
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
