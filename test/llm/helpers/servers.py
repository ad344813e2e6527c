"""Helpers of the tests that talk to a real server."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from helpers.lora_files import ATTENTION, MLP
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme
from torchrl_sglang.errors import ServiceError
from torchrl_sglang.servers.control import ControlClient

Connect = Callable[..., SGLangWeightSyncScheme]  # the fixture `connected`

SERVER_PYTHON = os.environ.get("TORCHRL_SGLANG_TEST_SERVER_PYTHON")


def told(worker: Any, path: str, body: Any = None, **kwargs: Any) -> Any:
    """What a server answers to a POST, with whichever key it wants."""
    return worker.http.post(path, body, admin=True, **kwargs)


def keys_of(service: AsyncSGLang) -> dict[str, str | None]:
    """What it takes to attach to the servers of a service."""
    keys = service._keys
    return {"api_key": keys.api_key, "admin_api_key": keys.admin_api_key}


def connect_like(service: AsyncSGLang, url: str | None = None, **kwargs: Any) -> AsyncSGLang:
    """Another service on the same servers, which knows nothing of what the first one did.

    Args:
        service: the first one.
        url: where the servers are reached; default: the first server's own address.
        **kwargs: more arguments of `AsyncSGLang.connect`.
    """
    return AsyncSGLang.connect(url or service.workers[0].url, **{**keys_of(service), **kwargs})


def client_like(service: AsyncSGLang, url: str) -> ControlClient:
    """Asks what is at a URL, with the keys and bounds of a service."""
    keys = keys_of(service)
    return ControlClient(url, timeouts=service.timeouts, **keys)


def asked(worker: Any, path: str, **kwargs: Any) -> Any:
    """What a server answers to a GET."""
    return worker.http.get(path, **kwargs)


def masks_logits_on_cpu(python: str) -> bool:
    """Whether SGLang's default grammar backend works without a GPU; else it ends the server."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    source = Path(folder.strip()) / "sglang/srt/constrained/xgrammar_backend.py"
    return 'device.type == "cpu"' in source.read_text()


# Small enough for a laptop; the rest are the library's own defaults for a CPU. bf16 logits of 8 to
# 16 are 0.06 apart, which would hide an error of log-probs: with the head in float32 (on both
# sides, see `hf_log_probs`) a bound of 0.02 means something on a peaked distribution too.
CPU_SERVER_ARGS: dict[str, Any] = {
    "max_total_tokens": 16384,
    "random_seed": 0,
    "enable_fp32_lm_head": True,
    # Set by tools/test_versions.sh: an environment with another release of SGLang.
    "server_python": SERVER_PYTHON,
}
if SERVER_PYTHON is not None and not masks_logits_on_cpu(SERVER_PYTHON):
    CPU_SERVER_ARGS["grammar_backend"] = "llguidance"

# A server with all that has to be asked for when it is started; tests share one of these too.
SPECIAL_SERVER_ARGS: dict[str, Any] = {
    **CPU_SERVER_ARGS,
    "enable_custom_logit_processor": True,
    "enable_return_hidden_states": True,
    "enable_lora": True,
    "max_lora_rank": 16,
    "lora_target_modules": [*ATTENTION, *MLP],
}


def wait_until(holds: Callable[[], Any], within_s: float = 15.0) -> float:
    """Seconds until it came about."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < within_s, "it did not come about"
        time.sleep(0.01)
    return time.monotonic() - start


def num_running(service: AsyncSGLang) -> int:
    """Requests that the server works on; its own count lags behind by some steps."""
    return int(asked(service.workers[0], "/v1/loads")["loads"][0]["num_running_reqs"])


@contextlib.contextmanager
def connected_schemes(
    service: AsyncSGLang,
) -> Iterator[Callable[..., SGLangWeightSyncScheme]]:
    """Makes schemes that are connected to a service, or to another one, and closes them."""
    made: list[SGLangWeightSyncScheme] = []

    def connect(to: AsyncSGLang | None = None, **kwargs: Any) -> SGLangWeightSyncScheme:
        scheme = SGLangWeightSyncScheme(to or service, **kwargs)
        made.append(scheme)
        scheme.init_on_sender()
        scheme.connect()
        return scheme

    yield connect
    for scheme in made:
        scheme.close()


def num_under_way(service: AsyncSGLang) -> int:
    """Requests that the server works on, or has in its queue."""
    load = asked(service.workers[0], "/v1/loads")["loads"][0]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def lacking(reason: str) -> NoReturn:
    """Skips a test with an older release; the one that the tests are made for lacks nothing."""
    if SERVER_PYTHON is None:
        pytest.fail(reason)
    pytest.skip(reason)


def needs(service: AsyncSGLang, *names: str) -> None:
    """Skips a test of what the server lacks, by what the library found out about it.

    Args:
        service: the server.
        names: attributes of its capabilities or features.
    """
    info = service.info
    for name in names:
        holder = info.capabilities if hasattr(info.capabilities, name) else info.features
        if not getattr(holder, name):
            lacking(f"SGLang {info.version} as it runs here has no {name}")


def needs_version_spans(service: AsyncSGLang) -> None:
    """Skips a test of them where a server has none, which only its answers tell."""
    body = {"input_ids": [20, 21], "sampling_params": {"max_new_tokens": 1}}
    if "weight_versions" not in told(service.workers[0], "/generate", body)["meta_info"]:
        lacking(f"SGLang {service.sglang_version} says one version per request")


def needs_xgrammar(what: str) -> None:
    """Skips a test of what the grammar backend of an old server on a CPU does otherwise."""
    if CPU_SERVER_ARGS.get("grammar_backend") == "llguidance":
        lacking(f"llguidance {what}")


@torch.no_grad()
def make_peaked_model(path: Path, *, seed: int = 0) -> Path:
    """A tiny Qwen2 with next-token distributions as peaked as a trained model's.

    Its layers are scaled down, so that bf16 noise (two right implementations differ by it) stays
    far below the differences that the tests look for, and its logits are scaled up.
    """
    make_tiny_model(path, seed=seed, hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.mul_(0.5)
    model.model.norm.weight.mul_(2.5)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def hf_log_probs(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probs of ``response`` after ``prompt`` in a Hugging Face forward of the same weights."""
    ids = torch.tensor([[*prompt, *response]])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    logits = hidden.float() @ model.lm_head.weight.float().T
    scores = (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
    return scores.squeeze(-1).tolist()


def worst_error(model: Any, prompts: Any, completions: Any, temperature: float = 1.0) -> float:
    """Largest difference between reported and Hugging Face log-probs over all tokens."""
    return max(
        abs(theirs - ours)
        for prompt, completion in zip(prompts, completions, strict=True)
        for theirs, ours in zip(
            completion.log_probs,
            hf_log_probs(model, prompt, completion.output_ids, temperature),
            strict=True,
        )
    )


def perturb(model: Any, seed: int, scale: float = 0.05) -> Any:
    """Moves every weight a little, as optimiser steps would; the model stays in bf16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale * parameter.std()
            parameter.add_(noise.to(parameter.dtype))
    return model


def ready_weights(service: AsyncSGLang, model_path: Path) -> None:
    """Brings a server back to its checkpoint, whatever state a test left it in."""
    for worker in service.workers:
        with contextlib.suppress(ServiceError):
            told(worker, "/end_weight_update")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    scheme = SGLangWeightSyncScheme(service)
    scheme.init_on_sender()
    scheme.connect()
    scheme.send(model)
    scheme.close()
