"""`SGLangWeightSyncScheme`: TorchRL's weight-sync contract over a `WeightPusher`."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Literal

import torch
from torch import nn
from torchrl.collectors.weight_update import WeightUpdaterBase
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from ..config import WeightSyncConfig
from ..errors import ConfigError, NotConnectedError
from ..live import find_service
from ..service import AsyncSGLang
from .adapter import AdapterPusher
from .plan import count_ranks, plan_ranks
from .result import PushResult
from .sender import SGLangWeightReceiver, SGLangWeightSender
from .sharded import leading
from .transport import SGLangTransport
from .update import WeightPusher
from .updater import SGLangWeightUpdater
from .versions import bring_up, choose_version, count_to, served_version, shares_counter


class SGLangWeightSyncScheme(WeightSyncScheme):
    """Broadcasts the trainer's weights into every server, and proves that they arrived.

    Give it to a collector in whichever way fits; each makes
    ``collector.update_policy_weights_(model)`` reach the servers::

        LLMCollector(env, policy=policy, weight_updater=scheme)
        Collector(env, policy, weight_sync_schemes={"policy": scheme})
        scheme.attach(collector)

    A training script that pushes by itself, as TorchRL's GRPO recipe does, makes a sender:
    `create_sender`.

    A push pauses the servers, broadcasts (gloo on CPU, NCCL on GPU), verifies, sets the version and
    continues. If a step fails, the servers stay paused, ``service.state`` is ``BROKEN`` and
    ``generate`` raises until a push succeeds.

    With ``WeightSyncConfig(method="lora")`` a push sends a LoRA adapter alone and pauses nothing.

    Args:
        service: the servers to push to.
        server_url: instead of ``service``: URL of a running router or server. Where a service of
            this process uses it, that one is meant.
        master_address: address at which the servers reach this process; found by default.
        master_port: port of the rendezvous; a free one by default.
        num_gpus: ranks of all servers together, checked against what they say; the
            ``tp_size * dp_size`` of one server, which TorchRL's recipe passes, will do too.
        strategy: ``"state_dict"`` or ``"tensordict"``; accepted for TorchRL's sake, both work.
        device: device that broadcasts; the current GPU for NCCL.
        config: how to push.
        model_path: where the served model's config is, if not where the servers have it.
        api_key: key for ``server_url``.
        admin_api_key: admin key for ``server_url``.

    Attributes:
        service: the servers.
        server_url: where they take requests.
        num_gpus: ranks of all servers together.
        collectors: those that count every push; see `SGLangWeightSender.register_collector`.
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
            service = find_service(
                server_url, api_key=api_key, admin_api_key=admin_api_key
            ) or AsyncSGLang.connect(server_url, api_key=api_key, admin_api_key=admin_api_key)
        assert service is not None
        method = "auto" if config is None else config.method
        if method in ("broadcast", "tensor"):
            plan_ranks(service.cluster.infos)  # refuses what these can't reach
        num_ranks = count_ranks(service.cluster.infos)
        of_one = service.get_tp_size() * service.get_dp_size()
        if num_gpus not in (None, num_ranks, of_one):
            raise ConfigError(f"num_gpus={num_gpus}, but the servers have {num_ranks} ranks.")
        self.service = service
        self.server_url = service.server_url
        self.num_gpus = num_ranks
        self.model_path = model_path
        self.pusher = (AdapterPusher if method == "lora" else WeightPusher)(
            service,
            config=config,
            master_address=master_address,
            master_port=master_port,
            device=device,
            model_path=model_path,
        )
        self.last_push: PushResult | None = None
        self.collectors: list[Any] = []
        self._registered: nn.Module | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()

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
        self.connect_once()
        bring_up(collector, served_version(self.service))
        collector.weight_updater = None
        collector._weight_sync_schemes = {"policy": self}

    def __call__(self) -> WeightUpdaterBase:
        """The adapter that ``LLMCollector(weight_updater=scheme)`` asks for."""
        self.connect_once()
        return SGLangWeightUpdater(self)

    def create_sender(self) -> SGLangWeightSender:
        """What a training script pushes with, if no collector does it."""
        return SGLangWeightSender(self)

    def create_receiver(self, engine: Any = None) -> SGLangWeightReceiver:
        """For scripts that make one: the receivers are the servers, so it has nothing to do."""
        return SGLangWeightReceiver(self, engine)

    # TorchRL's contract

    def connect_once(self) -> None:
        """Connects as a sender if that was not done yet; errors as in `connect`."""
        if not self.initialized_on_sender:
            self.init_on_sender()
        if not self.synchronized_on_sender:
            self.connect()

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

    def push(
        self,
        weights: Any = None,
        collector: Any = None,
        *,
        version: int | None = None,
        partial: bool = False,
    ) -> PushResult | None:
        """Pushes, and counts every registered collector up to the servers' new version.

        The version is one more than the highest that a server or a collector has, so it goes up
        also where a trainer starts again at 0 on servers that have seen many pushes.

        Args:
            weights: as in `send`.
            collector: one that counts this push by itself afterwards, by one.
            version: the number to push under, instead.
            partial: ``weights`` may be a part of the model; the servers keep the rest.

        Returns:
            What the push did; None with ``WeightSyncConfig(non_blocking=True)``, where it is still
            under way: see `wait`.

        Raises:
            VersionError: ``version`` is not higher than the servers'; nothing was touched.
            WeightSyncError: as in `send`; also of the push before, if that one did not block.
        """
        self._check_process()
        source = weights if weights is not None else self._registered
        with self._lock, leading(source):
            self.wait()  # the servers tell the version of the push before only when it is over
            others = [each for each in self.collectors if not shares_counter(each, collector)]
            number = choose_version(version, served_version(self.service), [*others, collector])
            reference = source if isinstance(source, nn.Module) else self._registered
            how: dict[str, Any] = {"version": number, "reference": reference, "partial": partial}
            if self.pusher.config.non_blocking:
                self.pusher.push_later(source, keeping=self, **how)
                done = None
            else:
                self.last_push = done = self.pusher.push(source, **how)
            bring_up(collector, number - 1)
            for each in others:
                count_to(each, number)
            return done

    def wait(self) -> PushResult | None:
        """Waits for a push that did not block; what it did, None if there is none under way.

        Raises:
            WeightSyncError: what that push raised, once.
        """
        done = self.pusher.wait()
        if done is not None:
            self.last_push = done
        return done

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise NotConnectedError(
                f"process {os.getpid()} has a copy of a weight sync that process {self._pid} made: "
                "the group's sockets and communicators don't survive a fork. Push from there, or "
                "make a scheme here. Nothing was touched."
            )

    def close(self) -> None:
        """Leaves the group; harmless twice, and in a forked copy."""
        if os.getpid() == self._pid:
            self.pusher.close()
            self.service.gate.release(self)
        self.synchronized_on_sender = False

    shutdown = close

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self.server_url} at {id(self):#x}>"

    def __del__(self) -> None:
        """Lets go of the group without a word to the servers: a collector of garbage can't wait.

        TorchRL's own calls ``shutdown``, which at the interpreter's exit would start threads that
        never run.
        """
        pusher = getattr(self, "pusher", None)
        if pusher is not None and os.getpid() == self._pid and not sys.is_finalizing():
            pusher.abandon()
