"""Plans a push: reads and checks the weights, and touches no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import WeightSyncConfig
from ..errors import WeightsError
from ..servers.info import WorkerInfo
from .buckets import Bucket, plan_buckets, spec_of
from .source.checkpoint import as_written
from .source.expected import Dtypes, Expected, expected_model, model_config, served_dtype
from .source.lazy import placeholders
from .source.merged import MergedWeights, adapter_parameters, has_adapters, tuned_layers
from .source.named import check_finite, check_no_nan, matched, named_weights, unwrap
from .source.sharded import ShardedWeights, is_sharded
from .verify.verifier import Verifier


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A push.

    Attributes:
        weights: what is sent, under the names of the served model's checkpoint.
        sharded: those that ranks of the trainer gather for it, None if it is none.
        buckets: which tensors travel together.
        verifier: proves afterwards that it arrived.
        version: the weights' new version.
        partial: the servers keep what is not sent.
        repairs: the push before failed, and may have left servers dead or stuck.
    """

    weights: Mapping[str, torch.Tensor]
    sharded: ShardedWeights | None
    buckets: list[Bucket]
    verifier: Verifier
    version: int
    partial: bool
    repairs: bool


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
    partial: bool = False,
    repairs: bool = False,
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
        partial: a part of the model's parameters is pushed, the others stay as they are.
        repairs: the push before failed.

    Raises:
        WeightsError: there are none, or names, shapes, dtypes or values are not as they should be.
        VerificationError: the servers can't be verified in the way that is asked for.
    """
    expected = expected_model(model_path)
    refuse_quantised(infos, model_path)
    named = matched(named_weights(source, config.translate), expected, partial=partial)
    if config.check_finite:
        # Buffers may be infinite for good, such as the bounds of what is not bounded.
        numbers = {name: t for name, t in named.items() if name not in expected.optional}
        check_finite({**numbers, **_adapters(source)})
        check_no_nan({name: t for name, t in named.items() if name in expected.optional})
    dtypes = Dtypes(served=served_dtype(infos[0], expected), wide=expected.wide)
    weights = _made_when_sent(named, source, expected)
    sharded = weights if isinstance(weights, ShardedWeights) else None
    if copy:
        if sharded is not None:
            raise WeightsError(
                "sharded weights are gathered by all ranks together, which can't go on while they "
                "train: push with WeightSyncConfig(non_blocking=False)."
            )
        weights = {name: t.detach().to(dtypes.of(name), copy=True) for name, t in weights.items()}
    model = source if isinstance(source, nn.Module) else reference
    if sharded is not None:
        model = None
    sent = as_written(weights, expected.writer)
    whole = () if not partial else expected.names
    verifier = Verifier(config, infos, sent, dtypes, model, partial=partial, whole=whole)
    if verifies:
        verifier.refuse_impossible()
        if copy:
            verifier.prepare()
    specs = [spec_of(name, part, dtypes.of(name)) for name, part in placeholders(sent).items()]
    return Plan(
        weights=sent,
        sharded=sharded,
        buckets=plan_buckets(specs, config.bucket_bytes),
        verifier=verifier,
        version=version,
        partial=partial,
        repairs=repairs,
    )


def _made_when_sent(
    named: dict[str, torch.Tensor], source: Any, expected: Expected
) -> Mapping[str, torch.Tensor]:
    """The weights, of which sharded ones are gathered, and adapters merged, when they are sent.

    Raises:
        WeightsError: the weights are both; or an adapter changes one of two tied parameters.
    """
    adapted = isinstance(source, nn.Module) and has_adapters(unwrap(source))
    layers = tuned_layers(unwrap(source)) if adapted else {}
    if any(map(is_sharded, named.values())):
        if layers:
            raise WeightsError(
                "a PEFT model that is sharded can't be merged here: push the adapters alone with "
                "WeightSyncConfig(method='lora'), or a merged state dict."
            )
        return ShardedWeights(named)
    for name, partner in expected.tied.items():
        if partner in named and id(named[partner]) in layers:
            raise WeightsError(
                f"an adapter changes {partner} or {name}, which {expected.model_path} ties: merged "
                "they would differ, and the servers hold only one of them. Leave both out of the "
                "adapter's target_modules."
            )
    return MergedWeights(named, layers) if layers else named


def _adapters(source: Any) -> dict[str, torch.Tensor]:
    """The parameters of adapters that are merged into what is sent, if there are any."""
    adapted = isinstance(source, nn.Module) and has_adapters(unwrap(source))
    return adapter_parameters(unwrap(source)) if adapted else {}


def refuse_quantised(infos: Sequence[WorkerInfo], model_path: str) -> None:
    """Raises `WeightsError` where servers hold quantised weights, which a trainer's are not."""
    for info in infos:
        config = model_config(model_path)
        kind = info.quantization or getattr(config, "quantization_config", None)
        if kind:
            raise WeightsError(
                f"{info.url} serves quantised weights ({kind}): a push sends the trainer's as they "
                "are, without the scales that go with quantised ones. Serve the model unquantised, "
                "or push adapters alone with WeightSyncConfig(method='lora')."
            )
