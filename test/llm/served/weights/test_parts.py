"""Pushes of a part of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.asserts import error_of
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import Connect, perturb
from helpers.ways import config
from torchrl_sglang import AsyncSGLang, ServiceState
from torchrl_sglang.errors import PushError, VerificationError, WeightsError


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
