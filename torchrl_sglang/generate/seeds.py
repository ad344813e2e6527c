"""Seeds the requests of one call: equal prompts get different seeds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from .request import GenerateRequest
from .sampling import DISTRIBUTION, SamplingParams


def own_seeds(batch: Sequence[GenerateRequest]) -> list[GenerateRequest]:
    """The requests of one call, with seeds under which no two samples come out the same.

    A server that samples deterministically answers equal prompts with one seed equally. So each
    sample takes the first seed, from the one that its request was given on, which no equal prompt
    before it in the call has. Requests without a seed have one of their id, see
    `GenerateRequest.seeds`.
    """
    taken: dict[Hashable, set[int]] = {}
    following: dict[Hashable, int] = {}
    requests = list(batch)
    for index, request in enumerate(batch):
        given = request.sampling.sampling_seed
        if given is None or request.scoring:
            continue
        prompt, count = _sampled_from(request), request.num_samples
        used = taken.setdefault(prompt, set())
        seed = following.get((prompt, given), given)
        while not used.isdisjoint(range(seed, seed + count)):
            seed += 1
        used.update(range(seed, seed + count))
        following[prompt, given] = seed + count
        if seed != given:
            sampling = replace(request.sampling, sampling_seed=seed)
            requests[index] = replace(request, sampling=sampling)
    return requests


def _sampled_from(request: GenerateRequest) -> Hashable:
    """The same for requests whose samples come out the same under one seed."""
    ids = request.input_ids
    if ids is not None and request.session is not None:
        ids = (*request.session.before, *ids)
    change = None if request.processor is None else repr(request.processor)
    return ids, request.text, request.media, request.lora, change, _options(request.sampling)


def _options(sampling: SamplingParams) -> Hashable:
    biases = sampling.logit_bias
    return (
        None if biases is None else frozenset(biases.items()),
        *(getattr(sampling, name) for name in DISTRIBUTION),
    )
