"""What a push can be told: how it pauses, verifies, divides, and whether it blocks."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch

from helpers.asserts import error_of
from helpers.fault_proxy import Fault, FaultProxy
from helpers.prompts import PROMPTS
from helpers.servers import Connect, perturb, worst_error
from torchrl_sglang import AsyncSGLang, ServiceState, WeightSyncConfig
from torchrl_sglang.errors import (
    PushError,
    RequestAbortedError,
    ServiceBrokenError,
    VerificationError,
    WeightsError,
)
from torchrl_sglang.servers.threads import in_thread
from torchrl_sglang.weights.carry.broadcast import Broadcast
from torchrl_sglang.weights.targets import Targets

SAMPLING = {"max_new_tokens": 24, "ignore_eos": True}

ROUTE = "/update_weights_from_distributed"


def posts(proxy: FaultProxy, path: str) -> int:
    return sum(seen == path for seen, _ in proxy.seen)


# Buckets and layouts


@pytest.mark.parametrize("layout", ["flattened", "tensors"])
@pytest.mark.parametrize("bucket_bytes", [1 << 16, 1 << 20, 1 << 40])
def test_the_same_weights_arrive_however_they_are_divided(
    service: AsyncSGLang, model: Any, connected: Connect, layout: Any, bucket_bytes: int
) -> None:
    scheme = connected(config=WeightSyncConfig(layout=layout, bucket_bytes=bucket_bytes))
    scheme.send(perturb(model, seed=31))
    push = scheme.last_push
    assert push is not None
    assert (push.layout, push.verified_by) == (layout, "checksum")
    assert (push.num_buckets > 1) == (bucket_bytes < 1 << 40)
    assert push.num_bytes == sum(p.numel() * 2 for p in model.parameters())
    assert error_of(service, model) < 0.02


def test_a_trainer_in_another_dtype(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected(config=WeightSyncConfig(layout="tensors"))
    scheme.send(perturb(model, seed=32).float())
    assert error_of(service, model.bfloat16()) < 0.02


@pytest.mark.parametrize("method", ["broadcast", "tensor", "disk"])
def test_the_time_of_each_part(model: Any, connected: Connect, method: Any) -> None:
    scheme = connected(config=WeightSyncConfig(method=method))
    scheme.send(model)
    push = scheme.last_push
    assert push is not None
    parts = {"pause", "flush", "begin", "transfer", "end", "verify", "version", "continue"}
    assert parts <= push.step_s.keys() | {"begin", "end"}
    assert ("write" in push.step_s) == (method == "disk")
    sent_s = push.step_s.get("write", 0.0) + push.step_s["transfer"]
    assert sent_s <= push.push_s <= push.paused_s <= push.total_s
    assert sum(push.step_s.values()) <= push.total_s * 1.01


# Verification


def test_verification_of_the_first_push_only(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=WeightSyncConfig(verify="first"))
    for verified_by in ("checksum", "nothing", "nothing"):
        scheme.send(perturb(model, seed=33))
        assert scheme.last_push is not None
        assert scheme.last_push.verified_by == verified_by
    assert posts(proxy, "/weights_checker") == 1
    proxy.faults[ROUTE] = Fault(status=400, times=1)
    with pytest.raises(PushError):
        scheme.send(model)
    scheme.send(model)  # a repair is proved again
    assert scheme.last_push.verified_by == "checksum"
    assert error_of(proxied, model) < 0.02


def test_no_verification(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=WeightSyncConfig(verify="never"))
    scheme.send(dict(perturb(model, seed=34).named_parameters()))
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "nothing"
    assert posts(proxy, "/weights_checker") == posts(proxy, "/generate") == 0


def test_a_probe_without_a_model_is_refused_before_anything_is_touched(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=WeightSyncConfig(verify_method="probe"))
    proxy.seen.clear()
    with pytest.raises(VerificationError, match="register one with scheme"):
        scheme.send(dict(model.named_parameters()))
    assert posts(proxy, "/pause_generation") == 0
    assert proxied.state is ServiceState.SYNCED


def test_an_unknown_layout_without_a_model_is_refused_before_anything_is_touched(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    other = {"model_type": "gpt_neox"}
    proxy.faults["/model_info"] = Fault(
        garble=lambda content: json.dumps({**json.loads(content), **other}).encode()
    )
    proxied.refresh()
    scheme = connected(proxied)
    proxy.seen.clear()
    with pytest.raises(VerificationError, match=r"'gpt_neox'.*register_model.*verify='never'"):
        scheme.send(model.state_dict())
    assert posts(proxy, "/pause_generation") == 0
    assert proxied.state is ServiceState.SYNCED
    scheme.send(model)  # has what a probe needs; equal checksums prove this one all the same
    assert scheme.last_push is not None
    assert scheme.last_push.verified_by == "checksum"


def test_what_ran_on_weights_that_a_probe_refuses_does_not_go_on(
    service: AsyncSGLang,
    proxied: AsyncSGLang,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is another service's, whose calls are not held while the servers are proved."""
    scheme = connected(proxied, config=WeightSyncConfig(verify_method="probe"))
    transfer = Broadcast.transfer

    def transfer_other_weights(carrier: Broadcast, buckets: Any, weights: Any, timer: Any) -> str:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed["model.norm.weight"] *= 1.5
        return transfer(carrier, buckets, changed, timer)

    sampling = {"max_new_tokens": 2000, "ignore_eos": True}
    running = in_thread(lambda: service.generate([7, 8, 9], sampling), "test")
    time.sleep(0.5)
    with monkeypatch.context() as patched:
        patched.setattr(Broadcast, "transfer", transfer_other_weights)
        with pytest.raises(VerificationError, match="scores a probe differently"):
            scheme.send(model)
    with pytest.raises(RequestAbortedError):
        running.result(5.0)
    assert proxied.state is ServiceState.BROKEN
    scheme.send(model)
    assert error_of(proxied, model) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    service: AsyncSGLang, model: Any, connected: Connect, value: float
) -> None:
    scheme = connected()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(WeightsError, match=r"NaN or infinity in 1 of .*layers\.1\.mlp\.up_proj"):
        scheme.send(model)
    assert service.state is ServiceState.SYNCED


