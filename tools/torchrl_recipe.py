"""Runs one of TorchRL's published recipes on a CPU, with our classes imported instead of its own.

The recipe is read from a folder that the user names, a checkout of TorchRL; nothing of it is kept
here or fetched. A copy in a temporary folder is changed by `SUBSTITUTIONS` alone, which are printed
with how often each was made: the import, what is for GPUs only, and what a package moved or broke.
Model and data set are stand-ins that lie under their hub names in the folder the recipe runs in.

    .venv/bin/python tools/torchrl_recipe.py rl/sota-implementations/grpo/grpo-sync.py
    .venv/bin/python tools/torchrl_recipe.py rl/sota-implementations/grpo/grpo-async.py --updates 5

What follows the options overrides the recipe's configuration. It needs ray, hydra-core and wandb
beside what `make env` installs, and ends the recipe after so many weight updates: with 0.14.1,
``RayLLMCollector`` does not end by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from torchrl_tests import NAMES, ROOT, write_models

OURS = {
    "SGLangWrapper": "SGLangWrapper",
    "AsyncSGLang": "AsyncSGLang",
    "SGLangWeightSyncScheme": "SGLangWeightSyncScheme",
    "vLLMWrapper": "SGLangWrapper",
    "AsyncVLLM": "AsyncSGLang",
    "make_vllm_worker": "make_sglang_server",
    "VLLMWeightSyncScheme": "SGLangWeightSyncScheme",
}
# What is replaced, by what, and why.
SUBSTITUTIONS = (
    (r'if not torch\.cuda\.is_available\(\):\s+raise RuntimeError\("CUDA is', None, "CUDA only"),
    (r'f"cuda:\{[^}]*\}"', '"cpu"', "CUDA only: devices"),
    (r'"cuda(:0)?"(?=[,)\s])', '"cpu"', "CUDA only: devices"),
    (r"(device if device is not None else) 0\b", r'\1 "cpu"', "CUDA only: devices"),
    (r"if sglang_devices is not None:(?=\s+inference_params\[)", "if False:", "CUDA only: devices"),
    (r"check_grpo_dependencies\(\)(?!\s*->)", 'check_grpo_dependencies("sglang")', "asks for vllm"),
    (
        r"(replay_buffer=|train_handler\.remote\(\s+)rb\b",
        r"\1rb.client()",
        "0.14.1 can't pickle it",
    ),
    (r"transformers\.tokenization_utils import", "transformers import", "moved in transformers 5"),
)
# The recipe's own configuration, made small.
OVERRIDES = {
    "model.name": NAMES[0],
    "inference_model.backend": "sglang",
    "inference_model.gpu_memory_utilization": 0.1,
    "inference_model.max_tokens": 16,
    "train.mixed_precision": "false",
    "train.total_dialog_turns": 64,
    "train.dialog_turns_per_batch": 4,
    "train.optim_batch_size": 4,
    "train.gradient_accumulation_steps": 1,
    "train.logging_frequency": 1,
    "env.num_envs": 2,
    "env.repeats": 2,
    "ray.init_config.num_cpus": 10,
    "ray.collector_config.num_cpus": 1,
    "ray.train_handler_config.num_cpus": 1,
    "ray.replay_buffer_config.num_cpus": 1,
    "+ray.init_config.object_store_memory": 200_000_000,
    "~ray.init_config.runtime_env": None,  # of this machine, Ray's workers see the folder itself
}
MODES = {
    "sync": {"mode": "sync"},
    "async": {"mode": "async", "train.weight_update_frequency": 1, "train.buffer_size": 16},
}
UPDATED = "Updating policy weights"


def our_imports(text: str, made: Counter[str]) -> str:
    """Imports our names from here, and the others from where they were."""

    def replaced(match: re.Match[str]) -> str:
        indent, module, names = match.groups()
        names = [name.strip() for name in names.split(",")]
        ours = [name for name in names if name in OURS]
        if not ours:
            return match.group()
        made["the import"] += len(ours)
        lines = [f"{indent}from torchrl_sglang import {OURS[name]} as {name}" for name in ours]
        others = [name for name in names if name not in OURS]
        if others:
            lines.insert(0, f"{indent}from {module} import {', '.join(others)}")
        return "\n".join(lines)

    return re.sub(r"^([ \t]*)from (torchrl[\w.]*) import ([\w, ]+)$", replaced, text, flags=re.M)


def substituted(text: str, made: Counter[str]) -> str:
    """The file with every substitution made."""
    text = our_imports(text, made)
    for pattern, new, why in SUBSTITUTIONS:
        if new is None:  # the condition stays, and is never true
            found = re.compile(pattern)
            text, count = found.subn(lambda m: "if False" + m.group()[m.group().index(":") :], text)
        else:
            text, count = re.subn(pattern, new, text)
        if count:
            made[f"{why}: {pattern}"] += count
    return text


def write_data(folder: Path) -> None:
    """Sums, in the form of GSM8K and under its name."""
    place = folder / "openai/gsm8k"
    (place / "main").mkdir(parents=True)
    rows = [
        {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} is {a + b}.\n#### {a + b}"}
        for a in range(8)
        for b in range(8)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (place / "main/train.jsonl").write_text(lines + "\n")
    files = "{split: train, path: main/train.jsonl}"
    config = f"---\nconfigs:\n- config_name: main\n  data_files: [{files}]\n---\n"
    (place / "README.md").write_text(config)


def prepare(recipe: Path, folder: Path) -> Counter[str]:
    """Puts the changed copy and the stand-ins where the recipe is to run."""
    made: Counter[str] = Counter()
    shutil.copytree(recipe.parent / "config", folder / "config")
    for path in recipe.parent.glob("*.py"):
        (folder / path.name).write_text(substituted(path.read_text(), made))
    write_models(folder)
    write_data(folder)
    return made


def environment() -> dict[str, str]:
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "LIST_TO_STACK": "1",
    }


def follow(process: subprocess.Popen[str], updates: int) -> int:
    """Prints what it says, ends it after so many weight updates, and returns how many it began."""
    seen = 0
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if UPDATED in line:
            seen += 1
            if seen > updates:  # the one before is finished
                process.send_signal(signal.SIGINT)
                break
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "recipe", type=Path, help="such as rl/sota-implementations/grpo/grpo-sync.py"
    )
    parser.add_argument("--updates", type=int, default=3, help="ends after so many weight updates")
    parser.add_argument("--within", type=float, default=600.0, help="seconds that it may take")
    args, rest = parser.parse_known_args()
    mode = MODES["async" if "async" in args.recipe.name else "sync"]
    overrides = {**OVERRIDES, **mode, **dict(item.split("=", 1) for item in rest)}
    with tempfile.TemporaryDirectory(prefix="torchrl-recipe-") as scratch:
        folder = Path(scratch)
        for what, count in prepare(args.recipe, folder).items():
            print(f"substituted {count} x {what}")
        settings = (
            name if value is None else f"{name}={value}" for name, value in overrides.items()
        )
        command = [sys.executable, args.recipe.name, *settings]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started = time.monotonic()
        timer = threading.Timer(args.within, process.kill)
        timer.start()
        try:
            seen = follow(process, args.updates)
            process.wait(60)
        finally:
            timer.cancel()
            process.kill()
        finished = min(seen, args.updates)
        print(f"{finished} weight updates finished in {time.monotonic() - started:.0f} s")
    return 0 if finished == args.updates or process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
