"""A trainer of two ranks, sharded by FSDP2, pushes to the shared server."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.prompts import PROMPTS
from helpers.servers import worst_error
from helpers.two_ranks import moved, trained
from torchrl_sglang import AsyncSGLang

pytestmark = pytest.mark.slow


def test_both_ranks_gather_and_one_pushes(
    service: AsyncSGLang, model: Any, model_path: Any, restore_weights: None
) -> None:
    first, second = trained(service, model_path)
    assert first == {"verified_by": "checksum", "buckets": first["buckets"]}
    assert first["buckets"] > 3
    assert second == {}
    completions = service.generate(PROMPTS, {"max_new_tokens": 24, "ignore_eos": True})
    assert worst_error(moved(model), PROMPTS, completions) < 0.02


def test_what_is_wrong_is_said_on_both_ranks(service: AsyncSGLang, model_path: Any) -> None:
    first, second = trained(service, model_path, "nan")
    assert first["error"].startswith("WeightsError")
    assert "NaN" in first["error"]
    assert second["error"].startswith("PushError")
    assert "rank 0 said: WeightsError" in second["error"]
    assert service.state.value == "synced"
