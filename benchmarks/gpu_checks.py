"""What the checks on GPUs share: small random models, servers, and the error of log-probs."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, Timeouts

SAMPLING: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
PROMPTS = [[10 + i, 200 + 3 * i, 77, 300 + i] for i in range(32)]

SERVER_OPTIONS: dict[str, Any] = {"max_total_tokens": 8192, "skip_tokenizer_init": True}
# Without CUDA graphs, which take a minute and compute nothing else.
GPU_OPTIONS: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.5,
    "disable_cuda_graph": True,
}
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 1,
    "dtype": torch.bfloat16,
}


def make_dense(folder: str | Path, device: str) -> Any:
    """Writes a random Qwen2 of two layers."""
    config = Qwen2Config(**SHAPE, tie_word_embeddings=True)
    return _written(Qwen2ForCausalLM, config, folder, device)


def make_moe(folder: str | Path, device: str) -> Any:
    """Writes a random mixture-of-experts model of 16 experts, 4 of which compute a token."""
    config = Qwen3MoeConfig(
        **SHAPE,
        moe_intermediate_size=256,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    model = _written(Qwen3MoeForCausalLM, config, folder, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(50)  # clear choices, beyond the noise of bf16
    model.save_pretrained(folder)
    return model


def _written(kind: Any, config: Any, folder: str | Path, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def perturb(model: Any, scale: float = 0.3) -> Any:
    """Moves every weight, far enough for other log-probs."""
    for name, parameter in model.named_parameters():
        if "mlp.gate." not in name:
            parameter.add_(torch.randn_like(parameter) * scale * parameter.std())
    return model


@torch.no_grad()
def error(service: AsyncSGLang, model: Any, lora: str | None = None) -> float:
    """Largest difference of reported and Hugging Face log-probs, over 512 tokens."""
    worst = 0.0
    sampling = SamplingParams(**SAMPLING)
    requests = [GenerateRequest(input_ids=tuple(p), sampling=sampling, lora=lora) for p in PROMPTS]
    for prompt, completion in zip(PROMPTS, service.generate(requests), strict=True):
        ids = torch.tensor([prompt + completion.output_ids], device=model.device)
        scores = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        ours = scores.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
        worst = max(worst, (ours - torch.tensor(completion.log_probs)).abs().max().item())
    return round(worst, 4)


def serve(
    folder: str | Path,
    device: str,
    gpus: list[int],
    *,
    log_dir: Path | None = None,
    **options: Any,
) -> AsyncSGLang:
    """Starts a server on these GPUs, or on the CPU."""
    placed = {} if device == "cpu" else {**GPU_OPTIONS, "cuda_devices": gpus}
    return AsyncSGLang.from_pretrained(
        str(folder),
        device=device,
        log_dir=log_dir,
        timeouts=Timeouts(start_s=300.0, request_s=300.0),
        **{**SERVER_OPTIONS, **placed, **options},
    )


def sending_device(model: Any) -> str | None:
    """What a weight sync is told of the trainer's device; nothing on a CPU."""
    return str(model.device) if model.device.type == "cuda" else None


def about(service: AsyncSGLang, device: str, script: str) -> dict[str, Any]:
    """Hardware, versions and command of a result."""
    return {
        "hardware": "CPU" if device == "cpu" else torch.cuda.get_device_name(0),
        "sglang": service.sglang_version,
        "torch": torch.__version__,
        "nccl": None if device == "cpu" else ".".join(map(str, torch.cuda.nccl.version())),
        "torchrl": version("torchrl"),
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
    }
