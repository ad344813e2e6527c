"""What goes wrong in a processor on the server ends the requests concerned, and nothing else."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.processors import NaNRow, NothingLeft, NotMade, Raising, fake_req, load, rows_of, run
from torchrl_sglang.generate.processors.make import allowed_tokens, user_processor
from torchrl_sglang.generate.processors.remote import num_generated

VOCAB = 8


class Reduced:
    """Another shape than the logits'."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        return logits[:, :2]


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's module of finish reasons, which the server's process has loaded."""
    module = SimpleNamespace(FINISH_ABORT=lambda *args: args)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", module)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kv_committed_len": 5}, 2),  # SGLang 0.5.15
        ({"kv_committed_len": 5, "kv": SimpleNamespace(kv_allocated_len=9)}, 2),  # 0.5.17
        ({"kv_committed_len": 5, "kv": None}, 2),
        ({"kv": SimpleNamespace(kv_committed_len=5)}, 2),  # 0.5.23
        ({"kv": SimpleNamespace(kv_committed_len=2)}, 0),
        ({}, 1),
    ],
)
def test_generated_tokens_are_counted_from_the_cache(fields: Any, expected: int) -> None:
    req = SimpleNamespace(origin_input_ids=[1, 2, 3], output_ids=[0], **fields)
    assert num_generated(req) == expected


def test_equal_masks_are_one_tensor_for_as_long_as_they_are_used() -> None:
    from torchrl_sglang.generate.processors import remote as served

    pipeline = served.processor(["tokens"])()
    processors = [allowed_tokens([1, 2]), allowed_tokens([1, 2]), allowed_tokens([3])]
    rows = rows_of(processors, [fake_req() for _ in processors])
    before = len(served._MASKS)
    for _ in range(2):
        pipeline(torch.randn(3, VOCAB), rows)
        assert len(served._MASKS) == before + 2
    assert rows[0]["__opened__"][0] is rows[1]["__opened__"][0]
    del rows
    assert len(served._MASKS) == before


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Raising, "KeyError: 'missing'"),
        (Reduced, r"it has to return logits of shape \(2, 8\), and returned \(2, 2\)"),
        (NotMade, "OSError: no such table"),
        (NothingLeft, "no finite logit"),
    ],
)
def test_a_failing_class_ends_its_requests(cls: type, message: str, finished: None) -> None:
    reqs = [fake_req(), fake_req()]
    result = run([user_processor(cls)] * 2, torch.randn(2, VOCAB), reqs)
    assert torch.isfinite(result).all()
    for req in reqs:
        said, status, _ = req.to_finish
        assert status == 400
        assert re.search(message, said), said


def test_a_bad_row_ends_its_own_request_alone(finished: None) -> None:
    reqs = [fake_req(), fake_req()]
    logits = torch.randn(2, VOCAB)
    processors = [user_processor(NaNRow, {"nan": nan}) for nan in (True, False)]
    result = run(processors, logits.clone(), reqs)
    assert "NaN" in reqs[0].to_finish[0]
    assert reqs[1].to_finish is None
    assert torch.isfinite(result[0]).all()
    assert torch.equal(result[1], logits[1])


def test_a_mask_outside_of_the_vocabulary_ends_its_own_request_alone(finished: None) -> None:
    reqs = [fake_req(), fake_req()]
    result = run([allowed_tokens([VOCAB]), allowed_tokens([2])], torch.randn(2, VOCAB), reqs)
    assert "none of the allowed ids is in the model's vocabulary (8)" in reqs[0].to_finish[0]
    assert reqs[1].to_finish is None
    assert torch.isfinite(result[0]).all()
    assert torch.isfinite(result[1]).nonzero().flatten().tolist() == [2]


def test_parameters_that_a_router_dropped() -> None:
    with pytest.raises(RuntimeError, match="without custom_params"):
        load(allowed_tokens([1]))(torch.randn(1, VOCAB), [None])
