"""A push: from named tensors to servers that run them, or to a service that is marked broken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from ..client import ControlClient
from ..config import WeightSyncConfig
from ..errors import (
    NotConnectedError,
    PushError,
    RequestRefusedError,
)
from ..info import WorkerInfo
from .collective import TrainerGroup, in_thread
from .each import flush_caches, on_each
from .expected import expected_model
from .flatten import flattened, served_dtype, spec_of
from .join import join_group
from .plan import Bucket, plan_buckets
from .result import PushResult, StepTimer
from .source import matched, named_weights
from .verify import Verifier
from .watch import watch


class WeightPusher:
    """Pushes whole models into every server of a service.

    Args:
        service: the servers; anything with ``cluster``, ``gate``, ``timeouts`` and
            ``set_pushed_version``.
        config: how to push.
        master_address: address at which the servers reach this process.
        master_port: port of the rendezvous; a free one by default.
        device: device that broadcasts; the current GPU for NCCL.
        model_path: where the served model's config is, if not where the servers have it.
    """

    def __init__(
        self,
        service: Any,
        *,
        config: WeightSyncConfig | None = None,
        master_address: str | None = None,
        master_port: int | None = None,
        device: torch.device | str | int | None = None,
        model_path: str | None = None,
    ) -> None:
        self._service = service
        self._config = config or WeightSyncConfig()
        self._master_address = master_address
        self._master_port = master_port
        self._device = device
        self._model_path = model_path
        self._group: TrainerGroup | None = None
        self._connected = False
        self._lock = threading.Lock()

    # Connecting

    def connect(self) -> None:
        """Joins the trainer and all ranks of all servers into one group.

        Raises:
            TopologyError: a server can't take part.
            PushError: a server refused or did not come.
        """
        with self._lock:
            self._connect()
            self._connected = True

    def _connect(self) -> None:
        self._group = join_group(
            self._workers,
            self._infos,
            address=self._master_address or self._service.get_master_address(),
            port=self._master_port,
            timeout_s=self._service.timeouts.group_s,
        )

    def close(self) -> None:
        """Leaves the group, on both sides; harmless twice."""
        with self._lock:
            group, self._group = self._group, None
            self._connected = False
        if group is None:
            return
        body = {"group_name": group.name}
        # NCCL ends a communicator only when all ranks do, so no side may wait for another.
        ends: dict[Future[Any], str | None] = {
            in_thread(
                lambda w=w: w.post("/destroy_weights_update_group", body), "torchrl_sglang-leave"
            ): w.url
            for w in self._workers
        }
        ends[in_thread(lambda: group.close(broken=False), "torchrl_sglang-leave")] = None
        with contextlib.suppress(PushError):  # a server that is gone has left already
            watch(ends, step="close", timeout_s=self._service.timeouts.control_s)

    def abandon(self) -> None:
        """Leaves the group without waiting for anybody, servers included."""
        self._connected = False
        self._drop_group()

    def _drop_group(self) -> None:
        """After a failure the group can't be trusted: the next push makes a new one."""
        group, self._group = self._group, None
        if group is not None:
            group.close(broken=True)

    # Pushing

    def push(
        self,
        source: Any,
        *,
        version: int | None = None,
        reference: nn.Module | None = None,
    ) -> PushResult:
        """Pushes a whole model and returns once every server runs it.

        Args:
            source: module, wrapper, TensorDict or state dict.
            version: the weights' new version; one more than the last by default.
            reference: model to compute the probe's reference with, if ``source`` is none.

        Raises:
            NotConnectedError: before `connect`, or without weights.
            WeightsError: names, shapes or dtypes are not the served model's; nothing was touched.
            PushError: a step failed; the service is broken until a push succeeds.
            VerificationError: the servers do not hold what was sent; broken likewise.
        """
        with self._lock:
            if not self._connected:
                raise NotConnectedError(
                    "the weight sync is not connected: call scheme.connect() (a collector does it "
                    "when the scheme is given to it) before pushing."
                )
            expected = expected_model(self._model_path or self._service.model_path)
            weights = matched(named_weights(source), expected)
            dtype = served_dtype(self._infos[0], expected)
            model = source if isinstance(source, nn.Module) else reference
            verifier = Verifier(self._config, self._infos, weights, dtype, model)
            if version is None:
                version = self._next_version()
            if self._group is None:
                self._connect()
            self._service.gate.begin()
            try:
                result = self._push(weights, dtype, version, verifier)
                self._service.set_pushed_version(version)
            except BaseException as error:
                self._drop_group()
                self._service.gate.fail(error)
                raise
            self._service.gate.commit()
            return result

    def _push(
        self,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        version: int,
        verifier: Verifier,
    ) -> PushResult:
        buckets = plan_buckets(
            (spec_of(name, tensor, dtype) for name, tensor in weights.items()),
            self._config.bucket_bytes,
        )
        timer, start = StepTimer(), time.perf_counter()
        with timer.measure("pause"):
            self._on_all("pause", "/pause_generation", {"mode": self._config.pause_mode})
            flushed = self._config.flush_cache and flush_caches(
                self._workers, self._infos, self._service.timeouts.control_s
            )
        with timer.measure("begin"):
            self._begin_session()
        with timer.measure("transfer"):
            for index, bucket in enumerate(buckets):
                self._transfer(bucket, index, weights, dtype)
        with timer.measure("end"):
            if self._has_session:
                self._on_all("end", "/end_weight_update")
        with timer.measure("verify"):
            verifier.by_checksum(self._workers, self._service.timeouts.control_s)
        with timer.measure("version"):
            body = {"new_version": str(version), "abort_all_requests": False}
            self._on_all("version", "/update_weight_version", body)
        with timer.measure("continue"):
            self._on_all("continue", "/continue_generation")
        with timer.measure("verify"):
            # A paused server can't score, so the probe comes after; our own requests still wait.
            verifier.by_probe(self._workers, self._service.timeouts.control_s, f"probe-{version}")
        return PushResult(
            version=version,
            num_bytes=sum(bucket.num_bytes for bucket in buckets),
            num_buckets=len(buckets),
            verified_by=verifier.verified_by,
            flushed=flushed,
            step_s=timer.step_s,
            total_s=time.perf_counter() - start,
        )

    def _begin_session(self) -> None:
        if not self._has_session:
            return

        def begin(worker: ControlClient) -> None:
            try:
                worker.post("/begin_weight_update")
            except RequestRefusedError:
                # A trainer that died left its session open.
                worker.post("/end_weight_update")
                worker.post("/begin_weight_update")

        self._each("begin", begin, self._service.timeouts.control_s * 3)

    def _transfer(
        self,
        bucket: Bucket,
        index: int,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Announces one bucket to every server and broadcasts it; the first failure ends both."""
        group = self._group
        if group is None:
            raise PushError("the group is gone", step="announce", bucket=index)
        payload = flattened(bucket, weights, dtype, self._broadcast_device)
        body = bucket.announcement(group.name)
        timeout_s = self._service.timeouts.transfer_s
        watched: dict[Future[Any], str | None] = {
            in_thread(
                lambda w=w: w.post("/update_weights_from_distributed", body, timeout_s=timeout_s),
                "torchrl_sglang-announce",
            ): w.url
            for w in self._workers
        }
        watched[group.broadcast(payload)] = None
        watch(watched, step="transfer", timeout_s=timeout_s, bucket=index)

    def _on_all(self, step: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Posts to every server at once."""
        self._each(step, lambda worker: worker.post(path, body), self._service.timeouts.control_s)

    def _each(self, step: str, call: Callable[[ControlClient], Any], timeout_s: float) -> None:
        on_each(self._workers, step, call, timeout_s)

    # What is pushed to

    @property
    def _workers(self) -> Sequence[ControlClient]:
        workers: Sequence[ControlClient] = self._service.cluster.workers
        return workers

    @property
    def _infos(self) -> Sequence[WorkerInfo]:
        infos: Sequence[WorkerInfo] = self._service.cluster.infos
        return infos

    @property
    def _has_session(self) -> bool:
        return all(info.capabilities.update_session for info in self._infos)

    @property
    def _broadcast_device(self) -> torch.device:
        if self._infos[0].device == "cpu":
            return torch.device("cpu")
        if self._device is not None:
            given = self._device
            return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
        return torch.device("cuda", torch.cuda.current_device())

    def _next_version(self) -> int:
        known = self._service.weight_version
        return int(known) + 1 if known.isdecimal() else 1
