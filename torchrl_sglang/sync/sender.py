"""Offers the sender of TorchRL's training recipes, for a script that pushes by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, NotConnectedError, RequestRefusedError, WeightsError
from ..service.service import AsyncSGLang
from ..weights.result import PushResult
from ..weights.source.checkpoint import saved_buffers
from ..weights.source.expected import Expected, expected_model
from ..weights.source.merged import base_weights, has_adapters
from ..weights.source.named import (
    named_weights,
    plain_name,
    refuse_fsdp1,
    served_names,
    shown,
    unwrap,
)
from .counters import bring_up
from .faces import RECEIVERS, Sync

Metadata = Mapping[str, tuple[torch.dtype, torch.Size]]


def get_model_metadata(model: Any) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name, dtype and shape of each parameter that a push of ``model`` sends.

    Args:
        model: module, also in TorchRL's, DDP's or ``torch.compile``'s wrapper, or anything else
            that can be pushed; of a PEFT model the base model's. Tied parameters appear once, of
            buffers those of a checkpoint (a TensorDict may have others, which do no harm).

    Returns:
        By Hugging Face's names, what ``service.get_model_metadata()`` returns for the served model.

    Raises:
        WeightsError: it has no parameters, or only all ranks together have them (FSDP1).
    """
    if isinstance(model, nn.Module):
        refuse_fsdp1(model)
        inner = unwrap(model)
        found = (
            base_weights(inner)
            if has_adapters(inner)
            else {**dict(inner.named_parameters()), **saved_buffers(inner)}
        )
        named: Mapping[str, torch.Tensor] = {plain_name(name): p for name, p in found.items()}
        if not named:
            raise WeightsError(f"this {type(model).__name__} has no parameters.")
    else:
        named = named_weights(model)
    return {name: (tensor.dtype, tensor.shape) for name, tensor in named.items()}


def check_metadata(metadata: Metadata | None, expected: Expected) -> None:
    """Checks that what a trainer wants to push is the served model, whole.

    Raises:
        WeightsError: it is no such mapping; or a name is unknown or missing, a shape is another, a
            dtype can't be cast to the served one; says which.
    """
    if not isinstance(metadata, Mapping):
        raise WeightsError(
            f"metadata is what get_model_metadata(model) returns, not a {type(metadata).__name__}."
        )
    odd = [str(name) for name, entry in metadata.items() if not _is_entry(name, entry)]
    if odd:
        raise WeightsError(f"metadata is a dtype and a shape by name; not so: {shown(odd)}.")
    names = served_names(metadata, expected)
    wrong = []
    for given, name in names.items():
        if name in expected.buffers:
            continue
        dtype, shape = metadata[given]
        served = expected.shape_of(name)
        if tuple(shape) != tuple(served):
            wrong.append(f"{given} has shape {tuple(shape)} instead of {tuple(served)}")
        elif not dtype.is_floating_point or dtype.itemsize < 2:
            wrong.append(f"{given} has dtype {dtype}")
    if wrong:
        raise WeightsError(f"this is not the served model {expected.model_path}: {shown(wrong)}.")


def _is_entry(name: Any, entry: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(entry, tuple | list)
        and len(entry) == 2
        and isinstance(entry[0], torch.dtype)
        and isinstance(entry[1], tuple | list)
    )


