"""Pushes of LoRA adapters that fail, and what is taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.adapters import FROM_TENSORS, attach, generated, is_run, versions
from helpers.fault_proxy import Fault, FaultProxy
from helpers.peft_models import merged, peft_model, train
from helpers.processes import until
from helpers.prompts import LORA_PROMPTS
from helpers.servers import client_like, worst_error
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme
from torchrl_sglang.errors import (
    EngineLostError,
    InputError,
    PushError,
    PushTimeoutError,
    VerificationError,
)
from torchrl_sglang.servers.gate import ServiceState

pytestmark = pytest.mark.slow

UNLOAD, VERSION = "/unload_lora_adapter", "/update_weight_version"


Push = Callable[..., SGLangWeightSyncScheme]


@pytest.mark.parametrize(
    ("path", "fault", "kind", "step"),
    [
        (FROM_TENSORS, Fault(status=400, body='{"error_message": "too large"}'), PushError, "load"),
        (FROM_TENSORS, Fault(status=500), PushError, "load"),
        (FROM_TENSORS, Fault(cut=True), PushError, "load"),
        (FROM_TENSORS, Fault(lose=True), PushError, "load"),
        (FROM_TENSORS, Fault(delay_s=30.0), PushTimeoutError, "load"),
        ("/v1/models", Fault(status=500), PushError, "room"),
        ("/generate", Fault(status=500), PushError, "verify"),
        ("/generate", Fault(delay_s=30.0), PushTimeoutError, "verify"),
        ("/generate", Fault(garble=lambda _: b"{}"), PushError, "verify"),
        (VERSION, Fault(status=500), PushError, "version"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_push_that_fails(
    proxied: AsyncSGLang,
    front: FaultProxy,
    connected: Push,
    model: Any,
    path: str,
    fault: Fault,
    kind: type,
    step: str,
) -> None:
    scheme = connected(proxied)
    scheme.send(model)
    version, names, before = proxied.weight_version, proxied.lora.names(), merged(model)
    front.faults[path] = fault
    with pytest.raises(kind) as caught:
        scheme.send(train(model, 2))
    front.faults.clear()
    assert caught.value.step == step  # type: ignore[attr-defined]
    assert caught.value.engine == front.url  # type: ignore[attr-defined]
    assert not isinstance(caught.value, EngineLostError)
    assert proxied.lora.names() == names
    assert (proxied.weight_version, proxied.state) == (version, ServiceState.SYNCED)
    completions = generated(proxied)
    assert worst_error(before, LORA_PROMPTS, completions) < 0.02
    assert versions(completions) == {version}
    scheme.send(model)
    assert is_run(proxied, merged(model))


def test_an_error_says_what_sglang_said(connected: Push, model_path: Path, model: Any) -> None:
    scheme = connected()
    big = peft_model(model_path, r=32)
    with pytest.raises(
        PushError, match=r"step 'load'.*answered 400: .*rank 32.*max-lora-rank"
    ) as caught:
        scheme.send(big)
    assert "success" not in str(caught.value)
    assert "no server has 'policy@" in caught.value.__notes__[0]
    scheme.send(model)


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_a_mismatch(
    service: AsyncSGLang, connected: Push, model: Any, front: FaultProxy, later: bool
) -> None:
    scheme = connected()
    if later:
        scheme.send(model)
    names = service.lora.names()
    wrong = copy.deepcopy(model)
    with torch.no_grad():  # the trainer's base is not the one that is served
        wrong.base_model.model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    with pytest.raises(VerificationError, match="scores a probe differently") as caught:
        scheme.send(train(wrong, 2))
    assert "no server has" in caught.value.__notes__[0]
    assert service.lora.names() == names
    assert service.state is ServiceState.SYNCED
    if later:
        assert is_run(service, merged(model))
    else:
        with pytest.raises(InputError, match="'policy' is not loaded"):
            generated(service)
    scheme.send(train(model, 3))
    assert is_run(service, merged(model))


def test_what_failed_and_could_not_be_taken_back(
    proxied: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    scheme = connected(proxied)
    scheme.send(model)
    version = int(proxied.weight_version)
    front.faults[VERSION] = Fault(lose=True, times=1)  # the server takes it, and nobody knows
    front.faults[UNLOAD] = Fault(status=500, times=1)
    with pytest.raises(PushError, match="step 'version'") as caught:
        scheme.send(train(model, 2))
    assert f"may have 'policy@{version + 1}' now: the next push" in caught.value.__notes__[0]
    assert f"policy@{version + 1}" in proxied.lora.names()
    assert versions(generated(proxied)) == {str(version)}
    scheme.send(train(model, 3))
    assert scheme.last_push.version == version + 2  # type: ignore[union-attr]
    assert is_run(proxied, merged(model))
    assert proxied.lora.names() == tuple(sorted(f"policy@{v}" for v in (version, version + 2)))


def test_old_versions_that_can_not_be_unloaded(
    proxied: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    scheme = connected(proxied)
    front.faults[UNLOAD] = Fault(status=500)
    for seed in (1, 2, 3, 4):
        scheme.send(train(model, seed))
        assert is_run(proxied, merged(model))
    assert len(proxied.lora.names()) == 4
    front.faults.clear()
    scheme.send(train(model, 5))
    until(lambda: len(proxied.lora.names()) == 2)


class Pair:
    """A service of two servers, of which the second is a proxy in front of the first.

    What the second is to load it must not pass on: they would be in each other's way.
    """

    def __init__(self, service: AsyncSGLang, second: FaultProxy) -> None:
        self.service = attach(service.workers[0].url, service)
        client = client_like(service, second.url)
        cluster = self.service.cluster
        self.service.servers._cluster = replace(
            cluster,
            workers=(*cluster.workers, client),
            infos=(*cluster.infos, replace(cluster.infos[0], url=second.url)),
        )


def test_one_server_of_two_fails(
    service: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    front.faults[FROM_TENSORS] = Fault(status=400, body='{"error_message": "no room"}')
    with Pair(service, front).service as pair:
        scheme = connected(pair)
        with pytest.raises(PushError, match="no room") as caught:
            scheme.send(model)
        assert caught.value.engine == front.url
        assert service.lora.names() == ()
        front.faults[FROM_TENSORS] = Fault(status=200, body="{}")
        front.faults[UNLOAD] = Fault(status=200, body="{}")
        scheme.send(model)
        assert len(service.lora.names()) == 1
    assert [path for path, _ in front.seen].count(FROM_TENSORS) == 2


@pytest.mark.parametrize("lost_engines", ["raise", "drop"])
def test_a_server_is_gone(
    service: AsyncSGLang, connected: Push, model: Any, lost_engines: str
) -> None:
    with FaultProxy(service.workers[0].url) as second:
        pair = Pair(service, second).service
    with pair:
        scheme = connected(pair, lost_engines=lost_engines)
        if lost_engines == "raise":
            with pytest.raises(EngineLostError, match="the engine is gone"):
                scheme.send(model)
            assert service.lora.names() == ()
        else:
            scheme.send(model)
            assert scheme.last_push.lost_engines == (second.url,)  # type: ignore[union-attr]
            assert [worker.url for worker in pair.workers] == [service.workers[0].url]
            assert is_run(pair, merged(model))
