"""Routed experts of a small random mixture-of-experts model, against Hugging Face. Needs a GPU.

python benchmarks/check_routed_experts.py --out benchmarks/results/routed_experts_h200.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny_model import make_tokenizer

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper, WeightSyncConfig

LAYERS, EXPERTS, TOP_K = 3, 16, 4


def make_model(folder: str, device: str) -> Any:
    tokenizer = make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate" in name:
                parameter.mul_(50)  # experts that are clearly chosen, beyond the noise of bf16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def agreement(
    model: Any, ids: torch.Tensor, routed: torch.Tensor, where: slice = slice(None)
) -> float:
    """Share of (token, layer) pairs with the same set of experts, among some tokens."""
    logits = model(ids[None].to(model.device), output_router_logits=True).router_logits
    ours = routed.reshape(len(routed), LAYERS, TOP_K).sort(-1).values
    same = [
        (layer.topk(TOP_K).indices.sort(-1).values.cpu()[: len(routed)] == ours[:, index])
        .all(-1)
        .float()[where]
        for index, layer in enumerate(logits)
    ]
    return torch.stack(same).mean().item()


def policy_of(service: AsyncSGLang, max_new_tokens: int) -> SGLangWrapper:
    return SGLangWrapper(
        service,
        input_mode="tokens",
        inplace=False,
        generate_kwargs={"max_new_tokens": max_new_tokens, "ignore_eos": True},
        extras=["routed_experts"],
    )


def check_a_push(service: AsyncSGLang, model: Any) -> dict[str, Any]:
    """Rows that a push retracts: experts of tokens computed anew are left out, the rest agree."""
    policy = policy_of(service, 1500)
    rows = [TensorDict(tokens=TensorDict(prompt=torch.arange(20 + i, 40 + i))) for i in range(8)]
    # The experts themselves don't arrive: transformers holds them in one tensor, SGLang reads one
    # for each. A probe refuses such a push, and what is looked at here is what is left out.
    config = WeightSyncConfig(method="tensor", verify="never")
    scheme = SGLangWeightSyncScheme(service, config=config)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(policy, lazy_stack(rows))
        time.sleep(2.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mlp.gate" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.5 * parameter.std())
        scheme.push(model)
        out = running.result()
    scheme.close()
    facts = []
    for row in out.unbind(0):
        versions = row["rollout", "policy_version"]
        routed = row["rollout", "routed_experts"]
        newest = int((versions == versions.max()).nonzero()[0])  # first token of the new weights
        left_out = (routed == -1).all(-1)
        after = slice(newest, len(routed))
        facts.append(
            {
                "versions": sorted(set(versions.tolist())),
                "tokens_before_and_after": [newest, len(versions) - newest],
                "left_out": int(left_out.sum()),
                "all_left_out_are_older": not bool(left_out[newest:].any()),
                "same_experts_after": agreement(model, row["tokens"].full, routed, after),
            }
        )
    return {"rows_of_a_push": facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--log-dir", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    set_list_to_stack(True).set()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder, f"cuda:{args.gpu}")
        with AsyncSGLang.from_pretrained(
            folder,
            device="cuda",
            cuda_devices=[args.gpu],
            log_dir=args.log_dir,
            attention_backend="triton",
            sampling_backend="pytorch",
            mem_fraction_static=0.3,
            disable_cuda_graph=True,
            enable_return_routed_experts=True,
        ) as service:
            policy = policy_of(service, 24)
            rows = [
                TensorDict(tokens=TensorDict(prompt=torch.arange(20 + i, 40 + 3 * i)))
                for i in range(8)
            ]
            out = policy(lazy_stack(rows))
            shares, shapes = [], []
            for row in out.unbind(0):
                routed = row["rollout", "routed_experts"]
                shapes.append(list(routed.shape))
                shares.append(agreement(model, row["tokens"].full, routed))
            result = {
                "gpu": torch.cuda.get_device_name(args.gpu),
                "sglang": service.sglang_version,
                "shape_of_routed_experts": shapes,
                "same_experts_as_hugging_face": shares,
                **check_a_push(service, model),
                "command": " ".join(["python", *sys.argv]),
            }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
