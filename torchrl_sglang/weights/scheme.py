"""`SGLangWeightSyncScheme`: TorchRL's weight-sync contract over a `WeightPusher`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torchrl.collectors.weight_update import WeightUpdaterBase
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from ..config import WeightSyncConfig
from ..errors import ConfigError, NotConnectedError
from ..service import AsyncSGLang
from .plan import plan_ranks
from .result import PushResult
from .update import WeightPusher


class SGLangWeightSyncScheme(WeightSyncScheme):
    """Broadcasts the trainer's weights into every server, and proves that they arrived.

    Give it to a collector in whichever way fits; each makes
    ``collector.update_policy_weights_(model)`` reach the servers::

        LLMCollector(env, policy=policy, weight_updater=scheme)
        Collector(env, policy, weight_sync_schemes={"policy": scheme})
        scheme.attach(collector)

    A push pauses the servers, broadcasts (gloo on CPU, NCCL on GPU), verifies, sets the version and
    continues. If a step fails, the servers stay paused, ``service.state`` is ``BROKEN`` and
    ``generate`` raises until a push succeeds.

    Args:
        service: the servers to push to.
        server_url: instead of ``service``: URL of a running router or server.
        master_address: address at which the servers reach this process; found by default.
        master_port: port of the rendezvous; a free one by default.
        num_gpus: ranks of all servers together, checked against what they say.
        strategy: ``"state_dict"`` or ``"tensordict"``; accepted for TorchRL's sake, both work.
        device: device that broadcasts; the current GPU for NCCL.
        config: how to push.
        model_path: where the served model's config is, if not where the servers have it.
        api_key: key for ``server_url``.
        admin_api_key: admin key for ``server_url``.

    Attributes:
        last_push: what the last push did; None before the first.

    Raises:
        ConfigError: both or neither of ``service`` and ``server_url``, or a wrong ``num_gpus``.
        TopologyError: a server can't take part in a broadcast.
    """

    def __init__(
        self,
        service: AsyncSGLang | None = None,
        *,
        server_url: str | None = None,
        master_address: str | None = None,
        master_port: int | None = None,
        num_gpus: int | None = None,
        strategy: Literal["tensordict", "state_dict"] = "tensordict",
        device: torch.device | str | int | None = None,
        config: WeightSyncConfig | None = None,
        model_path: str | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
    ) -> None:
        super().__init__(strategy=strategy)
        if (service is None) == (server_url is None):
            raise ConfigError("pass exactly one of service and server_url.")
        if server_url is not None:
            service = AsyncSGLang.connect(server_url, api_key=api_key, admin_api_key=admin_api_key)
        assert service is not None
        num_ranks = plan_ranks(service.cluster.infos).world_size - 1
        if num_gpus is not None and num_gpus != num_ranks:
            raise ConfigError(f"num_gpus={num_gpus}, but the servers have {num_ranks} ranks.")
        self.service = service
        self.pusher = WeightPusher(
            service,
            config=config,
            master_address=master_address,
            master_port=master_port,
            device=device,
            model_path=model_path,
        )
        self.last_push: PushResult | None = None
        self._registered: nn.Module | None = None

    # Who has the weights

    def register_model(self, model: nn.Module) -> None:
        """Names the model that a push without weights takes them from."""
        self._registered = model

    def attach(self, collector: Any) -> None:
        """Makes ``collector.update_policy_weights_`` push to the servers.

        Args:
            collector: any TorchRL collector of one process.
        """
        self.init_on_sender(model_id="policy", context=collector)
        self.connect()
        collector.weight_updater = None
        collector._weight_sync_schemes = {"policy": self}

    def __call__(self) -> WeightUpdaterBase:
        """The adapter that ``LLMCollector(weight_updater=scheme)`` asks for."""
        if not self.initialized_on_sender:
            self.init_on_sender()
        if not self.synchronized_on_sender:
            self.connect()
        return SGLangWeightUpdater(self)

    # TorchRL's contract

    def _init_on_sender_impl(
        self, model_id: str | None = None, context: Any = None, **kwargs: Any
    ) -> None:
        self.model_id = model_id or "policy"
        if context is not None:
            self.context = context
        if isinstance(kwargs.get("model"), nn.Module):
            self.register_model(kwargs["model"])
        self._register_worker_sender(worker_idx=0)

    def create_transport(self, **kwargs: Any) -> SGLangTransport:
        """The one transport: all servers are one group."""
        return SGLangTransport(self)

    def prepare_weights(
        self, weights: Any, model_id: str, strategy: Any, context: Any = None
    ) -> Any:
        """The weights to send: those given, else the registered model's.

        The policy in the collector is a client of the servers and has none of its own.
        """
        return weights if weights is not None else self._registered

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Pushes weights and returns once every server runs them.

        Args:
            weights: module, TensorDict, state dict, TransformersWrapper, or None for the
                registered model.
            worker_ids: must be None: servers of one service always run the same weights.

        Raises:
            NotConnectedError: before ``connect``, or without weights.
            WeightsError: names, shapes or dtypes are not the served model's; nothing was touched.
            PushError: a step failed; the service is broken until a push succeeds.
            VerificationError: the servers do not hold what was sent; broken likewise.
        """
        self._check_sendable(worker_ids)
        super().send(weights)

    def _check_sendable(self, worker_ids: Any) -> None:
        if worker_ids is not None:
            raise ConfigError(
                "worker_ids is given, but all servers always run the same weights: leave it out."
            )
        if not (self.initialized_on_sender and self.synchronized_on_sender):
            raise NotConnectedError(
                "the weight sync is not connected: give the scheme to a collector, call "
                "scheme.attach(collector), or init_on_sender() and connect()."
            )

    def push(self, weights: Any, collector: Any = None) -> PushResult:
        """Pushes under the number that ``collector`` will count to next, if it counts."""
        model = weights if isinstance(weights, nn.Module) else self._registered
        self.last_push = self.pusher.push(
            weights if weights is not None else self._registered,
            version=next_version(collector),
            reference=model,
        )
        return self.last_push

    def close(self) -> None:
        """Leaves the group; harmless twice."""
        self.pusher.close()
        self.synchronized_on_sender = False

    shutdown = close

    def __del__(self) -> None:
        """Lets go of the group without a word to the servers: a collector of garbage can't wait.

        TorchRL's own calls ``shutdown``, which at the interpreter's exit would start threads that
        never run.
        """
        pusher = getattr(self, "pusher", None)
        if pusher is not None and not sys.is_finalizing():
            pusher.abandon()