# Without blocking


def test_the_trainer_goes_on_while_weights_are_pushed(
    service: AsyncSGLang, model: Any, connected: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it changes meanwhile is not sent; requests wait for the weights of the push."""
    scheme = connected(config=WeightSyncConfig(non_blocking=True))
    begin, may_begin = Targets.begin, threading.Event()

    def begin_late(targets: Targets) -> None:
        assert may_begin.wait(20.0)
        begin(targets)

    monkeypatch.setattr(Targets, "begin", begin_late)
    perturb(model, seed=36)
    pushed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scheme.send(model)
    assert service.state is ServiceState.UPDATING
    perturb(model, seed=37, scale=0.5)
    results = in_thread(lambda: service.generate(PROMPTS, SAMPLING), "test")
    time.sleep(0.2)
    assert not results.done()
    may_begin.set()
    completions = results.result(30.0)
    push = scheme.wait()
    assert push is scheme.last_push is not None
    assert scheme.wait() is None
    model.load_state_dict(pushed)
    assert worst_error(model, PROMPTS, completions) < 0.02
    assert {completion.weight_version for completion in completions} == {str(push.version)}


def test_what_a_push_that_did_not_block_raises(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    scheme = connected(proxied, config=WeightSyncConfig(non_blocking=True))
    proxy.faults[ROUTE] = Fault(status=500, times=1)
    scheme.send(perturb(model, seed=38))
    with pytest.raises(ServiceBrokenError):
        proxied.generate(PROMPTS, SAMPLING)
    with pytest.raises(PushError, match="'transfer', bucket 0"):
        scheme.send(model)
    scheme.send(model)
    assert scheme.wait() is not None
    assert error_of(proxied, model) < 0.02


def test_wrong_weights_are_refused_at_once(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected(config=WeightSyncConfig(non_blocking=True))
    with pytest.raises(WeightsError):
        scheme.send({"nonsense": torch.zeros(2)})
    assert service.state is ServiceState.SYNCED
    assert scheme.wait() is None


# After a failure


def test_a_server_that_went_on_is_paused_again(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, connected: Connect
) -> None:
    """The server goes on, but its answer is lost: it has to be taken for unknown."""
    scheme = connected(proxied)
    proxy.faults["/continue_generation"] = Fault(lose=True, times=1)
    with pytest.raises(PushError, match="'continue'"):
        scheme.send(perturb(model, seed=39))
    orders = [path for path, _ in proxy.seen if path.endswith("_generation")]
    assert orders[-2:] == ["/continue_generation", "/pause_generation"]
    assert proxied.state is ServiceState.BROKEN
    scheme.send(model)
    assert error_of(proxied, model) < 0.02
