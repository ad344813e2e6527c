"""Logit processors: what they do to logits."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.processors import Force, fake_req, run
from torchrl_sglang.errors import ConfigError, InputError
from torchrl_sglang.generate.processors.make import (
    allowed_tokens,
    combined,
    disallowed_tokens,
    progress_temperature,
    user_processor,
)
from torchrl_sglang.generate.request import LogitProcessor

VOCAB = 8

INF = math.inf


def open_ids(processor: LogitProcessor, vocab: int = VOCAB) -> list[int]:
    return torch.isfinite(run([processor], torch.randn(1, vocab))[0]).nonzero().flatten().tolist()


MASK = torch.tensor([False, True, False, True])


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (allowed_tokens([1, 3]), [1, 3]),
        (allowed_tokens({3, 1}), [1, 3]),
        (allowed_tokens(range(1, 4, 2)), [1, 3]),
        (allowed_tokens(np.array([1, 3])), [1, 3]),
        (allowed_tokens(torch.tensor([3, 1, 1])), [1, 3]),
        (allowed_tokens(MASK), [1, 3]),
        (allowed_tokens(MASK.numpy()), [1, 3]),
        (allowed_tokens([0]), [0]),
        (allowed_tokens([7, VOCAB, 10**6]), [7]),
        (disallowed_tokens([1, 3]), [0, 2, 4, 5, 6, 7]),
        (disallowed_tokens(MASK), [0, 2, 4, 5, 6, 7]),
        (disallowed_tokens([]), list(range(VOCAB))),
        (disallowed_tokens([10**6]), list(range(VOCAB))),
        (combined(allowed_tokens([1, 3, 6]), disallowed_tokens([3])), [1, 6]),
    ],
)
def test_what_a_mask_leaves(processor: LogitProcessor, expected: list[int]) -> None:
    assert open_ids(processor) == expected


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: allowed_tokens([]), InputError, "no id is left"),
        (lambda: allowed_tokens(torch.zeros(5, dtype=torch.bool)), InputError, "no id is left"),
        (lambda: allowed_tokens(torch.zeros(0, dtype=torch.long)), InputError, "no id is left"),
        (lambda: disallowed_tokens(torch.ones(5, dtype=torch.bool)), InputError, "every id"),
        (
            lambda: combined(allowed_tokens([1, 2]), disallowed_tokens([1, 2])),
            InputError,
            "exclude each other",
        ),
        (lambda: combined(allowed_tokens([1]), allowed_tokens([2])), InputError, "exclude"),
        (lambda: allowed_tokens([-1]), InputError, "-1 is no token id"),
        (lambda: allowed_tokens([2**40]), InputError, "is no token id"),
        (lambda: allowed_tokens([True, False]), ConfigError, "bool tensor"),
        (lambda: allowed_tokens([1.0]), ConfigError, "1.0 is no token id"),
        (lambda: allowed_tokens("1 2"), ConfigError, "sequence of integers"),
        (lambda: allowed_tokens(3), ConfigError, "sequence of integers"),
        (lambda: allowed_tokens(torch.zeros(2, 5, dtype=torch.bool)), ConfigError, "1-D"),
        (lambda: allowed_tokens(torch.zeros(5)), ConfigError, "torch.float32"),
        (lambda: progress_temperature(0.0, 1.0, 5), ConfigError, "start=0.0"),
        (lambda: progress_temperature(1.0, math.nan, 5), ConfigError, "end=nan"),
        (lambda: progress_temperature(1.0, 1.0, 0), ConfigError, "over_tokens=0"),
        (lambda: progress_temperature(1.0, 1.0, 1.5), ConfigError, "over_tokens=1.5"),
        (lambda: combined(), ConfigError, "at least one"),
        (
            lambda: combined(LogitProcessor(serialized="x", params={})),
            ConfigError,
            "argument 0 is a LogitProcessor",
        ),
        (
            lambda: combined(*[progress_temperature(1.0, 0.5, 5)] * 2),
            ConfigError,
            "one progress_temperature",
        ),
    ],
)
def test_refused_at_once(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("processor", "smallest"),
    [
        (allowed_tokens([5, 9]), 6),
        (disallowed_tokens([0, 1]), 3),
        (disallowed_tokens([3]), 1),
        (combined(allowed_tokens([5, 9]), disallowed_tokens([5])), 10),
        (combined(disallowed_tokens([0]), disallowed_tokens([1, 2])), 4),
        (progress_temperature(1.0, 0.5, 5), 1),
    ],
)
def test_smallest_vocabulary(processor: Any, smallest: int) -> None:
    assert processor.min_vocab_size == smallest
    assert open_ids(processor, smallest) != []


def test_rows_have_masks_of_their_own() -> None:
    processors = [allowed_tokens([1, 2]), allowed_tokens([2, 3]), disallowed_tokens([0])]
    logits = torch.randn(3, VOCAB)
    result = run(processors, logits.clone())
    for row, processor in enumerate(processors):
        ids = open_ids(processor)
        assert torch.isfinite(result[row]).nonzero().flatten().tolist() == ids
        assert torch.equal(result[row, ids], logits[row, ids])


def test_a_mask_wins_over_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2:] = -INF
    probs = run([allowed_tokens([2, 3])], logits.clone()).softmax(-1)
    assert probs[0].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    probs = run([allowed_tokens([1, 2, 3])], logits.clone()).softmax(-1)
    assert probs[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_two_masks_and_a_penalty() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = -INF
    both = combined(allowed_tokens([1, 2]), disallowed_tokens([1]))
    assert run([both], logits).softmax(-1)[0, 2] == 1


@pytest.mark.parametrize(
    ("generated", "expected"), [(0, 2.0), (1, 1.75), (4, 1.0), (6, 0.5), (9, 0.5)]
)
@pytest.mark.parametrize("own", [1.0, 0.5])
def test_the_temperature_moves(generated: int, expected: float, own: float) -> None:
    logits = torch.randn(1, VOCAB)
    reqs = [fake_req(generated, own)]
    result = run([progress_temperature(2.0, 0.5, 6)], logits.clone(), reqs)
    torch.testing.assert_close(result / own, logits / expected)


def test_rows_have_temperatures_of_their_own() -> None:
    logits = torch.randn(3, VOCAB)
    processors = [progress_temperature(t, 2 * t, 4) for t in (0.5, 1.0, 2.0)]
    result = run(processors, logits.clone(), [fake_req(k) for k in (0, 2, 4)])
    torch.testing.assert_close(result, logits / torch.tensor([[0.5], [1.5], [4.0]]))


def test_combined_applies_in_order() -> None:
    both = combined(user_processor(Force, {"token": 5}), allowed_tokens([1]))
    assert torch.isfinite(run([both], torch.randn(1, VOCAB))).nonzero().tolist() == []
    flipped = combined(allowed_tokens([1]), user_processor(Force, {"token": 5}))
    assert open_ids(flipped) == [5]


def test_processors_can_be_pickled_and_compared() -> None:
    made = combined(allowed_tokens([1, 2]), progress_temperature(1.0, 0.5, 5))
    assert pickle.loads(pickle.dumps(made)) == made
    assert repr(made) == "StagedProcessor(tokens, temperature)"
