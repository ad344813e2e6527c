"""Pushes from a trainer of two ranks, sharded by FSDP2.

    torchrun --nproc-per-node 2 benchmarks/bench_sync_sharded.py --url http://127.0.0.1:30000 \
        --model MODEL --gpus 0 3 --out benchmarks/results/sync_sharded_7.6b_h200.json

Rank 0 gathers the parameters bucket by bucket while it sends; the result tells its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig, assist_push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gpus", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--pushes", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--bucket-gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", args.gpus[rank])
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    mesh = init_device_mesh("cuda", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    if rank == 0:
        scheme = SGLangWeightSyncScheme(
            AsyncSGLang.connect(args.url),
            device=device,
            config=WeightSyncConfig(verify="never", bucket_bytes=int(args.bucket_gib * (1 << 30))),
        )
        scheme.init_on_sender()
        scheme.connect()
    dist.barrier()
    results = []
    for _ in range(args.warmup + args.pushes):
        if rank == 0:
            scheme.send(model)
            results.append(scheme.last_push)
        else:
            assist_push(model)
    if rank == 0:
        pushes = [result.push_s for result in results[args.warmup :]]
        row = {
            "name": "ours, FSDP2 of two ranks",
            "hardware": torch.cuda.get_device_name(device),
            "sglang": scheme.service.sglang_version,
            "torch": version("torch"),
            "bytes": num_bytes,
            "bucket_gib": args.bucket_gib,
            "layout": results[-1].layout,
            "push_s_median": statistics.median(pushes),
            "gb_per_s": num_bytes / statistics.median(pushes) / 1e9,
            "push_s": pushes,
            "bytes_held": held,
            "bytes_peak_more": torch.cuda.max_memory_allocated(device) - held,
            "command": " ".join(["torchrun --nproc-per-node 2", *sys.argv]),
        }
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps([row], indent=1) + "\n")
        scheme.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
