"""The scheme in TorchRL's collectors, and a GRPO step on what they collect."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.modules.llm.policies import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss

from helpers.collectors import SAMPLING, make_collector, make_env, served_error
from helpers.marks import LISTS_STACK, QUIET, UPDATER
from helpers.servers import perturb
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper
from torchrl_sglang.errors import PushError

pytestmark = [*QUIET, UPDATER, LISTS_STACK]


def last_version(service: AsyncSGLang, collector: Any) -> int:
    """The higher of the two: a push counts on from there."""
    served = service.weight_version
    return max(collector.policy_version, int(served) if served.isdecimal() else 0)


def test_llm_collector_with_weight_updater(
    service: AsyncSGLang, tokenizer: Any, model: Any, restore_weights: None
) -> None:
    scheme = SGLangWeightSyncScheme(service)
    collector = make_collector(service, tokenizer, weight_updater=scheme, track_policy_version=True)
    try:
        first = last_version(service, collector)
        for seed in (1, 2):
            collector.update_policy_weights_(perturb(model, seed))
            assert collector.policy_version == first + seed
            assert scheme.last_push.version == collector.policy_version  # type: ignore[union-attr]
            assert service.weight_version == str(collector.policy_version)
            assert served_error(service, model) < 0.02
    finally:
        collector.shutdown()
        scheme.close()


def test_attach(service: AsyncSGLang, tokenizer: Any, model: Any, restore_weights: None) -> None:
    scheme = SGLangWeightSyncScheme(service)
    collector = make_collector(service, tokenizer, track_policy_version=True)
    try:
        scheme.attach(collector)
        first = collector.policy_version
        collector.update_policy_weights_(perturb(model, 3))
        assert collector.policy_version == first + 1
        assert service.weight_version == str(first + 1)
        assert served_error(service, model) < 0.02
    finally:
        collector.shutdown()
        scheme.close()


def test_collector_with_weight_sync_schemes(
    service: AsyncSGLang, tokenizer: Any, model: Any, restore_weights: None
) -> None:
    scheme = SGLangWeightSyncScheme(service)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector = Collector(
            make_env(tokenizer),
            SGLangWrapper(service, generate_kwargs=SAMPLING),
            frames_per_batch=4,
            total_frames=400,
            weight_sync_schemes={"policy": scheme},
            trust_policy=True,
            use_buffers=False,
        )
    try:
        collector.update_policy_weights_(perturb(model, 4))
        assert served_error(service, model) < 0.02
    finally:
        collector.shutdown()
        scheme.close()


def test_a_failed_push_does_not_bump_the_version(
    proxied: AsyncSGLang, proxy: Any, tokenizer: Any, model: Any, restore_weights: None
) -> None:
    from helpers.fault_proxy import Fault

    scheme = SGLangWeightSyncScheme(proxied)
    collector = make_collector(proxied, tokenizer, weight_updater=scheme, track_policy_version=True)
    try:
        before, first = collector.policy_version, last_version(proxied, collector)
        proxy.faults["/update_weight_version"] = Fault(status=500)
        with pytest.raises(PushError):
            collector.update_policy_weights_(model)
        assert collector.policy_version == before
        proxy.faults.clear()
        collector.update_policy_weights_(model)
        assert collector.policy_version == first + 1
        assert proxied.weight_version == str(first + 1)
    finally:
        collector.shutdown()
        scheme.close()


def test_grpo_on_a_collected_batch(service: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    """On policy the importance ratios are 1: log-probs, masks and NaNs are as GRPOLoss wants."""
    collector = make_collector(service, tokenizer)
    try:
        batch = next(iter(collector)).reshape(-1)
    finally:
        collector.shutdown()
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)
    loss_module = GRPOLoss(actor)
    batch.set("advantage", torch.randn(4, 1, 1))
    loss = loss_module(batch)
    loss.loss_objective.backward()
    assert torch.isfinite(loss.loss_objective)
    assert abs(loss.ESS - 1.0) < 0.01
    assert abs(loss.kl_approx) < 0.01
    assert model.model.norm.weight.grad.abs().sum() > 0
