"""How fast weights reach the servers: this package, a bare loop, and TorchRL's own scheme.

    python benchmarks/bench_weight_sync.py --size 7.6b --out benchmarks/results/sync_7.6b_h200.json
    python benchmarks/bench_weight_sync.py --size 7.6b --sweep --plot sweep.png --out sweep.json
    python benchmarks/bench_weight_sync.py --gpus 0 0 --methods tensor disk  # trainer beside server

Starts a server on the second GPU (``--gpus``), or on the CPU with ``--device cpu --size tiny``, or
pushes to running ones with ``--url``. A push counts from the first announcement to the last
acknowledgement, and until the trainer's broadcasts have completed: on a GPU the server acknowledges
before the bytes have arrived.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from random_models import SIZES, random_model

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig

GIB = 1 << 30
SWEEP_GIB = (0.25, 0.5, 1, 2, 4)
ROUTE = "/update_weights_from_distributed"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Bench:
    """One model, one service, and rows of results."""

    def __init__(self, args: argparse.Namespace, service: AsyncSGLang, folder: Path) -> None:
        self.args = args
        self.service = service
        self.device = torch.device("cuda", args.gpus[0]) if args.device == "cuda" else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.to(self.device)
        self.num_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.rows: list[dict[str, Any]] = []

    def row(self, name: str, pushes: list[float], **more: Any) -> None:
        median = statistics.median(pushes)
        row = {
            "name": name,
            "model_params": sum(p.numel() for p in self.model.parameters()),
            "bytes": self.num_bytes,
            "engines": len(self.service.workers),
            "tp_sizes": [info.tp_size for info in self.service.cluster.infos],
            "push_s_median": median,
            "gb_per_s": self.num_bytes / median / 1e9,
            "push_s": pushes,
            **more,
        }
        self.rows.append(row)
        shown = {k: more[k] for k in ("method", "bucket_gib", "layout", "verify") if k in more}
        print(
            f"{name:8} {shown} push {median * 1e3:.1f} ms ({min(pushes) * 1e3:.1f} to "
            f"{max(pushes) * 1e3:.1f}), {row['gb_per_s']:.1f} GB/s, pause to continue "
            f"{more.get('pause_to_continue_s_median', float('nan')) * 1e3:.1f} ms",
            flush=True,
        )

    def free_bytes(self) -> int | None:
        if self.args.device != "cuda":
            return None
        return torch.cuda.mem_get_info(self.args.gpus[-1])[0]

    def ours(self, config: WeightSyncConfig, num_pushes: int) -> None:
        scheme = SGLangWeightSyncScheme(
            self.service,
            device=None if self.args.device == "cpu" else self.device,
            config=config,
        )
        scheme.init_on_sender()
        connect_s, _ = timed(scheme.connect)
        before = self.free_bytes()
        results = []
        for _ in range(num_pushes + self.args.warmup):
            scheme.send(self.model)
            results.append(scheme.last_push)
        after = self.free_bytes()
        scheme.close()
        first, results = results[0], results[self.args.warmup :]
        self.row(
            "ours",
            [r.push_s for r in results],
            bucket_gib=config.bucket_bytes / GIB,
            method=results[0].method,
            layout=results[0].layout,
            num_buckets=results[0].num_buckets,
            verify=config.verify,
            verified_by=results[0].verified_by,
            pause_to_continue_s_median=statistics.median(r.paused_s for r in results),
            pause_to_continue_s=[r.paused_s for r in results],
            total_s=summary([r.total_s for r in results]),
            step_s={
                step: statistics.median(r.step_s.get(step, 0.0) for r in results)
                for step in results[0].step_s
            },
            connect_s=connect_s,
            first_push_s=first.push_s,
            server_gpu_bytes_more=None if before is None else before - after,
        )

    def bare(self, num_pushes: int) -> None:
        """A loop without any safety: announce, broadcast, wait; nothing is paused or watched."""
        from torchrl_sglang.weights.buckets import plan_buckets, spec_of
        from torchrl_sglang.weights.carry.broadcast import Broadcast
        from torchrl_sglang.weights.targets import Targets

        service = self.service
        engines = Targets(service.workers, service.cluster.infos, 60.0)
        carrier = Broadcast(
            engines,
            address="127.0.0.1",
            port=None,
            device=torch.device(self.device),
            layout="tensors",
            timeouts=service.timeouts,
        )
        carrier.connect()
        group = carrier._group
        weights = {n: p.detach() for n, p in self.model.named_parameters()}
        specs = [spec_of(n, t, torch.bfloat16) for n, t in weights.items()]
        buckets = plan_buckets(specs, self.args.bare_gib * GIB)
        urls = [worker.url for worker in service.workers]
        session = requests.Session()
        session.trust_env = False
        headers = {"Authorization": f"Bearer {service._keys.admin_api_key or service.api_key}"}
        assert len(urls) == 1, "the bare loop knows one engine"

        def push() -> None:
            for bucket in buckets:
                body = bucket.announcement(group.name) | {"load_format": None}
                works = [group._start(weights[spec.name]) for spec in bucket.tensors]
                session.post(urls[0] + ROUTE, json=body, headers=headers).raise_for_status()
            works[-1].wait()
            if self.args.device == "cuda":
                torch.cuda.synchronize(self.device)

        if engines.takes_begin_end:
            engines.begin()
        pushes = [timed(push)[0] for _ in range(num_pushes + self.args.warmup)]
        engines.end()
        carrier.close()
        engines.close()
        self.row(
            "bare", pushes[self.args.warmup :], bucket_gib=self.args.bare_gib, layout="tensors"
        )

    def torchrl(self, num_pushes: int) -> None:
        """TorchRL's own scheme; it knows no API keys and no update sessions."""
        from torchrl.weight_update.llm import SGLangWeightSyncScheme as Theirs
        from torchrl.weight_update.llm.sglang_nccl import get_model_metadata

        [worker] = self.service.workers
        scheme = Theirs(
            server_url=worker.url,
            master_address="127.0.0.1",
            master_port=self.args.torchrl_port,
            num_gpus=self.service.info.tp_size,
            device=self.device,
            strategy="state_dict",
        )
        sender = scheme.create_sender()
        sender.register_model(self.model)
        sender.init_all_workers_group(get_model_metadata(self.model))
        pushes = [timed(sender.update_weights)[0] for _ in range(num_pushes + 1)]
        self.row("torchrl", pushes[1:], pause_to_continue_s_median=statistics.median(pushes[1:]))

    def run(self) -> None:
        args = self.args
        if args.sweep:
            for gib in SWEEP_GIB:
                for layout in ("flattened", "tensors"):
                    config = WeightSyncConfig(
                        verify="never", bucket_bytes=int(gib * GIB), layout=layout
                    )
                    self.ours(config, max(3, args.pushes // 2))
            return
        for method in args.methods:
            plain = WeightSyncConfig(
                method=method, verify="never", bucket_bytes=int(args.bucket_gib * GIB)
            )
            self.ours(plain, args.pushes)
            if args.verify:
                proved = replace(plain, verify="always", probe_tolerance=args.tolerance)
                self.ours(proved, args.pushes)
        if len(self.service.workers) == 1 and "broadcast" in args.methods:
            self.bare(args.pushes)
        if args.torchrl:
            self.torchrl(args.torchrl)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for layout in ("flattened", "tensors"):
        mine = [r for r in rows if r["name"] == "ours" and r["layout"] == layout]
        sizes = [r["bucket_gib"] for r in mine]
        axes.plot(sizes, [r["gb_per_s"] for r in mine], marker="o", label=layout)
    axes.set(xscale="log", xlabel="bucket size in GiB", ylabel="GB/s", ylim=(0, None))
    axes.set_xticks(SWEEP_GIB, [str(size) for size in SWEEP_GIB])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def serve(args: argparse.Namespace, folder: Path) -> AsyncSGLang:
    if args.url:
        return AsyncSGLang.connect(args.url)
    options: dict[str, Any] = {"device": "cpu", "disable_overlap_schedule": True}
    if args.device == "cuda":
        options = {
            "device": "cuda",
            "cuda_devices": args.gpus[1:],
            "attention_backend": "triton",
            "sampling_backend": "pytorch",
            "mem_fraction_static": 0.6,
            "disable_cuda_graph": True,
            "skip_tokenizer_init": True,
        }
    return AsyncSGLang.from_pretrained(
        str(folder),
        api_key="",
        admin_api_key="",
        max_total_tokens=8192,
        tp_size=max(1, len(args.gpus) - 1),
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "tiny"], default="0.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpus", type=int, nargs="+", default=[0, 1], help="trainer, then server")
    parser.add_argument("--url", help="a running server or router instead")
    parser.add_argument("--model", type=Path, help="where the model is, or is to be made")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["broadcast"],
        choices=["auto", "broadcast", "tensor", "disk"],
    )
    parser.add_argument("--pushes", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--bucket-gib", type=float, default=WeightSyncConfig().bucket_bytes / GIB)
    parser.add_argument("--bare-gib", type=int, default=2)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--torchrl", type=int, default=0, help="pushes of TorchRL's own scheme")
    parser.add_argument("--torchrl-port", type=int, default=29_777)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or Path(made)
        if args.size == "tiny":
            from tiny_model import make_tiny_model

            make_tiny_model(folder)
        else:
            random_model(folder, args.size, args.gpus[0])
        with serve(args, folder) as service:
            bench = Bench(args, service, folder)
            try:
                bench.run()
            finally:
                written(bench, args)


def written(bench: Bench, args: argparse.Namespace) -> None:
    cuda = args.device == "cuda"
    about = {
        "hardware": torch.cuda.get_device_name(args.gpus[0]) if cuda else "CPU",
        "sglang": bench.service.sglang_version,
        "torch": version("torch"),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "torchrl": version("torchrl"),
        "command": " ".join(["python", *sys.argv]),
    }
    if args.out:
        args.out.write_text(json.dumps([about | row for row in bench.rows], indent=1) + "\n")
    if args.plot:
        plot(bench.rows, args.plot)


if __name__ == "__main__":
    main()
