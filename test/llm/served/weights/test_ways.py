"""Every way of pushing weights on one real server: the same weights arrive, and nothing is left."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers.asserts import error_of
from helpers.fault_proxy import Fault, FaultProxy
from helpers.prompts import PROMPTS
from helpers.servers import Connect, asked, connect_like, num_running, perturb, wait_until
from helpers.ways import config
from torchrl_sglang import AsyncSGLang, get_model_metadata
from torchrl_sglang.errors import PushError, TopologyError, WeightsError
from torchrl_sglang.weights.carry import shared_memory

SAMPLING = {"max_new_tokens": 24, "ignore_eos": True}

METHODS = ["broadcast", "tensor", "disk"]


def shared_files() -> set[str]:
    return {name for name in os.listdir(shared_memory.SHARED_MEMORY) if name.startswith("torch_")}


# What arrives


@pytest.mark.parametrize("method", METHODS)
def test_several_pushes_arrive(
    service: AsyncSGLang, model: Any, connected: Connect, method: str
) -> None:
    scheme = connected(config=config(method))
    for seed in (71, 72, 73):
        scheme.send(perturb(model, seed=seed))
        push = scheme.last_push
        assert push is not None
        assert (push.method, push.verified_by) == (method, "checksum")
        assert push.reason == "it was asked for"
        assert push.num_buckets > 3
    assert error_of(service, model) < 0.02
    assert {c.weight_version for c in service.generate(PROMPTS, SAMPLING)} == {
        service.weight_version
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bucket_bytes", [1 << 14, 1 << 40])
def test_buckets_of_any_size(
    service: AsyncSGLang, model: Any, connected: Connect, method: str, bucket_bytes: int
) -> None:
    scheme = connected(config=config(method, bucket_bytes=bucket_bytes))
    scheme.send(perturb(model, seed=74))
    assert scheme.last_push is not None
    assert (scheme.last_push.num_buckets == 1) == (bucket_bytes == 1 << 40)
    assert error_of(service, model) < 0.02


def test_buffers_that_are_made_for_each_push(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """As those in a GPU's memory are."""
    scheme = connected(config=config("tensor"))
    carrier = scheme.pusher.link.carrier
    for keeps in (True, False, False):
        carrier._keeps_buffers = keeps
        scheme.send(perturb(model, seed=76))
        assert bool(carrier._buffers) is keeps
        assert error_of(service, model) < 0.02


def test_a_push_that_failed_keeps_no_buffers(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect, monkeypatch: Any
) -> None:
    """Though the service keeps the error, whose tracebacks have seen them."""
    made: list[weakref.ref[torch.Tensor]] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        buffer = shared_memory.allocate_shared(num_bytes)
        made.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr("torchrl_sglang.weights.carry.memory.allocate_shared", allocate)
    scheme = connected(proxied, config=config("tensor"))
    proxy.faults["/update_weights_from_tensor"] = Fault(status=400, after=2)
    with pytest.raises(PushError, match="bucket 2") as caught:
        scheme.send(model)
    assert proxied.gate.failure is caught.value
    assert [buffer() for buffer in made] == [None, None]
    proxy.faults.clear()
    scheme.send(model)
    assert error_of(proxied, model) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_push_that_grows_and_another_dtype(
    service: AsyncSGLang, model: Any, connected: Connect, method: str
) -> None:
    """Buffers of a small push don't do for the large one after it."""
    scheme = connected(config=config(method))
    norm = {"model.norm.weight": model.state_dict()["model.norm.weight"] * 1.1}
    scheme.push(norm, partial=True)
    scheme.send(perturb(model, seed=75).float())
    assert error_of(service, model.bfloat16()) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_push_that_does_not_block(
    service: AsyncSGLang, model: Any, connected: Connect, method: str
) -> None:
    scheme = connected(config=config(method, non_blocking=True))
    scheme.send(perturb(model, seed=76))
    sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model, seed=77)
    scheme.wait()
    model.load_state_dict(sent)
    assert error_of(service, model) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_requests_in_flight_lose_no_token(
    service: AsyncSGLang, model: Any, connected: Connect, method: str
) -> None:
    scheme = connected(config=config(method))
    sampling = {**SAMPLING, "max_new_tokens": 400}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.generate, PROMPTS, sampling)
        wait_until(lambda: num_running(service) >= len(PROMPTS), 20.0)
        scheme.send(perturb(model, seed=78))
        assert not running.done()
        completions = running.result(60.0)
    assert [len(c.output_ids) for c in completions] == [400] * len(PROMPTS)
    assert {c.weight_version for c in completions} == {service.weight_version}


# Files


def test_what_is_written(
    service: AsyncSGLang, model: Any, connected: Connect, tmp_path: Path
) -> None:
    folder = tmp_path / "not yet" / "there"
    scheme = connected(config=config("disk", folder=str(folder)))
    for seed in (82, 83):
        scheme.send(perturb(model, seed=seed))
    [checkpoint] = [entry for entry in folder.iterdir() if entry.is_dir()]
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    sent = get_model_metadata(model)
    assert index["weight_map"].keys() == sent.keys()
    assert index["metadata"]["total_size"] == scheme.last_push.num_bytes  # type: ignore[union-attr]
    for name, file in index["weight_map"].items():
        with safe_open(checkpoint / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), model.state_dict()[name])
    assert (checkpoint / "config.json").is_file()
    assert (checkpoint / "tokenizer.json").is_file()
    again = connect_like(service)
    if asked(again.workers[0], "/model_info")["model_path"] != again.model_path:
        assert again.model_path == service.model_path  # older releases forget it
    assert again.get_model_metadata() == sent
    again.shutdown()


def test_a_folder_that_can_not_be_written_to(
    service: AsyncSGLang, connected: Connect, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="can't be written to"):
        connected(config=config("disk", folder=str(tmp_path / "file" / "below")))
    with pytest.raises(WeightsError):
        connected(config=config("disk", folder="/proc/none"))


# What is left behind


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tensor", "disk"])
def test_nothing_is_left(
    service: AsyncSGLang, model_path: Path, restore_weights: None, method: str, tmp_path: Path
) -> None:
    """Neither shared memory nor temporary files outlive the trainer."""
    told = pickle.dumps((service, str(model_path), method)).hex()
    files = shared_files()
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, told],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100.0,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0
    deadline = time.monotonic() + 10.0
    while shared_files() - files and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shared_files() <= files
    assert not list(tmp_path.glob("torchrl_sglang-*"))


TRAINER = """
import os, pickle, sys, tempfile
from transformers import AutoModelForCausalLM
from torchrl_sglang import SGLangWeightSyncScheme, WeightSyncConfig
service, path, method = pickle.loads(bytes.fromhex(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(method=method))
scheme.connect()
scheme.send(model)
if method == "disk":
    print(len([n for n in os.listdir(tempfile.gettempdir()) if n.startswith("torchrl_sglang-")]))
else:
    print(len([n for n in os.listdir("/dev/shm") if n.startswith("torch_")]))
"""


def test_a_server_elsewhere_can_not_share_memory(
    proxied: AsyncSGLang, connected: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, method in (("memory", "tensor"), ("disk", "disk")):
        monkeypatch.setattr(f"torchrl_sglang.weights.carry.{module}.is_here", lambda url: False)
        with pytest.raises(TopologyError, match=proxied.workers[0].url):
            connected(proxied, config=config(method))
