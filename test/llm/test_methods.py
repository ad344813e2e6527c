"""Every way of pushing weights on one real server: the same weights arrive."""

from __future__ import annotations

from helpers.prompts import PROMPTS
from helpers.asserts import error_of
from helpers.servers import Connect
from helpers.servers import connect_like
import json
import os
import pickle
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_proxy import Fault, FaultProxy
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from helpers.servers import asked, num_running, perturb, wait_until, worst_error

from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
    SGLangWeightSyncScheme,
    Timeouts,
    WeightSyncConfig,
    get_model_metadata,
)
from torchrl_sglang.errors import (
    PushError,
    PushTimeoutError,
    ServiceBrokenError,
    TopologyError,
    VerificationError,
    WeightsError,
)
from torchrl_sglang.weights.carry import shared_memory

SAMPLING = {"max_new_tokens": 24, "ignore_eos": True}
METHODS = ["broadcast", "tensor", "disk"]
SMALL = 1 << 18
ROUTES = {
    "tensor": "/update_weights_from_tensor",
    "disk": "/update_weights_from_disk",
}



def config(method: Any, **more: Any) -> WeightSyncConfig:
    return WeightSyncConfig(method=method, **{"bucket_bytes": SMALL, **more})


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
    carrier = scheme.pusher._carrier
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


# A part of the model


def test_a_part_of_the_model(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected(config=config("auto"))
    scheme.send(perturb(model, seed=79))
    attention = "model.layers.0.self_attn."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(attention) or name == "model.norm.weight":
                parameter.mul_(1.1)  # more would raise bf16's own noise above the bound below
    part = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(attention) or name == "model.norm.weight"
    }
    scheme.push(part, partial=True)
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"
    assert scheme.last_push.num_bytes == sum(t.numel() * 2 for t in part.values())
    assert error_of(service, model) < 0.02


def test_a_part_of_what_servers_fuse_is_probed(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """A server hashes q, k and v together, so that q alone can only be proved by scores."""
    scheme = connected(config=config("auto"))
    scheme.register_model(model)
    name = "model.layers.1.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    scheme.push({name: model.get_parameter(name)}, partial=True)
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "probe"
    assert error_of(service, model) < 0.02


def test_a_part_that_nothing_can_prove_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=config("auto"))
    name = "model.layers.1.self_attn.q_proj.weight"
    proxy.seen.clear()
    with pytest.raises(VerificationError, match=f"fuses {name}.*register_model"):
        scheme.push({name: model.get_parameter(name)}, partial=True)
    assert "/pause_generation" not in [path for path, _ in proxy.seen]
    assert proxied.state is ServiceState.SYNCED


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"model.nrom.weight": torch.zeros(128)}, "model.nrom.weight"),
        ({"model.norm.weight": torch.zeros(3)}, r"shape \(3,\)"),
        ({}, "empty"),
    ],
)
def test_a_wrong_part_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, connected: Connect, part: Any, match: str
) -> None:
    scheme = connected(proxied, config=config("auto"))
    proxy.seen.clear()
    with pytest.raises(WeightsError, match=match):
        scheme.push(part, partial=True)
    assert "/pause_generation" not in [path for path, _ in proxy.seen]
    with pytest.raises(WeightsError, match="partial=True"):
        scheme.push({"model.norm.weight": torch.zeros(128)})
    assert proxied.state is ServiceState.SYNCED


def test_a_part_repairs_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=config("auto"))
    proxy.faults["/update_weight_version"] = Fault(status=500, times=1)
    with pytest.raises(PushError):
        scheme.send(model)
    with pytest.raises(WeightsError, match="whole model"):
        scheme.push({"model.norm.weight": model.model.norm.weight}, partial=True)
    assert proxied.state is ServiceState.BROKEN
    scheme.send(model)
    assert proxied.state is ServiceState.SYNCED


# Checkpoints in another form


