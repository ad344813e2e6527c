"""Pushes that fail or are refused, and the full push that repairs them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from helpers.asserts import error_of
from helpers.fault_proxy import Fault, FaultProxy
from helpers.prompts import EIGHT_PROMPTS
from helpers.servers import Connect, needs, perturb, told
from helpers.steps import NORM, STEPS
from torchrl_sglang import AsyncSGLang, ServiceState, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import (
    ConfigError,
    NotConnectedError,
    PortTakenError,
    PushError,
    ServiceBrokenError,
    TopologyError,
    WeightsError,
)

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}


@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut"])
@pytest.mark.parametrize("step", [step for step in STEPS if step != "init"])
def test_a_step_that_fails(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    step: str,
    cut: bool,
) -> None:
    """The error comes within seconds, nothing generates, and the next push repairs everything."""
    # Older servers have no begin and end, and may refuse a flush, which is no failure there.
    if step in ("begin", "end", "flush"):
        needs(proxied, "update_session")
    scheme = connected(proxied)
    perturb(model, seed=12)
    proxy.faults[STEPS[step]] = Fault(cut=True) if cut else Fault(status=400)
    start = time.monotonic()
    with pytest.raises(PushError) as caught:
        scheme.send(model)
    assert time.monotonic() - start < 5.0
    assert caught.value.step == step
    assert caught.value.engine == proxy.url
    assert caught.value.bucket == (0 if step == "transfer" else None)
    assert proxied.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError, match=step):
        proxied.generate([5, 6], {"max_new_tokens": 2})
    proxy.faults.clear()
    scheme.send(model)
    assert proxied.state is ServiceState.SYNCED
    assert error_of(proxied, model, EIGHT_PROMPTS, SAMPLING) < 0.02


def test_a_server_that_refuses_to_join(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, restore_weights: None
) -> None:
    proxy.faults[STEPS["init"]] = Fault(status=400)
    scheme = SGLangWeightSyncScheme(proxied)
    scheme.init_on_sender()
    start = time.monotonic()
    with pytest.raises(PushError, match="injected fault") as caught:
        scheme.connect()
    assert time.monotonic() - start < 5.0
    assert (caught.value.step, caught.value.engine) == ("init", proxy.url)
    assert proxied.state is ServiceState.SYNCED  # nothing was touched
    proxy.faults.clear()
    scheme.connect()
    scheme.send(model)
    scheme.close()


def test_a_session_that_a_dead_trainer_left_open(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    needs(service, "update_session")
    scheme = connected()
    told(service.workers[0], "/begin_weight_update")
    scheme.send(perturb(model, seed=13))
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02


def without(name: str) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[name]

    return change


def replaced(name: str, make: Any) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name] = make(state.get(name))

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without(NORM), "missing: model.norm.weight"),
        (replaced("model.norm.wait", lambda _: torch.zeros(3)), "model.norm.wait"),
        (replaced(NORM, lambda t: t[:-1]), "shape"),
        (replaced(NORM, lambda t: t.int()), "dtype"),
        (replaced(NORM, lambda t: t.to(torch.float8_e4m3fn)), "dtype"),
        (replaced(NORM, lambda t: t.to("meta")), "meta"),
        (replaced(NORM, lambda t: t.tolist()), "no tensors"),
        (lambda state: state.clear(), "empty"),
    ],
    ids=["missing", "unknown", "shape", "int", "fp8", "meta", "list", "empty"],
)
def test_wrong_weights_touch_nothing(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    change: Any,
    match: str,
) -> None:
    scheme = connected(proxied)
    state = dict(model.state_dict())
    change(state)
    proxy.seen.clear()
    with pytest.raises(WeightsError, match=match):
        scheme.send(state)
    assert not [path for path, _ in proxy.seen if path in STEPS.values()]
    assert proxied.state is ServiceState.SYNCED


def test_no_weights(connected: Connect) -> None:
    with pytest.raises(WeightsError, match="no weights"):
        connected().send()


def test_a_push_before_connect(service: AsyncSGLang, model: Any) -> None:
    """`test_connecting` has the scheme's, which connects by itself."""
    with pytest.raises(NotConnectedError, match="init_weight_update_group"):
        service.update_weights(model.state_dict().items())


def test_a_port_that_is_taken(service: AsyncSGLang) -> None:
    port = int(service.workers[0].url.rpartition(":")[2])
    scheme = SGLangWeightSyncScheme(service, master_port=port)
    scheme.init_on_sender()
    with pytest.raises(PortTakenError, match=str(port)):
        scheme.connect()


def test_wrong_arguments(service: AsyncSGLang) -> None:
    with pytest.raises(ConfigError, match="not both"):
        SGLangWeightSyncScheme(service, server_url=service.server_url)
    with pytest.raises(ConfigError, match="num_gpus=2"):
        SGLangWeightSyncScheme(service, num_gpus=2)


def test_data_parallel_servers_are_refused(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/server_info"] = Fault(
        garble=lambda content: json.dumps({**json.loads(content), "dp_size": 2}).encode()
    )
    proxied.refresh()
    for method in ("broadcast", "tensor"):
        with pytest.raises(TopologyError, match="num_replicas"):
            SGLangWeightSyncScheme(proxied, config=WeightSyncConfig(method=method))
