"""Which way a push takes, as a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.worker_infos import ELSEWHERE, HERE, worker_info
from torchrl_sglang.servers.info import WorkerInfo
from torchrl_sglang.weights.connection import choose_method

CPU, GPU_0, GPU_1 = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))


def worker(url: str = HERE, **changes: Any) -> WorkerInfo:
    return worker_info(url=url, **changes)


CPU_SERVER = worker(device="cpu")


@pytest.mark.parametrize(
    ("infos", "device", "method", "reason"),
    [
        ([CPU_SERVER], CPU, "broadcast", "gloo"),
        ([CPU_SERVER, CPU_SERVER], CPU, "broadcast", "gloo"),
        ([worker(device="cpu", dp_size=2)], CPU, "disk", "data- or pipeline-parallel"),
        ([worker(gpus=(1,))], GPU_0, "broadcast", "GPUs of their own"),
        ([worker(gpus=(1,), tp_size=2)], GPU_0, "broadcast", "GPUs of their own"),
        ([worker(gpus=(1,))], GPU_1, "tensor", "the trainer's GPU"),
        ([worker(gpus=(0,)), worker(gpus=(1,))], GPU_1, "tensor", "the trainer's GPU"),
        ([worker(ELSEWHERE, gpus=(0,))], GPU_0, "broadcast", "GPUs of their own"),
        ([worker(gpus=(1,))], CPU, "disk", "no GPU"),
        ([worker(gpus=(1, 2), dp_size=2)], GPU_0, "disk", "data- or pipeline-parallel"),
        ([worker(gpus=(1, 2), pp_size=2)], GPU_0, "disk", "data- or pipeline-parallel"),
        ([worker(gpus=(1,)), worker(pp_size=2)], GPU_0, "disk", "data- or pipeline-parallel"),
        # DP attention shares the TP ranks, which a broadcast reaches.
        (
            [worker(gpus=(1, 2), tp_size=2, dp_size=2, dp_attention=True)],
            GPU_0,
            "broadcast",
            "GPUs of their own",
        ),
    ],
)
def test_auto(infos: list[WorkerInfo], device: torch.device, method: str, reason: str) -> None:
    choice = choose_method("auto", infos, device)
    assert choice.method == method
    assert reason in choice.reason


@pytest.mark.parametrize("method", ["broadcast", "tensor", "disk"])
def test_what_is_asked_for_is_done(method: Any) -> None:
    choice = choose_method(method, [worker(dp_size=2)], GPU_0)
    assert (choice.method, choice.reason) == (method, "it was asked for")
