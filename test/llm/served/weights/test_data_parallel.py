"""A server with data-parallel replicas of its own, which only files reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.servers import CPU_SERVER_ARGS, perturb, told, worst_error
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, Timeouts, WeightSyncConfig
from torchrl_sglang.errors import TopologyError, VerificationError
from torchrl_sglang.weights.carry.disk import DiskCarrier

pytestmark = pytest.mark.slow


PROMPTS = [[5, 6, 7], [300, 301, 302, 303], list(range(40, 60)), [9, 8], [77]]

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module")
def replicated(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    with AsyncSGLang.from_pretrained(
        str(model_path),
        device="cpu",
        dp_size=2,
        timeouts=timeouts,
        **CPU_SERVER_ARGS,
    ) as service:
        yield service


def test_a_push_reaches_every_replica(replicated: AsyncSGLang, model: Any) -> None:
    scheme = SGLangWeightSyncScheme(replicated, num_gpus=2)
    scheme.connect()
    for seed in (91, 92):
        scheme.send(perturb(model, seed=seed))
        push = scheme.last_push
        assert push is not None
        assert (push.method, push.verified_by) == ("disk", "checksum")
        assert "data- or pipeline-parallel" in push.reason
    answer = told(replicated.workers[0], "/weights_checker", {"action": "checksum"})
    assert len(answer["ranks"]) == 2
    for _ in range(2):  # requests take turns between the replicas
        assert worst_error(model, PROMPTS, replicated.generate(PROMPTS, SAMPLING)) < 0.02
    assert {c.weight_version for c in replicated.generate(PROMPTS, SAMPLING)} == {"2"}
    scheme.close()


def test_other_weights_are_noticed(
    replicated: AsyncSGLang, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SGLangWeightSyncScheme(replicated)
    scheme.connect()
    transfer = DiskCarrier.transfer

    def transfer_other(carrier: Any, buckets: Any, weights: Any, timer: Any) -> str:
        norm = "model.norm.weight"
        return transfer(carrier, buckets, {**weights, norm: weights[norm] + 1}, timer)

    with monkeypatch.context() as patched:
        patched.setattr(DiskCarrier, "transfer", transfer_other)
        with pytest.raises(VerificationError, match="norm"):
            scheme.send(model)
    scheme.send(model)
    scheme.close()


@pytest.mark.parametrize("method", ["broadcast", "tensor"])
def test_what_does_not_reach_them_is_refused(replicated: AsyncSGLang, method: Any) -> None:
    with pytest.raises(TopologyError, match=r"num_replicas.*method='disk'"):
        SGLangWeightSyncScheme(replicated, config=WeightSyncConfig(method=method))