class SGLangTransport:
    """What TorchRL calls to connect and to send."""

    def __init__(self, scheme: SGLangWeightSyncScheme) -> None:
        self._scheme = scheme

    def setup_connection_and_weights_on_sender(self) -> None:
        """Joins the servers' group; they already hold the checkpoint's weights."""
        self._scheme.pusher.connect()

    def send_weights(self, weights: Any) -> None:
        """Pushes."""
        self._scheme.push(weights, self._scheme.context)

    def setup_connection_and_weights_on_receiver(self, **kwargs: Any) -> Any:
        """Not for this process: the receivers are SGLang's own."""
        raise NotConnectedError(
            "the receivers of an SGLang weight sync are the servers themselves."
        )

    receive_weights = setup_connection_and_weights_on_receiver


def next_version(collector: Any) -> int | None:
    """The number that a collector will count to after this push; None if it does not count."""
    current = getattr(collector, "policy_version", None)
    return current + 1 if isinstance(current, int) else None


def _without_deprecation(make: Callable[[], type]) -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def _make_updater() -> type:
    class SGLangWeightUpdater(WeightUpdaterBase):
        """TorchRL's older face of the scheme, the only one that ``LLMCollector`` takes."""

        def __init__(self, scheme: SGLangWeightSyncScheme) -> None:
            self.scheme = scheme

        def _push_weights(self, *, policy_or_weights: Any = None, worker_ids: Any = None) -> None:
            self.scheme._check_sendable(worker_ids)
            self.scheme.push(policy_or_weights, self.collector)

        def _sync_weights_with_worker(
            self, *, worker_id: Any = None, server_weights: Any = None
        ) -> None:
            raise NotImplementedError("all servers are updated together, by push_weights.")

    return SGLangWeightUpdater


SGLangWeightUpdater = _without_deprecation(_make_updater)
