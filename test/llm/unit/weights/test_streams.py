"""Handing tensors over to a thread."""

from __future__ import annotations

import torch

from torchrl_sglang.weights.streams import handed_over


def test_handing_over_without_a_gpu() -> None:
    ready = handed_over([torch.zeros(2)], torch.device("cpu"))
    with ready():
        pass
