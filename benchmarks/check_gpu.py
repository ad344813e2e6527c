"""Does it work over NCCL? A trainer on GPU 0 pushes into a managed server on GPU 1.

    python benchmarks/check_gpu.py --out benchmarks/results/check_gpu.json

Not a benchmark of speed: it checks that log-probs match before and after pushes, and that an engine
that refuses in mid-push neither hangs the trainer nor spoils the next push. Needs two GPUs and
SGLang; makes its own model from a config, with random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import PushError, RequestRefusedError

SIZES = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512},
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864},
}
SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}


def make_model(folder: str, size: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        **SIZES[size],
        vocab_size=151936,
        num_attention_heads=SIZES[size]["hidden_size"] // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda:0"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def perturb(model: Any, scale: float = 0.1) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale * parameter.std())


@torch.no_grad()
def error(service: AsyncSGLang, model: Any) -> float:
    """Largest difference of reported and Hugging Face log-probs, over 512 tokens."""
    prompts = [[10 + i, 200 + 3 * i, 77, 1000 + i] for i in range(32)]
    worst = 0.0
    for prompt, completion in zip(prompts, service.generate(prompts, SAMPLING), strict=True):
        ids = torch.tensor([prompt + completion.output_ids], device="cuda:0")
        scores = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        ours = scores.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
        worst = max(worst, (ours - torch.tensor(completion.log_probs)).abs().max().item())
    return worst


def refused_push(scheme: SGLangWeightSyncScheme, model: Any) -> dict[str, Any]:
    """A push whose announcement is refused while the trainer is in the broadcast already."""
    worker = scheme.service.workers[0]
    post = worker.post

    def refuse(path: str, *args: Any, **kwargs: Any) -> Any:
        if path == "/update_weights_from_distributed":
            time.sleep(0.5)  # by now the trainer waits in NCCL
            raise RequestRefusedError("refused for the test", status=400)
        return post(path, *args, **kwargs)

    worker.post = refuse
    start = time.perf_counter()
    try:
        scheme.send(model)
        raised = "nothing"
    except PushError as failure:
        raised = f"{failure.step}, bucket {failure.bucket}"
    finally:
        worker.post = post
    return {"refused_raised": raised, "refused_s": round(time.perf_counter() - start, 3)}


def check(service: AsyncSGLang, model: Any, num_pushes: int) -> dict[str, Any]:
    result: dict[str, Any] = {"error_at_start": error(service, model)}
    scheme = SGLangWeightSyncScheme(
        service, device="cuda:0", config=WeightSyncConfig(probe_tolerance=0.1)
    )
    scheme.init_on_sender()
    start = time.perf_counter()
    scheme.connect()
    result["connect_s"] = time.perf_counter() - start
    totals, transfers = [], []
    for _ in range(num_pushes):
        perturb(model)
        stale = error(service, model)
        scheme.send(model)
        push = scheme.last_push
        totals.append(push.total_s)
        transfers.append(push.step_s["transfer"])
    result |= {
        "error_before_push": stale,
        "error_after_push": error(service, model),
        "verified_by": push.verified_by,
        "push_s_first": totals[0],
        "push_s_median": statistics.median(totals[1:]),
        "transfer_s_median": statistics.median(transfers[1:]),
        "num_bytes": push.num_bytes,
        "step_s_last": dict(push.step_s),
    }
    perturb(model)
    result |= refused_push(scheme, model)
    result["state_after_refusal"] = service.state.value
    start = time.perf_counter()
    scheme.send(model)
    result["repair_s"] = time.perf_counter() - start
    result["error_after_repair"] = error(service, model)
    scheme.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--pushes", type=int, default=6)
    parser.add_argument("--log-dir", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder, args.size)
        start = time.perf_counter()
        with AsyncSGLang.from_pretrained(
            folder,
            device="cuda",
            cuda_devices=[1],
            log_dir=args.log_dir,
            skip_tokenizer_init=True,
            attention_backend="triton",
            sampling_backend="pytorch",
            mem_fraction_static=0.5,
            disable_cuda_graph=True,
        ) as service:
            result = {
                "size": args.size,
                "gpu": torch.cuda.get_device_name(0),
                "sglang": service.sglang_version,
                "router": service.router_version,
                "torch": torch.__version__,
                "torchrl": version("torchrl"),
                "command": " ".join(["python", "benchmarks/check_gpu.py", *sys.argv[1:]]),
                "start_s": time.perf_counter() - start,
                **check(service, model, args.pushes),
            }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
