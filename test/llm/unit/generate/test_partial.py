"""Continuations of what was aborted, and the parts joined."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from helpers.parts import FORGOTTEN, part
from helpers.under_way import requests_of
from torchrl_sglang import (
    GenerateRequest,
    SamplingParams,
    allowed_tokens,
    combined,
    progress_temperature,
    user_processor,
)
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError
from torchrl_sglang.generate.completion import joined
from torchrl_sglang.generate.partial import continuation
from torchrl_sglang.generate.request import LogitProcessor

SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)

LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)  # many seconds


@pytest.mark.parametrize(
    ("done", "fewest", "left"),
    [([], 5, (20, 5)), ([7, 8], 5, (18, 3)), ([7] * 8, 5, (12, 0)), ([7] * 19, 0, (1, 0))],
)
def test_a_continuation(done: list[int], fewest: int, left: tuple[int, int]) -> None:
    sampling = SamplingParams(max_new_tokens=20, min_new_tokens=fewest, temperature=0.5)
    (request,) = requests_of(sampling, lora="x", partial_allowed=True)
    rest = continuation(request, part(done))
    assert rest.input_ids == (5, 6, 7, *done)
    assert (rest.sampling.max_new_tokens, rest.sampling.min_new_tokens) == left
    assert (rest.sampling.temperature, rest.lora, rest.partial_allowed) == (0.5, "x", True)
    assert rest.rid != request.rid


@pytest.mark.parametrize(
    ("request_of", "so_far", "error"),
    [
        (SHORT, part([7], "length"), ConfigError),
        (SHORT, part([7] * 4), ConfigError),
        (SHORT.updated({"n": 2}), part([7]), ConfigError),
        (SHORT.updated({"regex": "a*"}), part([7]), UnsupportedOptionError),
        (SHORT.updated({"json_schema": "{}"}), part([7]), UnsupportedOptionError),
    ],
)
def test_what_can_not_go_on(
    request_of: SamplingParams, so_far: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        continuation(requests_of(request_of)[0], so_far)
    with pytest.raises(ConfigError):
        continuation(GenerateRequest(text="hello", sampling=SHORT), so_far)


@pytest.mark.parametrize("options", [{"regex": "a*"}, *FORGOTTEN], ids=str)
def test_what_did_not_begin_may_go_on(options: dict[str, Any]) -> None:
    assert continuation(requests_of(SHORT.updated(options))[0], part([]))


@pytest.mark.parametrize("options", FORGOTTEN, ids=str)
def test_what_would_forget_the_first_part_does_not_go_on(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UnsupportedOptionError, match=f"with {name} was aborted after 1 tokens"):
        continuation(requests_of(SHORT.updated(options))[0], part([7]))


class Own:
    """A processor of a user's own."""

    def __call__(self, logits: Any, params: Any) -> Any:
        return logits


def test_processors_go_on_from_where_they_were() -> None:
    """Token by token the temperatures are those of a request that was not aborted."""

    def temperatures(processor: Any) -> list[float]:
        way = json.loads(processor.params["stages"][-1])
        start, end, length = way["start"], way["end"], way["over_tokens"]
        return [start + (end - start) * min(k / length, 1) for k in range(20)]

    mask = allowed_tokens([5, 6])
    for processor in (progress_temperature(2.0, 0.5, 8), progress_temperature(0.5, 1.5, 1)):
        whole = temperatures(processor)
        for done in (0, 1, 3, 7, 8, 11):
            (request,) = requests_of(LONG, processor=combined(mask, processor))
            rest = continuation(request, part([7] * done)).processor
            assert temperatures(rest)[: 20 - done] == pytest.approx(whole[done:])
            assert (rest.serialized, rest.params["stages"][0]) == (  # type: ignore[union-attr]
                request.processor.serialized,  # type: ignore[union-attr]
                request.processor.params["stages"][0],  # type: ignore[union-attr]
            )


@pytest.mark.parametrize(
    "made", [lambda: user_processor(Own), lambda: LogitProcessor(serialized="x")]
)
def test_processors_that_may_count_tokens_do_not_go_on(made: Callable[[], LogitProcessor]) -> None:
    (request,) = requests_of(SHORT, processor=made())
    assert continuation(request, part([])).processor == request.processor
    with pytest.raises(UnsupportedOptionError, match="would begin again"):
        continuation(request, part([7]))


def test_joined_parts() -> None:
    before = part([7, 8], top_log_probs=[[(-1.0, 7)], [(-2.0, 8)]], sampling_mask=[[7], [8, 9]])
    after = part(
        [9],
        "stop",
        "2",
        rid="b",
        prompt_tokens=5,
        matched_stop=9,
        top_log_probs=[[(-3.0, 9)]],
        sampling_mask=[[9]],
        input_log_probs=[float("nan"), -1.0, -2.0, -7.0, -8.0],
    )
    whole = joined(before, after)
    assert whole.output_ids == [7, 8, 9]
    assert whole.log_probs == [-7.0, -8.0, -9.0]
    assert [(s.version, s.start, s.end) for s in whole.version_spans] == [("1", 0, 2), ("2", 2, 3)]
    assert (whole.rid, whole.finish_type, whole.matched_stop) == ("b", "stop", 9)
    assert (whole.prompt_tokens, whole.cached_tokens, whole.latency_s) == (3, 1, 3.0)
    assert whole.top_log_probs == [[(-1.0, 7)], [(-2.0, 8)], [(-3.0, 9)]]
    assert whole.sampling_mask == [[7], [8, 9], [9]]
    assert whole.sampling_log_probs is None
    assert whole.input_log_probs[1:] == [-1.0, -2.0]
    assert whole.text is None


@pytest.mark.parametrize(("first", "second"), [([], [9]), ([7], [])])
def test_a_part_without_a_token(first: list[int], second: list[int]) -> None:
    whole = joined(part(first), part(second, version="2"))
    assert whole.output_ids == [*first, *second]
    assert [(s.start, s.end) for s in whole.version_spans] == [(0, 1)]


def test_three_parts_in_any_order() -> None:
    parts = [part([7, 8]), part([9], version="2"), part([10], "length", "2")]
    left = joined(joined(parts[0], parts[1]), parts[2])
    right = joined(parts[0], joined(parts[1], parts[2]))
    assert left.output_ids == right.output_ids == [7, 8, 9, 10]
    assert left.version_spans == right.version_spans
    assert left.log_probs == right.log_probs


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="log-probs"):
        joined(part([7]), part([8], log_probs=None))


def test_hidden_states_of_two_parts() -> None:
    before = part([7, 8], hidden_states=[[[0.0], [1.0], [2.0]], [3.0]])
    after = part([9, 10], hidden_states=[[[5.0], [6.0]], [7.0]])
    states = joined(before, after).hidden_states
    assert [states[0][-1], *states[1:]] == [[2.0], [3.0], [6.0], [7.0]]
