"""The dtype of the servers' weights."""

from __future__ import annotations

import pytest
import torch

from helpers.worker_infos import worker_info
from torchrl_sglang.errors import WeightsError
from torchrl_sglang.weights.source.checkpoint import Writer
from torchrl_sglang.weights.source.expected import Expected, served_dtype


def expected(dtype: torch.dtype) -> Expected:
    none: frozenset[str] = frozenset()
    writer = Writer(torch.nn.Module())
    return Expected(
        model_path="/m",
        parameters={},
        tied={},
        optional=none,
        buffers=none,
        wide=none,
        dtype=dtype,
        writer=writer,
    )


@pytest.mark.parametrize(
    ("served", "model_type", "checkpoint", "result"),
    [
        ("auto", "qwen2", torch.bfloat16, torch.bfloat16),
        ("auto", "qwen2", torch.float16, torch.float16),
        ("auto", "qwen2", torch.float32, torch.float16),
        ("auto", None, torch.float32, torch.float16),
        ("auto", "gemma3_text", torch.float32, torch.bfloat16),
        ("bfloat16", "qwen2", torch.float32, torch.bfloat16),
        ("half", "qwen2", torch.bfloat16, torch.float16),
        ("float", "qwen2", torch.bfloat16, torch.float32),
        ("float32", "qwen2", torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_the_servers_weights(
    served: str, model_type: str | None, checkpoint: torch.dtype, result: torch.dtype
) -> None:
    assert (
        served_dtype(worker_info(dtype=served, model_type=model_type), expected(checkpoint))
        is result
    )


@pytest.mark.parametrize("served", ["int77", "nn", "Tensor"])
def test_a_dtype_that_torch_lacks(served: str) -> None:
    with pytest.raises(WeightsError, match=f"serves dtype '{served}'"):
        served_dtype(worker_info(dtype=served), expected(torch.bfloat16))
