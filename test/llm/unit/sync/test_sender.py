"""Metadata of what a trainer holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.marks import LISTS_STACK, QUIET, UPDATER
from helpers.steps import NORM
from torchrl_sglang import get_model_metadata
from torchrl_sglang.errors import WeightsError

pytestmark = [*QUIET, UPDATER, LISTS_STACK]


def test_metadata_says_the_trainers_dtype_and_what_a_checkpoint_has(model: Any) -> None:
    assert get_model_metadata(model.float())[NORM][0] is torch.float32
    assert "inv_freq" not in " ".join(get_model_metadata(model))
    model.register_buffer("computed", torch.zeros(1), persistent=False)
    model.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    model.register_buffer("scale", torch.zeros(1))
    assert "computed" not in get_model_metadata(model)
    assert "count" not in get_model_metadata(model)
    assert "scale" in get_model_metadata(model)


def test_metadata_of_what_has_none() -> None:
    with pytest.raises(WeightsError, match="no parameters"):
        get_model_metadata(nn.Identity())
    with pytest.raises(WeightsError, match="int"):
        get_model_metadata(3)
