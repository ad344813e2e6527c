"""Metadata of what a trainer holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import set_list_to_stack
from torch import nn

from helpers.steps import NORM
from torchrl_sglang import get_model_metadata
from torchrl_sglang.errors import WeightsError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using WeightUpdaterBase is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:tensordict"),
    pytest.mark.usefixtures("lists_stack"),
]


@pytest.fixture
def lists_stack() -> Iterator[None]:
    with set_list_to_stack(True):
        yield


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
