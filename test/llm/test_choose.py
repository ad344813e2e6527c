"""Which way a push takes, as a table; and who counts as being on this machine."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from helpers.worker_infos import worker_info

from torchrl_sglang.servers.hosts import is_here
from torchrl_sglang.servers.info import WorkerInfo, _gpus
from torchrl_sglang.weights.connection import choose_method

HERE, ELSEWHERE = "http://127.0.0.1:1", "http://203.0.113.7:1"  # the second: documentation's own
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


@pytest.mark.parametrize(
    ("said", "gpus"),
    [
        ({"device": "cpu", "tp_size": 2, "dp_size": 1}, ()),
        ({"device": "cuda", "tp_size": 1, "dp_size": 1}, (0,)),
        ({"device": None, "tp_size": 2, "dp_size": 1, "base_gpu_id": 1}, (1, 2)),
        ({"tp_size": 2, "dp_size": 2, "base_gpu_id": 4}, (4, 5, 6, 7)),
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, (0, 1)),
        ({"tp_size": 2, "dp_size": 1, "pp_size": 2, "gpu_id_step": 2}, (0, 2, 4, 6)),
    ],
)
def test_gpus_of_a_server(said: dict[str, Any], gpus: tuple[int, ...]) -> None:
    assert _gpus(said) == gpus


def own_address() -> str:
    """An address of this machine that is no loopback one, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE.split("/")[2].split(":")[0], 9))  # sends nothing
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


@pytest.mark.parametrize(
    ("url", "here"),
    [
        (HERE, True),
        ("http://localhost:30000", True),
        ("http://[::1]:30000", True),
        (f"http://{own_address()}:30000", True),
        (ELSEWHERE, False),
        ("http://there.invalid:1", False),
    ],
)
def test_is_here(url: str, here: bool) -> None:
    assert is_here(url) is here
