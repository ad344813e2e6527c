"""Offers `SGLangWeightSyncScheme`: TorchRL's weight-sync contract over a `Pusher`."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torchrl.collectors.weight_update import WeightUpdaterBase
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from ..config import PauseMode, WeightSyncConfig
from ..errors import ConfigError, NotConnectedError
from ..service.service import AsyncSGLang, find_service
from ..weights.carry.topology import count_ranks, plan_ranks
from ..weights.connection import Link
from ..weights.lora.push import AdapterPusher
from ..weights.push import FullPusher, Pusher, abandon_with
from ..weights.result import PushResult
from ..weights.source.named import taken_in
from ..weights.source.sharded import leading
from .counters import bring_up, check_label, choose_version, count_to, shares_counter
from .faces import SGLangTransport, SGLangWeightUpdater
from .sender import SGLangWeightReceiver, SGLangWeightSender, check_engine

NO_SERVERS = (
    "this weight sync has no servers yet: make it with SGLangWeightSyncScheme(service), or name "
    "them with sender.init_all_workers_group(metadata, engine=service)."
)


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
        service: the servers to push to. It may be left out where they are named later, as
            TorchRL's recipes do on joining: ``sender.init_all_workers_group(..., engine=service)``.
        server_url: instead of ``service``: URL of a running router or server. Where a service of
            this process uses it, that one is meant.
        master_address: address at which the servers reach this process; found by default.
        master_port: port of the rendezvous; a free one by default.
        num_gpus: ranks of all servers together, checked against what they say; the
            ``tp_size * dp_size`` of one server, which TorchRL's recipe passes, will do too.
        gpus_per_replica: with ``num_replicas``, the same by two factors.
        num_replicas: number of servers.
        strategy: ``"state_dict"`` or ``"tensordict"``; accepted for TorchRL's sake, both work.
        device: device that broadcasts; the current GPU for NCCL.
        config: how to push.
        flush_cache_on_update: ``WeightSyncConfig(flush_cache=)``, under TorchRL's name for it.
        pause_mode: ``WeightSyncConfig(pause_mode=)``.
        model_path: where the served model's config is, if not where the servers have it.
        api_key: key for ``server_url``.
        admin_api_key: admin key for ``server_url``.

    Attributes:
        config: how it pushes.
        collectors: those that count every push; see `SGLangWeightSender.register_collector`.
        last_push: what the last push did; None before the first.

    Raises:
        ConfigError: both ``service`` and ``server_url``, a wrong ``num_gpus``, or ``config`` beside
            an option that is a part of it.
        TopologyError: a server can't take part in a broadcast.
    """

    def __init__(
        self,
        service: AsyncSGLang | str | None = None,
        *,
        server_url: str | None = None,
        master_address: str | None = None,
        master_port: int | None = None,
        num_gpus: int | None = None,
        gpus_per_replica: int = 1,
        num_replicas: int | None = None,
        strategy: Literal["tensordict", "state_dict"] = "tensordict",
        device: torch.device | str | int | None = None,
        config: WeightSyncConfig | None = None,
        flush_cache_on_update: bool | None = None,
        pause_mode: PauseMode | None = None,
        model_path: str | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
    ) -> None:
        super().__init__(strategy=strategy)
        if isinstance(service, str):  # where TorchRL's scheme takes its server_url
            service, server_url = None, service if server_url is None else server_url
        if service is not None and server_url is not None:
            raise ConfigError("pass one of service and server_url, not both.")
        self.config = _configured(config, flush_cache_on_update, pause_mode)
        self.model_path = model_path
        self.last_push: PushResult | None = None
        self.collectors: list[Any] = []
        if num_gpus is None and num_replicas is not None:
            num_gpus = gpus_per_replica * num_replicas
        self._num_gpus = num_gpus
        self._keys: dict[str, Any] = {"api_key": api_key, "admin_api_key": admin_api_key}
        self._where: dict[str, Any] = {
            "master_address": master_address,
            "master_port": master_port,
            "device": device,
        }
        self._service: AsyncSGLang | None = None
        self._pusher: Pusher | None = None
        self._registered: nn.Module | None = None
        self._num_workers = 1
        self._left = ""  # why it does not connect by itself any more
        self._pid = os.getpid()
        self._lock = threading.RLock()
        if service is not None or server_url is not None:
            self.push_to(service or server_url)

    # Whom it pushes to

    def push_to(self, engine: Any) -> None:
        """Names the servers, where the scheme was made without.

        Args:
            engine: the `AsyncSGLang`, a URL, or anything with a ``server_url``.

        Raises:
            ConfigError: it pushes to others already, or this is no engine, or has another number of
                ranks than was said.
            TopologyError: a server can't take part in a broadcast.
        """
        if self._service is not None:
            check_engine(engine, self._service)
            return
        service = self._service_of(engine)
        infos = service.cluster.infos
        if self.config.method in ("broadcast", "tensor"):
            plan_ranks(infos)  # refuses what these can't reach
        num_ranks = count_ranks(infos)
        if self._num_gpus not in (None, num_ranks, service.get_tp_size() * service.get_dp_size()):
            raise ConfigError(f"num_gpus={self._num_gpus}, but the servers have {num_ranks} ranks.")
        link = Link(service.servers, config=self.config, model_path=self.model_path, **self._where)
        self._pusher = AdapterPusher(link) if self.config.method == "lora" else FullPusher(link)
        self._service = service
        abandon_with(self, self._pusher)

    def _service_of(self, engine: Any) -> AsyncSGLang:
        url = engine if isinstance(engine, str) else getattr(engine, "server_url", None)
        if hasattr(engine, "cluster"):
            service: AsyncSGLang = engine
            return service
        if not isinstance(url, str):
            raise ConfigError(
                f"a {type(engine).__name__} is no SGLang engine: pass an AsyncSGLang, or its URL."
            )
        return find_service(url, **self._keys) or AsyncSGLang.connect(url, **self._keys)

    def _check_named(self) -> AsyncSGLang:
        if self._service is None:
            raise NotConnectedError(NO_SERVERS)
        return self._service

    @property
    def service(self) -> AsyncSGLang:
        """The servers; raises `NotConnectedError` where none were named yet."""
        return self._check_named()

    @property
    def pusher(self) -> Pusher:
        """What pushes to them; errors as of `service`."""
        if self._pusher is None:
            raise NotConnectedError(NO_SERVERS)
        return self._pusher

    @property
    def server_url(self) -> str:
        """Where they take requests; errors as of `service`."""
        return self.service.server_url

    @property
    def num_gpus(self) -> int:
        """Ranks of all servers together; errors as of `service`."""
        return count_ranks(self.service.cluster.infos)

    @property
    def world_size(self) -> int:
        """Ranks of the collective: the trainer's one, and the servers'; errors as of `service`."""
        return 1 + self.num_gpus

    @property
    def master_address(self) -> str:
        """Address at which the servers reach this process; errors as of `service`."""
        return self._where["master_address"] or self.service.get_master_address()

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
        bring_up(collector, self.service.servers.highest_version())
        collector.weight_updater = None
        collector._weight_sync_schemes = {"policy": self}

    def __call__(self) -> WeightUpdaterBase:
        """The adapter that ``LLMCollector(weight_updater=scheme)`` asks for."""
        self.connect()
        return SGLangWeightUpdater(self)

    def create_sender(self) -> SGLangWeightSender:
        """What a training script pushes with, if no collector does it."""
        return SGLangWeightSender(self)

    def create_receiver(
        self, engine: Any = None, *, vllm_engine: Any = None
    ) -> SGLangWeightReceiver:
        """For scripts that make one: the receivers are the servers, so it has nothing to do.

        Args:
            engine: as in `SGLangWeightSender.init_all_workers_group`.
            vllm_engine: the same.
        """
        return SGLangWeightReceiver(self, engine if engine is not None else vllm_engine)

    # TorchRL's contract

    def connect(self, *, worker_idx: int | None = None, weights: Any = None) -> None:
        """Joins the trainer and all ranks of all servers; harmless twice.

        A push does this by itself where nobody has done so before, nor closed the scheme.
        Another scheme of this process that is connected to the service is closed, with a warning,
        unless it is in the middle of a push.

        Args:
            worker_idx: must be None, as in TorchRL's senders.
            weights: not used: the servers hold the checkpoint's.

        Raises:
            NotConnectedError: no servers were named, or this is a forked copy.
            AlreadyConnectedError: another scheme is in the middle of a push to the service.
            TopologyError: a server can't take part.
            PushError: a server refused, or did not come.
        """
        self._check_named()
        if not self.initialized_on_sender:
            self.init_on_sender()
        if self.synchronized_on_sender:
            return
        try:
            super().connect(worker_idx=worker_idx, weights=weights)
        except BaseException:
            self._mark_left()  # TorchRL's forgets that on Ctrl-C
            raise
        self._left = ""

    def _connect_first(self) -> None:
        self.check_process()
        if self._left and not self.synchronized_on_sender:
            raise NotConnectedError(self._left)
        self.connect()

    def _init_on_sender_impl(
        self, model_id: str | None = None, context: Any = None, **kwargs: Any
    ) -> None:
        self.model_id = model_id or "policy"
        if context is not None:
            self.context = context
        if isinstance(kwargs.get("model"), nn.Module):
            self.register_model(kwargs["model"])
        self._num_workers = kwargs.get("num_workers") or 1
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
            worker_ids: the collector's workers, all of them: the servers of one service always run
                the same weights.

        Raises:
            ConfigError: not all workers are named.
            NotConnectedError: the scheme was closed, or another one took its place.
            WeightsError: there are none; or names, shapes, dtypes or values are not as the served
                model's. Nothing was touched.
            PushError: a step failed; the service is broken until a push succeeds.
            VerificationError: the servers do not hold what was sent; broken likewise.
        """
        self.check_sendable(worker_ids)
        super().send(weights)

    def check_sendable(self, worker_ids: Any) -> None:
        """Raises where it can't push, or not to those workers alone; see `send`."""
        every = [*range(self._num_workers)]
        given = every if worker_ids is None else worker_ids
        if ([given] if isinstance(given, int) else sorted(given)) != every:
            raise ConfigError(
                f"worker_ids={worker_ids!r} is given, but all servers always run the same weights: "
                f"leave it out, or name every worker of the collector, {every}."
            )
        self._connect_first()

    def push(
        self,
        weights: Any = None,
        collector: Any = None,
        *,
        version: int | None = None,
        label: str | None = None,
        partial: bool = False,
    ) -> PushResult | None:
        """Pushes, and counts every registered collector up to the servers' new version.

        The version is one more than the highest that a server or a collector has, so it goes up
        also where a trainer starts again at 0 on servers that have seen many pushes.

        Args:
            weights: as in `send`; also pairs of name and tensor, which an iterator may make one by
                one, and which are used up before anything is paused.
            collector: one that counts this push by itself afterwards, by one.
            version: the number to push under, instead.
            label: a name for that number, such as ``"step_1000"``, which this process's
                ``service.version_labels`` keep. Servers and rows have the number alone.
            partial: ``weights`` may be a part of the model; the servers keep the rest.

        Returns:
            What the push did; None with ``WeightSyncConfig(non_blocking=True)``, where it is still
            under way: see `wait`.

        Raises:
            ConfigError: ``label`` is no name.
            VersionError: ``version`` is not higher than the servers'; nothing was touched.
            WeightSyncError: as in `send`; also of the push before, if that one did not block.
        """
        self._connect_first()
        check_label(label)
        if partial and self.config.method == "lora":
            raise ConfigError("method='lora' pushes whole adapters: leave partial=True out.")
        source = taken_in(weights if weights is not None else self._registered)
        with self._lock, leading(source):
            self.wait()  # the servers tell the version of the push before only when it is over
            others = [each for each in self.collectors if not shares_counter(each, collector)]
            number = choose_version(
                version, self.service.servers.highest_version(), [*others, collector]
            )
            reference = source if isinstance(source, nn.Module) else self._registered
            self.service.servers.versions.set_label(number, label)
            how: dict[str, Any] = {"version": number, "reference": reference}
            if partial:
                how["partial"] = True
            done = None
            if isinstance(self.pusher, FullPusher) and self.config.non_blocking:
                self.pusher.push_later(source, keeping=self, **how)
            else:
                self.last_push = done = self._labelled(self.pusher.push(source, **how))
            bring_up(collector, number - 1)
            for each in others:
                count_to(each, number)
            return done

    def wait(self) -> PushResult | None:
        """Waits for a push that did not block; what it did, None if there is none under way.

        Raises:
            WeightSyncError: what that push raised, once.
        """
        pushed = None if self._pusher is None else self._pusher.wait()
        if pushed is None:
            return None
        self.last_push = self._labelled(pushed)
        return self.last_push

    def _labelled(self, done: PushResult) -> PushResult:
        return replace(done, label=self.service.version_labels.get(done.version))

    def check_process(self) -> None:
        """Raises `NotConnectedError` in a forked copy."""
        if os.getpid() != self._pid:
            raise NotConnectedError(
                f"process {os.getpid()} has a copy of a weight sync that process {self._pid} made: "
                "the group's sockets and communicators don't survive a fork. Push from there, or "
                "make a scheme here. Nothing was touched."
            )

    def close(self) -> None:
        """Leaves the group; harmless twice, and in a forked copy."""
        if os.getpid() == self._pid and self._pusher is not None:
            self._pusher.close()
            self.service.gate.release(self)
        self._mark_left()
        self._left = "the weight sync was closed: call connect() to join the servers again."

    def _mark_left(self) -> None:
        self.synchronized_on_sender = False

    def give_way(self, other: Any) -> bool:
        """Closes the scheme for ``other``, which is to push from now on; whether it could.

        One that is in the middle of a push, or of joining, goes on.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.pusher.is_busy:
                return False
            self.close()
            self._left = (
                f"{other!r} has taken the place of this weight sync: push with that one, or call "
                "connect() on this one, which takes its place in turn."
            )
            return True
        finally:
            self._lock.release()

    shutdown = close

    def __repr__(self) -> str:
        servers = "no servers yet" if self._service is None else self.server_url
        return f"<{type(self).__name__} to {servers} at {id(self):#x}>"

    def __del__(self) -> None:
        """Nothing: TorchRL's own calls ``shutdown``, which a collector of garbage can't wait for.

        `abandon_with` does it instead, though never at the interpreter's exit: nothing that a
        finaliser needs is there any more then.
        """


def _configured(
    config: WeightSyncConfig | None, flush_cache: bool | None, pause_mode: PauseMode | None
) -> WeightSyncConfig:
    """The configuration, or that of the two options which TorchRL's scheme takes by themselves.

    Raises:
        ConfigError: both are given.
    """
    given = {"flush_cache": flush_cache, "pause_mode": pause_mode}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if config is not None and options:
        said = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(
            "flush_cache_on_update and pause_mode are parts of the config, which is given too: "
            f"write WeightSyncConfig(..., {said})."
        )
    return config or WeightSyncConfig(**options)
