"""What a CPU can't show of generation: deterministic sampling, and processors on two TP ranks.

    python benchmarks/check_deterministic.py --out benchmarks/results/deterministic_h200.json

Needs two GPUs, or one with ``--gpus 0``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny_model import make_tiny_model

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper
from torchrl_sglang.generate.processors.make import allowed_tokens, combined, progress_temperature

PROMPTS = [[10 + i, 200 + 3 * i, 77, 100 + i] for i in range(8)]


def sampled(service: AsyncSGLang, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 32, "ignore_eos": True, "temperature": 1.0} | options
    completions = service.generate(PROMPTS, SamplingParams(**options))
    return [completion.output_ids for completion in completions]


def check_seeds(service: AsyncSGLang) -> dict[str, Any]:
    """Samples of a prompt differ, and a seed brings the same ones again, whatever the batch."""
    samples = sampled(service, n=4, sampling_seed=7)
    groups = [samples[i : i + 4] for i in range(0, len(samples), 4)]
    again = sampled(service, n=4, sampling_seed=7)
    alone = service.generate(
        PROMPTS[3:4],
        SamplingParams(max_new_tokens=32, ignore_eos=True, n=4, sampling_seed=7),
    )
    unseeded = sampled(service, n=4)
    unseeded_groups = [unseeded[i : i + 4] for i in range(0, len(unseeded), 4)]
    return {
        "distinct_samples_of_4_seeded": [len({*map(tuple, g)}) for g in groups],
        "distinct_samples_of_4_unseeded": [len({*map(tuple, g)}) for g in unseeded_groups],
        "same_seed_same_samples": samples == again,
        "same_seed_other_batch_same_samples": [c.output_ids for c in alone] == groups[3],
        "other_seed_other_samples": samples != sampled(service, n=4, sampling_seed=8),
    }


def check_equal_prompts(service: AsyncSGLang) -> dict[str, Any]:
    """A group made of repeated rows under one seed: samples that differ, the same in every call."""
    tokens = lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(PROMPTS[0])))] * 4)
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        inplace=False,
        generate_kwargs={"max_new_tokens": 32, "ignore_eos": True, "seed": 7},
    )
    groups = [[row["tokens"].response.tolist() for row in policy(tokens)] for _ in range(2)]
    options = SamplingParams(max_new_tokens=32, ignore_eos=True, n=4, sampling_seed=7)
    samples = [c.output_ids for c in service.generate(PROMPTS[:1], options)]
    return {
        "distinct_samples_of_4_equal_rows": len({*map(tuple, groups[0])}),
        "equal_rows_same_in_another_call": groups[0] == groups[1],
        "equal_rows_same_as_num_samples": groups[0] == samples,
    }


def check_processors(service: AsyncSGLang) -> dict[str, Any]:
    allowed = [20, 21, 22, 23]
    options = SamplingParams(max_new_tokens=32, ignore_eos=True)
    requests = [
        GenerateRequest(
            input_ids=tuple(ids),
            sampling=options,
            processor=combined(allowed_tokens(allowed), progress_temperature(2.0, 0.5, 16)),
        )
        for ids in PROMPTS
    ]
    masked = service.generate(requests)
    mixed = service.generate(
        [
            request if i % 2 else GenerateRequest(input_ids=request.input_ids, sampling=options)
            for i, request in enumerate(requests)
        ]
    )
    return {
        "only_allowed_tokens": all({*c.output_ids} <= {*allowed} for c in masked),
        "rows_without_processor_are_free": all(
            ({*c.output_ids} <= {*allowed}) == bool(i % 2) for i, c in enumerate(mixed)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--log-dir", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder, logit_scale=2.0, num_heads=4, num_kv_heads=2)
        with AsyncSGLang.from_pretrained(
            folder,
            device="cuda",
            tp_size=len(args.gpus),
            cuda_devices=args.gpus,
            log_dir=args.log_dir,
            attention_backend="triton",
            sampling_backend="pytorch",
            mem_fraction_static=0.3,
            disable_cuda_graph=True,
            enable_deterministic_inference=True,
            enable_custom_logit_processor=True,
        ) as service:
            result = {
                "gpu": torch.cuda.get_device_name(args.gpus[0]),
                "tp_size": service.get_tp_size(),
                "sglang": service.sglang_version,
                "deterministic": service.info.features.deterministic,
                **check_seeds(service),
                **check_equal_prompts(service),
                **check_processors(service),
                "command": " ".join(["python", *sys.argv]),
            }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
