"""Every way of weights into servers on GPUs, checked by log-probs: does each arrive everywhere?

    python benchmarks/check_gpu.py --out benchmarks/results/check_gpu.json
    python benchmarks/check_gpu.py --ways tensor tensor_tp2

Not a benchmark of speed. The trainer is on GPU 0; most ways need a second GPU. Models are made from
a config, with random weights. With ``--device cpu`` ways of one rank go over gloo or shared memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu_checks import about, error, make_dense, make_moe, perturb, sending_device, serve

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig

LORA_OPTIONS = {
    "enable_lora": True,
    "max_lora_rank": 16,
    "lora_target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One kind of server, and how weights should get there.

    Attributes:
        gpus: the server's GPUs; the trainer's is 0.
        expected: what ``method="auto"`` has to choose.
        options: of the server.
        make: writes the model.
        config: further options of the push.
    """

    gpus: list[int]
    expected: str
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[str, str], Any] = make_dense
    config: dict[str, Any] = field(default_factory=dict)


TP2 = {"tp_size": 2}
WAYS = {
    "broadcast": Way(gpus=[1], expected="broadcast"),
    "broadcast_flattened": Way(gpus=[1], expected="broadcast", config={"layout": "flattened"}),
    "in_place": Way(gpus=[1], expected="broadcast", config={"pause_mode": "in_place"}),
    "tensor": Way(gpus=[0], expected="tensor"),
    "tensor_other_gpu": Way(gpus=[1], expected="tensor", config={"method": "tensor"}),
    "tensor_tp2": Way(gpus=[0, 1], expected="tensor", options=TP2),
    "dp_attention": Way(
        gpus=[0, 1],
        expected="tensor",
        options={**TP2, "dp_size": 2, "enable_dp_attention": True},
        make=make_moe,
    ),
    "expert_parallel": Way(
        gpus=[0, 1],
        expected="tensor",
        options={**TP2, "ep_size": 2},
        make=make_moe,
    ),
    "disk_pp2": Way(gpus=[0, 1], expected="disk", options={"pp_size": 2}),
    "disk_dp2": Way(gpus=[0, 1], expected="disk", options={"dp_size": 2}),
    "disk_tp2": Way(gpus=[0, 1], expected="disk", options=TP2, config={"method": "disk"}),
    "lora": Way(gpus=[1], expected="lora", options=LORA_OPTIONS, config={"method": "lora"}),
}


def push_base(way: Way, service: AsyncSGLang, model: Any, num_pushes: int) -> dict[str, Any]:
    """Pushes several times; what was served before and after."""
    config = WeightSyncConfig(probe_tolerance=0.1, bucket_bytes=1 << 20, **way.config)
    scheme = SGLangWeightSyncScheme(service, device=sending_device(model), config=config)
    scheme.init_on_sender()
    start = time.perf_counter()
    scheme.connect()
    connect_s = time.perf_counter() - start
    before, after, pushes = [], [], []
    for _ in range(num_pushes):
        perturb(model)
        before.append(error(service, model))
        scheme.send(model)
        pushes.append(scheme.last_push)
        after.append(error(service, model))
    scheme.close()
    last = pushes[-1]
    return {
        "method": last.method,
        "reason": last.reason,
        "layout": last.layout,
        "verified_by": last.verified_by,
        "num_buckets": last.num_buckets,
        "connect_s": round(connect_s, 3),
        "push_s_median": statistics.median(p.push_s for p in pushes),
        "error_before": before,
        "error_after": after,
    }


def push_adapter(way: Way, service: AsyncSGLang, model: Any, num_pushes: int) -> dict[str, Any]:
    """Pushes a LoRA adapter of changing values; compared with the model that it is merged into."""
    from peft import LoraConfig, get_peft_model

    modules = LORA_OPTIONS["lora_target_modules"]
    peft_model = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"),
    )
    config = WeightSyncConfig(probe_tolerance=0.1, **way.config)
    scheme = SGLangWeightSyncScheme(service, device=sending_device(model), config=config)
    scheme.init_on_sender()
    scheme.connect()
    before, after, pushes = [error(service, model)], [], []
    for _ in range(num_pushes):
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        merged = copy.deepcopy(peft_model).merge_and_unload()
        before.append(error(service, merged, None if not pushes else config.adapter_name))
        scheme.send(peft_model)
        pushes.append(scheme.last_push)
        after.append(error(service, merged, config.adapter_name))
    scheme.close()
    return {
        "method": pushes[-1].method,
        "reason": pushes[-1].reason,
        "verified_by": pushes[-1].verified_by,
        "push_s_median": statistics.median(p.push_s for p in pushes),
        "error_before": before[1:],
        "error_after": after,
        "error_of_base": [before[0], error(service, model)],
    }


def check(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: what was pushed how, and whether it arrived."""
    way = WAYS[name]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = way.make(folder, "cpu" if args.device == "cpu" else "cuda:0")
        with serve(folder, args.device, way.gpus, log_dir=_logs(args, name), **way.options) as to:
            row = {"way": name, "start_s": round(time.perf_counter() - start, 1)}
            row["error_at_start"] = error(to, model)
            push = push_adapter if way.expected == "lora" else push_base
            row |= push(way, to, model, args.pushes)
            row |= about(to, args.device, "check_gpu.py")
    row["arrived"] = all(
        # The adapter's first values were never served before: then the base model is asked.
        new < args.tolerance < old
        for old, new in zip(row["error_before"], row["error_after"], strict=True)
    ) and all(base < args.tolerance for base in row.get("error_of_base", []))
    row["as_expected"] = args.device == "cpu" or row["method"] == way.expected
    return row


def _logs(args: argparse.Namespace, name: str) -> Path | None:
    return None if args.log_dir is None else args.log_dir / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--pushes", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.1, help="of log-probs")
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in args.ways:
        try:
            rows.append(check(name, args))
        except Exception as failure:  # noqa: BLE001
            traceback.print_exc()
            rows.append({"way": name, "failed": f"{type(failure).__name__}: {failure}"[:2000]})
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(not all(row.get("arrived") and row["as_expected"] for row in rows))


if __name__ == "__main__":
    main()