class SGLangWeightSender:
    """Pushes a trainer's weights, and counts the collectors up; TorchRL's class of the same name.

    ::

        sender = scheme.create_sender()
        sender.register_model(train_model)
        sender.init_all_workers_group(get_model_metadata(train_model), vllm_engine=service)
        sender.register_collector(collector)
        sender.update_weights()

    Who calls counts: a push by `update_weights` counts every registered collector up, once; a push
    by ``collector.update_policy_weights_`` is counted by that collector, and the other registered
    ones follow. Either way they then have the number that the servers run.

    Args:
        scheme: how and whereto to push.
    """

    def __init__(self, scheme: Sync) -> None:
        self._scheme = scheme

    def register_model(self, model: nn.Module) -> None:
        """Names the model whose weights `update_weights` pushes.

        Args:
            model: any module that can be pushed; kept alive.

        Raises:
            WeightsError: it is no module.
        """
        if not isinstance(model, nn.Module):
            raise WeightsError(f"register a module, not a {type(model).__name__}.")
        self._scheme.register_model(model)

    def register_collector(self, collector: Any) -> None:
        """Makes every push count this collector's version up.

        One that lags behind the servers is brought to their version at once, since that is what
        its next rollouts are sampled by.

        Args:
            collector: any of TorchRL's; registering it twice changes nothing.

        Raises:
            ConfigError: it has no ``increment_version``.
            PushError: a server does not say which version it runs.
        """
        if not callable(getattr(collector, "increment_version", None)):
            raise ConfigError(
                f"a {type(collector).__name__} is no collector: it has no increment_version()."
            )
        if any(collector is known for known in self._scheme.collectors):
            return
        if self._scheme.synchronized_on_sender:  # else it is brought up then
            bring_up(collector, self._scheme.service.servers.highest_version())
        self._scheme.collectors.append(collector)

    def init_all_workers_group(
        self, model_metadata: Metadata | None, vllm_engine: Any = None, *, engine: Any = None
    ) -> None:
        """Joins the trainer and all ranks of all servers into one group; harmless twice.

        Args:
            model_metadata: what will be pushed, from `get_model_metadata`; not used, and None will
                do, where only an adapter is pushed.
            vllm_engine: the engine, under the name that TorchRL's recipe has for it. A scheme that
                was made without servers pushes to this one; else it is only checked.
            engine: the same, under a better name.

        Raises:
            ConfigError: the engine is not the one that the scheme pushes to.
            WeightsError: the metadata is not the served model's; says which names or shapes.
            AlreadyConnectedError: another scheme is connected to the service.
            TopologyError: a server can't take part.
            PushError: a server refused or did not come.
        """
        for given in (vllm_engine, engine):
            if given is not None:
                self._scheme.push_to(given)
        if self._scheme.config.method != "lora":
            path = self._scheme.model_path or self._scheme.service.model_path
            check_metadata(model_metadata, expected_model(path))
        self._scheme.connect()

    def update_weights(
        self,
        weights: Any = None,
        *,
        version: int | None = None,
        label: str | None = None,
        partial: bool = False,
    ) -> PushResult | None:
        """Pushes, and returns once every server runs the weights and every collector counted it.

        With ``WeightSyncConfig(non_blocking=True)`` it returns None at once.

        Args:
            weights: module, TensorDict, state dict, pairs of name and tensor, or None for the
                registered model.
            version: the weights' number; by default one more than the highest that a server or a
                registered collector has.
            label: a name for that number, see `SGLangWeightSyncScheme.push`.
            partial: ``weights`` may be a part of the model; the servers keep the rest.

        Raises:
            NotConnectedError: after `shutdown`, without servers, or in a process that was forked
                from the one that connected.
            VersionError: ``version`` is not higher than the servers'; nothing was touched.
            WeightsError: names, shapes or dtypes are not the served model's; nothing was touched.
            PushError: a step failed; the service is broken until a push succeeds.
            VerificationError: the servers do not hold what was sent; broken likewise.
        """
        return self._scheme.push(weights, version=version, label=label, partial=partial)

    def flush_cache(self) -> bool:
        """Empties the servers' prefix caches, which no push needs.

        Returns:
            Whether they are empty; a server refuses while it has requests.

        Raises:
            ServiceError: a server does not answer.
        """
        try:
            self._scheme.service.flush_cache()
        except RequestRefusedError:
            return False
        return True

    def shutdown(self) -> None:
        """Leaves the group and forgets the collectors; harmless twice."""
        self._scheme.collectors.clear()
        self._scheme.close()


class SGLangWeightReceiver:
    """Stands where TorchRL's vLLM recipes have a receiver; the receivers are the servers.

    Args:
        scheme: the scheme that pushes to them.
        engine: as in `SGLangWeightSender.init_all_workers_group`.

    Raises:
        ConfigError: the engine is not the one that the scheme pushes to.
    """

    def __init__(self, scheme: Sync, engine: Any = None) -> None:
        self._scheme = scheme
        if engine is not None:
            scheme.push_to(engine)

    def init_all_workers_group(self, model_metadata: Metadata) -> None:
        """Checks the metadata; the servers join when the sender's method of this name is called.

        Args:
            model_metadata: from `get_model_metadata`.

        Raises:
            WeightsError: it is not the served model's.
        """
        path = self._scheme.model_path or self._scheme.service.model_path
        check_metadata(model_metadata, expected_model(path))

    def apply_weights(self, weights: Any, inplace: bool = True) -> None:
        """Refuses: what is handed in here would not reach the servers.

        Args:
            weights: not used.
            inplace: not used.

        Raises:
            NotConnectedError: always.
        """
        raise NotConnectedError(f"{RECEIVERS} Push these with sender.update_weights(weights).")

    def poll_and_apply(self, timeout: float = 0.1) -> bool:
        """False at once: a push does not return before the servers hold it.

        Args:
            timeout: not used.
        """
        return False


def check_engine(engine: Any, service: AsyncSGLang) -> None:
    """Raises `ConfigError` where ``engine`` is not, or doesn't use, the servers of ``service``."""
    if engine is service:
        return
    cluster = getattr(engine, "cluster", None)
    url = engine if isinstance(engine, str) else getattr(engine, "server_url", None)
    ours = {service.server_url, *(server.url for server in service.workers)}
    if cluster is not None:
        same = {w.url for w in cluster.workers} == {w.url for w in service.workers}
    elif isinstance(url, str):
        same = url.rstrip("/") in ours
    else:
        raise ConfigError(
            f"a {type(engine).__name__} is no SGLang engine: pass the AsyncSGLang that the scheme "
            f"pushes to, at {service.server_url}, or leave it out."
        )
    if not same:
        raise ConfigError(
            f"the engine uses {url}, but the scheme pushes to {service.server_url}: make the "
            "scheme with that engine, or with its server_url."
        )
