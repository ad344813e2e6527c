"""Outputs of two parts on another device."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import torch

from helpers.parts import part
from torchrl_sglang.policy.outputs.extras import InfoSpec
from torchrl_sglang.policy.resume import _with_extras


class OnGPU(torch.Tensor):
    """A tensor that numpy can't read before it was copied, as one on a GPU."""

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def cpu(self, *args: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_routed_experts_of_outputs_on_a_gpu() -> None:
    experts = torch.arange(6, dtype=torch.int32).view(3, 2)
    row = {("rollout", "routed_experts"): experts.as_subclass(OnGPU)}
    settled = SimpleNamespace(info=InfoSpec(key="rollout", extras={"routed_experts": 1}))
    read = _with_extras(part([7]), row, settled, None).routed_experts
    assert base64.b64decode(read) == experts.numpy().tobytes()
