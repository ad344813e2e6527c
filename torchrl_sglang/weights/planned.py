"""What a push will do, found possible before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import WeightSyncConfig
from ..errors import WeightsError
from ..info import WorkerInfo
from .expected import expected_model
from .plan import Bucket, plan_buckets, spec_of
from .served_dtype import served_dtype
from .sharded import ShardedWeights, is_sharded
from .source import check_finite, matched, named_weights
from .verify import Verifier


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A push.

    Attributes:
        weights: what is sent, under the served model's names.
        dtype: dtype in which it travels, the servers' own.
        buckets: which tensors travel together.
        verifier: proves afterwards that it arrived.
        version: the weights' new version.
    """

    weights: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    buckets: list[Bucket]
    verifier: Verifier
    version: int


def make_plan(
    source: Any,
    *,
    model_path: str,
    infos: Sequence[WorkerInfo],
    config: WeightSyncConfig,
    reference: nn.Module | None,
    version: int,
    verifies: bool,
    copy: bool,
) -> Plan:
    """Reads and checks the weights.

    Args:
        source: module, wrapper, TensorDict or state dict.
        model_path: where the served model's config is.
        infos: the servers.
        config: how to push.
        reference: model to verify with, if ``source`` is none.
        version: the weights' new version.
        verifies: the push will be verified.
        copy: the push runs while the trainer goes on: take a copy of the weights, and compute now
            what is needed of the model.

    Raises:
        NotConnectedError: there are no weights.
        WeightsError: names, shapes, dtypes or values are not as they should be.
        VerificationError: the servers can't be verified in the way that is asked for.
    """
    expected = expected_model(model_path)
    weights: Mapping[str, torch.Tensor] = matched(named_weights(source), expected)
    if config.check_finite:
        check_finite(weights)
    dtype = served_dtype(infos[0], expected)
    sharded = any(map(is_sharded, weights.values()))
    if copy:
        if sharded:
            raise WeightsError(
                "sharded weights are gathered by all ranks together, which can't go on while they "
                "train: push with WeightSyncConfig(non_blocking=False)."
            )
        weights = {name: t.detach().to(dtype, copy=True) for name, t in weights.items()}
    specs = [spec_of(name, tensor, dtype) for name, tensor in weights.items()]
    model = source if isinstance(source, nn.Module) else reference
    if sharded:
        weights, model = ShardedWeights(weights), None
    verifier = Verifier(config, infos, weights, dtype, model)
    if verifies:
        verifier.refuse_impossible()
        if copy:
            verifier.prepare()
    return Plan(
        weights=weights,
        dtype=dtype,
        buckets=plan_buckets(specs, config.bucket_bytes),
        verifier=verifier,
        version=version,
    )
