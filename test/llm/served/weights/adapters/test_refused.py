"""What can not be pushed as a LoRA adapter is refused before anything is touched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.adapters import FROM_FOLDER, FROM_TENSORS, attach, generated, is_run
from helpers.fault_proxy import Fault, FaultProxy
from helpers.lora_files import random_adapter
from helpers.peft_models import merged, train
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import (
    ConfigError,
    InputError,
    NotConnectedError,
    PushError,
    ServiceBrokenError,
    UnsupportedOptionError,
    VerificationError,
    VersionError,
    WeightsError,
)

UNLOAD = "/unload_lora_adapter"


Push = Callable[..., SGLangWeightSyncScheme]


def test_refused_before_anything_is_touched(
    proxied: AsyncSGLang, front: FaultProxy, connected: Push, model: Any, base: Any, tmp_path: Path
) -> None:
    scheme = connected(proxied, check_finite=True)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_A" in n).fill_(torch.nan)
    front.seen.clear()
    for source, kind, says in (
        (None, WeightsError, "there is no adapter to push"),
        (base, WeightsError, "can't push an adapter from a Qwen2ForCausalLM"),
        (tmp_path, ConfigError, "is no LoRA adapter"),
        (broken, WeightsError, "NaN or infinity in"),
    ):
        with pytest.raises(kind, match=says):
            scheme.send(source)
    with pytest.raises(VersionError, match="version 0 can't be pushed"):
        scheme.push(model, version=0)
    assert {path for path, _ in front.seen} == {"/model_info"}
    unverified = random_adapter(tmp_path / "a", base, seed=1)
    strict = connected_with(scheme, verify_method="probe")
    with pytest.raises(VerificationError, match="in a folder can't be verified by a probe"):
        strict.push(unverified, version=10_000)
    assert proxied.lora.names() == ()
    scheme.close()
    with pytest.raises(NotConnectedError, match="not connected"):
        scheme.pusher.push(model)


def connected_with(scheme: SGLangWeightSyncScheme, **config: Any) -> Any:
    """The pusher of a scheme with other options."""
    scheme.pusher.link.config = replace(scheme.pusher.config, **config)
    return scheme.pusher


def test_a_name_of_another_adapter(
    service: AsyncSGLang, connected: Push, model: Any, base: Any, tmp_path: Path
) -> None:
    folder = random_adapter(tmp_path / "a", base, seed=1)
    service.lora.load("actor", folder)
    with pytest.raises(WeightsError, match=r"loaded as 'actor', .*choose another adapter_name"):
        connected(adapter_name="actor").send(model)


def test_a_name_of_ones_own(service: AsyncSGLang, connected: Push, model: Any) -> None:
    connected(adapter_name="actor").send(model)
    assert is_run(service, merged(model), "actor")
    with pytest.raises(InputError, match="'policy' is not loaded"):
        generated(service)


def test_servers_without_lora(shared_service: AsyncSGLang) -> None:
    scheme = SGLangWeightSyncScheme(shared_service, config=WeightSyncConfig(method="lora"))
    with pytest.raises(UnsupportedOptionError, match=r"without LoRA: .*enable_lora=True"):
        scheme.connect()


def test_a_broken_service(service: AsyncSGLang, connected: Push, model: Any) -> None:
    scheme = connected()
    service.gate.fail(PushError("lost", step="load"))
    try:
        with pytest.raises(ServiceBrokenError, match="push the whole model again"):
            scheme.send(model)
    finally:
        service.gate.commit()
    assert service.lora.names() == ()


def test_servers_that_hold_two_adapters(
    service: AsyncSGLang, front: FaultProxy, connected: Push, model: Any, base: Any, tmp_path: Path
) -> None:
    def limited(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), "max_loaded_loras": 2}).encode()

    front.faults["/server_info"] = Fault(garble=limited)
    with attach(front.url, service) as two:
        assert two.info.features.max_adapters == 2
        scheme = connected(two)
        for seed in (1, 2, 3, 4):
            front.seen.clear()
            scheme.send(train(model, seed))
            assert is_run(two, merged(model))
            if seed > 2:  # unloaded before, not after
                order = [path for path, _ in front.seen if path in (UNLOAD, FROM_TENSORS)]
                assert order == [UNLOAD, FROM_TENSORS]
        assert len(two.lora.names()) == 2
        version = int(two.weight_version)
        two.lora.unload(f"policy@{version - 1}")
        two.lora.load("b", random_adapter(tmp_path / "a", base, seed=1))
        with pytest.raises(PushError, match=rf"max_loaded_loras=2 and has 'b', 'policy@{version}'"):
            scheme.send(train(model, 5))
        assert two.lora.names() == ("b", f"policy@{version}")
        two.lora.unload("b")


def test_servers_that_take_no_tensors(
    service: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    front.faults["/openapi.json"] = Fault(
        garble=lambda content: content.replace(FROM_TENSORS.encode(), b"/something_else")
    )
    with attach(front.url, service) as older:
        assert not older.info.capabilities.adapter_tensors
        front.seen.clear()
        connected(older).send(model)
        bodies = [json.loads(body) for path, body in front.seen if path == FROM_FOLDER]
        loaded = [body["lora_path"] for body in bodies if body]  # an empty one asks for the route
        assert not Path(loaded[0]).exists()
        assert is_run(older, merged(model))
