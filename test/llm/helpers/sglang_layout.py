"""Run by tests as a script, beside an SGLang: what SGLang itself makes of weights.

    python -P sglang_layout.py CPU_FOLDER hash TENSORS    its GPU hash of tensors
    python -P sglang_layout.py CPU_FOLDER shards FOLDERS  its hashes of each rank's parameters

CPU_FOLDER is ``torchrl_sglang/launch/cpu``, whose stand-ins let SGLang be imported. Prints one line
of JSON. Nothing of torchrl_sglang's own hashing or layout is imported. The GPU hash is SGLang's own
Triton kernels, which Triton's interpreter runs on a CPU. The shards are made by SGLang's models and
weight loaders as on a GPU: without SGLANG_USE_CPU_ENGINE they don't pad as they do on CPUs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TP_SIZES = (1, 2, 4, 8)


def gpu_hashes(path: str) -> list[str]:
    """SGLang's hash of CUDA tensors, of CPU tensors that claim to be on CUDA."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

    torch.Tensor.is_cuda = property(lambda tensor: True)
    return [f"{gpu_tensor_hash(tensor):016x}" for tensor in torch.load(path)]


def shards(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of all parameters of ``tp_rank/tp_size``, of the model in a folder."""
    import sglang.srt.runtime_context as runtime
    import torch
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    module = importlib.import_module(f"sglang.srt.models.{config.model_type}")
    others = ("llama", "qwen2_moe")  # of whose parts it is made
    for used in (module, *(importlib.import_module(f"sglang.srt.models.{o}") for o in others)):
        # They hold no weights, and want a GPU or a process group.
        used.get_rope = used.LogitsProcessor = used.RadixAttention = lambda *a, **k: (
            torch.nn.Identity()
        )
    args = ServerArgs(model_path=str(folder), device="cpu", attention_backend="torch_native")
    runtime.publish(args, role="scheduler")
    torch.set_default_dtype(torch.bfloat16)
    weights = torch.load(folder / "sent.pt")
    found = {}
    for size in TP_SIZES:
        for rank in range(size):
            with runtime.get_parallel().override(**ranks(rank, size)):
                model = getattr(module, config.architectures[0])(config)
                for parameter in model.parameters():
                    parameter.data.fill_(7.0)  # what no weight sets shows
                model.load_weights(weights.items())
            found[f"{rank}/{size}"] = {name: sha(p) for name, p in model.named_parameters()}
    return found


def ranks(rank: int, size: int) -> dict[str, object]:
    """Makes this process that rank, without a process group."""
    one = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1, rank_in_group=0)
    names = ("tp", "attn_tp", "moe_tp")
    return {
        "pp_group": one,
        "pp_rank": 0,
        "tp_group": None,
        "attn_tp_group": None,
        "moe_tp_group": None,
        "moe_ep_group": None,
        "moe_ep_rank": 0,
        "moe_ep_size": 1,
        **{f"{name}_rank": rank for name in names},
        **{f"{name}_size": size for name in names},
    }


def sha(parameter: Any) -> str:
    """Of bfloat16 values, which numpy does not know."""
    import torch

    return hashlib.sha256(parameter.detach().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def main(cpu_folder: str, action: str, *paths: str) -> None:
    sys.path.insert(0, cpu_folder)
    import standins

    standins.install()
    print(
        json.dumps(gpu_hashes(*paths) if action == "hash" else {p: shards(Path(p)) for p in paths})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
