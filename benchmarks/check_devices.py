"""A policy whose TensorDicts are on a GPU, in every mode and layout. Needs a GPU.

    python benchmarks/check_devices.py --out benchmarks/results/devices.json

With ``--device cpu`` the same is run on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from gpu_checks import about, serve
from tiny_model import make_tiny_model

from torchrl_sglang import AsyncSGLang, SGLangWrapper

QUESTIONS = ["hi", "the quick fox"]


def make_input(mode: str, device: str | None, tokenizer: Any) -> Any:
    if mode == "history":
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        td = TensorDict(history=ChatHistory(prompt=History.from_chats(chats)), batch_size=2)
    elif mode == "text":
        td = TensorDict(text=Text(prompt=list(QUESTIONS), batch_size=2), batch_size=2)
    else:
        rows = [torch.tensor(tokenizer(q)["input_ids"], device="cpu") for q in QUESTIONS]
        td = lazy_stack([TensorDict(tokens=Tokens(prompt=row)) for row in rows])
    return td if device is None else td.to(device)


@torch.no_grad()
def worst(out: Any, model: Any, device: str) -> float:
    """Largest difference to a Hugging Face forward; every tensor has to be on the device."""
    found = 0.0
    for row in out.reshape(-1).unbind(0):
        for key in ("tokens", "masks", "log_probs", "rollout"):
            for value in row[key].values():
                if isinstance(value, torch.Tensor) and value.device != torch.device(device):
                    raise AssertionError(f"{key} is on {value.device}, not on {device}")
        attended, mask = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
        ids = row["tokens"].full[attended]
        scores = model(ids[None].to(model.device)).logits[0, :-1].float().log_softmax(-1)
        expected = scores.gather(-1, ids[1:, None].to(model.device))[:, 0].to(device)
        reported = row["log_probs"].full[attended]
        sampled = mask[attended][1:]
        found = max(found, (expected - reported[1:])[sampled].abs().max().item())
    return round(found, 4)


def check(service: AsyncSGLang, model: Any, tokenizer: Any, device: str) -> dict[str, float]:
    """By case: the largest difference."""
    results = {}
    layouts = itertools.product(
        ("history", "text", "tokens"), (False, True), (None, "empty", False), (device, None)
    )
    for mode, padded, inplace, source in layouts:
        policy = SGLangWrapper(
            service,
            tokenizer=tokenizer,
            input_mode=mode,
            pad_output=padded,
            inplace=inplace,
            device=device,
            generate_kwargs={"max_new_tokens": 8, "ignore_eos": True},
        )
        name = f"{mode}, {'padded' if padded else 'ragged'}, inplace={inplace}, from {source}"
        out = policy(make_input(mode, source, tokenizer))
        results[name] = worst(out, model, device)
        if inplace is False:
            samples = policy.get_new_version(num_samples=2)
            results[name + ", 2 samples"] = worst(
                samples(make_input(mode, source, tokenizer)), model, device
            )
            scorer = policy.get_new_version(generate=False)
            scores = scorer(out)
            assert scores["log_probs"][0].full.device == torch.device(device)
    return results


def check_defaults(
    service: AsyncSGLang, model: Any, tokenizer: Any, device: str
) -> dict[str, float]:
    """The same under other defaults of torch."""
    dtype = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return check(service, model, tokenizer, device)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--log-dir", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    set_list_to_stack(True).set()
    kind = torch.device(args.device).type
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder, logit_scale=2.0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device)
        options = {"skip_tokenizer_init": False, "enable_fp32_lm_head": True}
        gpus = [torch.device(args.device).index or 0]
        with serve(folder, kind, gpus, log_dir=args.log_dir, **options) as service:
            plain = check(service, model, tokenizer, args.device)
            others = check_defaults(service, model, tokenizer, args.device)
            result = {
                **about(service, kind, "check_devices.py"),
                "cases": len(plain),
                "worst_difference_of_log_probs": max(plain.values()),
                "worst_under_other_defaults": max(others.values()),
                "by_case": plain,
            }
    print(json.dumps({k: v for k, v in result.items() if k != "by_case"}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