def to_megatron(state: dict[str, Any], heads: int, groups: int) -> dict[str, Any]:
    """As Megatron names and fuses: q, k and v by groups of heads, and an entry without a tensor."""
    made: dict[str, Any] = {"decoder.layers._extra_state": None}
    for name, tensor in state.items():
        prefix, _, rest = name.partition(".self_attn.")
        if rest.startswith(("k_proj", "v_proj")):
            continue
        if rest.startswith("q_proj"):
            kind = rest.rpartition(".")[2]
            q, k, v = (state[f"{prefix}.self_attn.{x}_proj.{kind}"] for x in "qkv")
            size = k.shape[0] // groups
            parts = [
                torch.cat(
                    [
                        q.reshape(groups, heads // groups * size, -1)[group],
                        k.reshape(groups, size, -1)[group],
                        v.reshape(groups, size, -1)[group],
                    ]
                )
                for group in range(groups)
            ]
            fused = torch.cat(parts)
            made[f"decoder.{prefix}.linear_qkv.{kind}"] = fused if kind == "weight" else fused[:, 0]
        else:
            made[f"decoder.{name}"] = tensor
    return made


def from_megatron(heads: int, groups: int) -> Callable[[Any], Any]:
    def translate(state: Any) -> Any:
        for name, tensor in state.items():
            if tensor is None:
                continue
            plain = name.removeprefix("decoder.")
            if ".linear_qkv." not in plain:
                yield plain, tensor
                continue
            layer, kind = plain.split(".linear_qkv.")
            rows = tensor.shape[0] // groups
            size = rows // (heads // groups + 2)
            grouped = tensor.reshape(groups, rows, *tensor.shape[1:])
            for letter, part in zip(
                "qkv", grouped.split([rows - 2 * size, size, size], 1), strict=True
            ):
                yield f"{layer}.self_attn.{letter}_proj.{kind}", part.flatten(0, 1)

    return translate


def test_a_translation_of_names(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    given = to_megatron(perturb(model, seed=80).state_dict(), *heads)
    assert any("linear_qkv" in name for name in given)
    scheme = connected(config=config("auto", translate=from_megatron(*heads)))
    scheme.send(given)
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"
    assert error_of(service, model) < 0.02


def test_the_documents_snippet(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    text = (Path(__file__).parents[2] / "docs/source/weight_sync.rst").read_text()
    section = text.partition("What can be pushed\n---")[2].partition("\n---")[0]
    [block] = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", section)
    names: dict[str, Any] = {"WeightSyncConfig": WeightSyncConfig}
    exec(re.sub(r"(?m)^   ", "", block), names)
    perturb(model, seed=84)
    scheme = connected(config=names["config"])
    scheme.send({f"actor.{name}": tensor for name, tensor in model.state_dict().items()})
    assert error_of(service, model) < 0.02


def test_wrong_translations(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected(config=config("auto", translate=lambda state: [*state.items()] * 2))
    with pytest.raises(WeightsError, match="twice"):
        scheme.send(model.state_dict())
    scheme.close()
    scheme = connected(config=config("auto", translate=lambda state: {"a": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="a"):
        scheme.send(model.state_dict())
    assert service.state is ServiceState.SYNCED


# PEFT


def adapted(model: Any, **options: Any) -> Any:
    """A PEFT model whose adapters are not the zeros that they begin with."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["norm"]}],
    ids=lambda options: next(iter(options), "lora"),
)
def test_adapters_are_merged_as_they_are_sent(
    service: AsyncSGLang, model: Any, connected: Connect, options: dict[str, Any]
) -> None:
    peft = adapted(model, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            peft.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.1)
    before = {name: tensor.clone() for name, tensor in peft.state_dict().items()}
    scheme = connected(config=config("auto"))
    scheme.send(peft)
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"
    after = peft.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    completions = service.generate(PROMPTS, SAMPLING)
    merged = peft.merge_and_unload()
    assert worst_error(merged, PROMPTS, completions) < 0.02


@pytest.mark.parametrize("method", ["tensor", "disk"])
def test_merged_adapters_by_every_way(
    service: AsyncSGLang, model: Any, connected: Connect, method: str
) -> None:
    peft = adapted(model)
    scheme = connected(config=config(method, non_blocking=method == "disk"))
    scheme.send(peft)
    scheme.wait()
    completions = service.generate(PROMPTS, SAMPLING)
    assert worst_error(peft.merge_and_unload(), PROMPTS, completions) < 0.02


@pytest.mark.parametrize("non_blocking", [False, True])
def test_merged_adapters_are_probed_with_the_model_itself(
    service: AsyncSGLang, model: Any, connected: Connect, non_blocking: bool
) -> None:
    peft = adapted(model)
    scheme = connected(config=config("auto", verify_method="probe", non_blocking=non_blocking))
    scheme.send(peft)
    scheme.wait()
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "probe"
    completions = service.generate(PROMPTS, SAMPLING)
    assert worst_error(peft.merge_and_unload(), PROMPTS, completions) < 0.02


def test_adapters_that_are_switched_off_are_not_merged(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    peft = adapted(model)
    scheme = connected(config=config("auto"))
    with peft.disable_adapter():
        scheme.send(peft)
    completions = service.generate(PROMPTS, SAMPLING)
    assert worst_error(peft.unload(), PROMPTS, completions) < 0.02


def test_metadata_of_a_peft_model_is_its_bases(service: AsyncSGLang, model: Any) -> None:
    expected = get_model_metadata(model)
    assert get_model_metadata(adapted(model)) == expected == service.get_model_metadata()


def test_adapters_of_tied_embeddings_are_refused(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected(config=config("auto"))
    with pytest.warns(UserWarning, match="tied"):
        peft = adapted(model, target_modules=["embed_tokens"])
    with pytest.raises(WeightsError, match="ties"):
        scheme.send(peft)
    assert service.state is ServiceState.SYNCED


def test_adapters_that_are_not_finite(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    peft = adapted(model)
    with torch.no_grad():
        next(p for n, p in peft.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    scheme = connected(config=config("auto"))
    with pytest.raises(WeightsError, match="lora_B"):
        scheme.send(peft)
    assert service.state is ServiceState.SYNCED


# Failures


@pytest.fixture
def impatient(proxy: FaultProxy, shared_service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    with connect_like(shared_service, proxy.url, timeouts=Timeouts(transfer_s=2.0, control_s=20.0, request_s=60.0),
    ) as external:
        yield external


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(status=400, times=1), PushError),
        (Fault(status=500, times=1), PushError),
        (Fault(cut=True, times=1), PushError),
        (Fault(delay_s=30.0, times=1), PushTimeoutError),
    ],
    ids=["400", "500", "cut", "no answer"],
)
def test_a_server_that_fails(
    impatient: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    method: str,
    fault: Fault,
    expected: type[PushError],
) -> None:
    proxied = impatient
    scheme = connected(proxied, config=config(method))
    proxy.faults[ROUTES[method]] = replace(fault)  # each run counts its own
    begun = time.monotonic()
    with pytest.raises(expected) as caught:
        scheme.send(perturb(model, seed=81))
    assert time.monotonic() - begun < 5.0
    assert (caught.value.engine, caught.value.step) == (proxy.url, "transfer")
    assert caught.value.bucket == (0 if method == "tensor" else None)
    assert proxied.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError):
        proxied.generate(PROMPTS, SAMPLING)
    scheme.send(model)
    assert proxied.state is ServiceState.SYNCED
    assert error_of(proxied, model) < 0.02


def test_a_disk_without_room_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect, monkeypatch: Any
) -> None:
    scheme = connected(proxied, config=config("disk"))
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("torchrl_sglang.weights.carry.disk.shutil.disk_usage", lambda _: usage)
    proxy.seen.clear()
    with pytest.raises(WeightsError, match="does not fit"):
        scheme.send(model)
    assert "/pause_generation" not in [path for path, _ in proxy.seen]
    assert proxied.state is ServiceState.SYNCED


def test_shared_memory_without_room_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect, monkeypatch: Any
) -> None:
    scheme = connected(proxied, config=config("tensor"))
    monkeypatch.setattr(shared_memory, "free_shared_bytes", lambda: 1000)
    proxy.seen.clear()
    with pytest.raises(WeightsError, match="bucket_bytes"):
        scheme.send(model)
    assert "/pause_generation" not in [path for path, _ in proxy.seen]
    assert proxied.state is ServiceState.SYNCED


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ("expandable_segments:True", "expandable_segments:False"),
        (
            "max_split_size_mb:512,expandable_segments:True",
            "max_split_size_mb:512,expandable_segments:False",
        ),
        ("expandable_segments: True", "expandable_segments:False"),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_memory_that_is_shared_is_not_expandable(settings: str, inside: str) -> None:
    """Servers can't fetch what expandable segments are shared by; nothing else changes."""
    read, change = torch._C._accelerator_getAllocatorSettings, shared_memory.change_allocator
    before = read()
    change(settings)
    try:
        with shared_memory.no_expandable_segments():
            assert read() == inside
        assert read() == settings
    finally:
        change(before)


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
