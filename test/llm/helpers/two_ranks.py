"""Trainers of two ranks, each a process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import torch

from torchrl_sglang import AsyncSGLang
from torchrl_sglang.launch.ports import PortReservation

# Sharded by FSDP2, its weights moved a little from the checkpoint's.
TRAINER = """
import json, pickle, sys, time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from torchrl_sglang import SGLangWeightSyncScheme, WeightSyncConfig, assist_push

service, path, what = pickle.loads(bytes.fromhex(sys.argv[1]))
dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
generator = torch.Generator().manual_seed(5)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.std())
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
if what == "nan" and rank == 0:
    with torch.no_grad():
        model.model.norm.weight.to_local().fill_(float("nan"))
said = {}
try:
    if rank == 0:
        config = WeightSyncConfig(bucket_bytes=1 << 18, verify_method="checksum")
        scheme = SGLangWeightSyncScheme(service, config=config)
        scheme.init_on_sender()
        scheme.connect()
        scheme.send(model)
        push = scheme.last_push
        said = {"verified_by": push.verified_by, "buckets": push.num_buckets}
        scheme.close()
    else:
        assist_push(model)
except Exception as error:
    said = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(said), flush=True)
dist.destroy_process_group()
"""


def in_ranks(script: str, *argv: str, timeout_s: float = 90.0) -> list[dict[str, Any]]:
    """What each of two ranks said."""
    with PortReservation() as port:
        number = port.port
    ranks = []
    for rank in range(2):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number), "WORLD_SIZE": "2"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *argv],
                env={**os.environ, **env, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told_us = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            with rank:
                rank.kill()
    assert all(out for out, _ in told_us), [err[-3000:] for _, err in told_us]
    return [json.loads(out.splitlines()[-1]) for out, _ in told_us]


@torch.no_grad()
def moved(model: Any) -> Any:
    """A model with the weights that `TRAINER` gives it, in bfloat16."""
    model.float()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.std())
    return model.bfloat16()


def trained(service: AsyncSGLang, path: Any, what: str = "") -> list[dict[str, Any]]:
    """What each of two ranks said after a push."""
    return in_ranks(TRAINER, pickle.dumps((service, str(path), what)).hex())
