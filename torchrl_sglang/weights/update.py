"""A push: from named tensors to servers that run them, or to a service that is marked broken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from ..client import ControlClient
from ..config import WeightSyncConfig
from ..errors import EngineLostError, NotConnectedError
from ..info import WorkerInfo
from .broadcast import Broadcast, sending_device
from .collective import in_thread
from .engines import Engines
from .failure import after_failure
from .planned import Plan, make_plan
from .result import PushResult, StepTimer
from .sharded import ShardedWeights
from .versions import served_version


class WeightPusher:
    """Pushes whole models into every server of a service.

    Args:
        service: the servers; anything with ``cluster``, ``gate``, ``timeouts``,
            ``pushed_version``, ``set_pushed_version`` and ``drop_worker``.
        config: how to push.
        master_address: address at which the servers reach this process.
        master_port: port of the rendezvous; a free one by default.
        device: device that broadcasts; the current GPU for NCCL.
        model_path: where the served model's config is, if not where the servers have it.

    Attributes:
        config: how to push.
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
        self.config = config or WeightSyncConfig()
        self._master_address = master_address
        self._master_port = master_port
        self._device = device
        self._model_path = model_path
        self._engines: Engines | None = None
        self._carrier: Broadcast | None = None
        self._connected = False
        self._verified = False
        self._running: Future[PushResult] | None = None
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
        self._drop()
        timeouts = self._service.timeouts
        self._engines = Engines(self._workers, self._infos, timeouts.control_s)
        self._carrier = Broadcast(
            self._engines,
            address=self._master_address or self._service.get_master_address(),
            port=self._master_port,
            device=sending_device(self._infos[0].device, self._device),
            layout=self.config.layout,
            timeouts=timeouts,
        )
        self._carrier.connect()

    def close(self) -> None:
        """Leaves the group, on both sides, once a push under way is over; harmless twice."""
        with contextlib.suppress(Exception):
            self.wait()
        with self._lock:
            carrier, engines = self._carrier, self._engines
            self._carrier = self._engines = None
            self._connected = False
        if carrier is not None:
            carrier.close()
        if engines is not None:
            engines.close()

    def abandon(self) -> None:
        """Leaves the group without waiting for anybody, servers included."""
        self._connected = False
        self._drop()

    def _drop(self) -> None:
        """After a failure the group can't be trusted: the next push makes a new one."""
        carrier, engines = self._carrier, self._engines
        self._carrier = self._engines = None
        self._verified = False
        if carrier is not None:
            carrier.drop()
        if engines is not None:
            engines.close()

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
        self.wait()
        with self._lock:
            plan = self._planned(source, version, reference)
            self._service.gate.begin()
            return self._carried_out(plan)

    def push_later(
        self,
        source: Any,
        *,
        version: int | None = None,
        reference: nn.Module | None = None,
    ) -> Future[PushResult]:
        """Copies the weights and pushes them from another thread; arguments as in `push`.

        New requests wait from now on, as in `push`. One push is under way at a time.

        Raises:
            NotConnectedError, WeightsError: as in `push`, at once.
            PushError, VerificationError: of the push before. This one's come in the future, in
                `wait` and in the next push.
        """
        self.wait()
        with self._lock:
            plan = self._planned(source, version, reference, copy=True)
            self._service.gate.begin()

        def carry_out() -> PushResult:
            with self._lock:
                return self._carried_out(plan)

        self._running = in_thread(carry_out, "torchrl_sglang-push")
        return self._running

    def wait(self) -> PushResult | None:
        """Waits for the push of `push_later`; raises what it raised, once."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def _planned(
        self, source: Any, version: int | None, reference: nn.Module | None, *, copy: bool = False
    ) -> Plan:
        if not self._connected:
            raise NotConnectedError(
                "the weight sync is not connected: call scheme.connect() (a collector does it "
                "when the scheme is given to it) before pushing."
            )
        return make_plan(
            source,
            model_path=self._model_path or self._service.model_path,
            infos=self._infos,
            config=self.config,
            reference=reference,
            version=self._next_version() if version is None else version,
            verifies=self._verifies,
            copy=copy,
        )

    @property
    def _verifies(self) -> bool:
        verify = self.config.verify
        return verify == "always" or (verify == "first" and not self._verified)

    def _carried_out(self, plan: Plan) -> PushResult:
        lost: list[str] = []
        while True:
            try:
                result = self._attempt(plan, tuple(lost))
            except BaseException as raised:
                self._drop()
                if isinstance(plan.weights, ShardedWeights):
                    plan.weights.drain()
                error = after_failure(raised, self._workers)
                if isinstance(error, EngineLostError) and self._goes_on_without(error):
                    lost.append(str(error.engine))
                    self._service.drop_worker(error.engine)
                    plan.verifier.leave_out(lost)
                    continue
                self._service.gate.fail(error)
                if error is raised:
                    raise
                raise error from raised
            self._service.set_pushed_version(plan.version)
            self._service.gate.commit()
            return result

    def _attempt(self, plan: Plan, lost: tuple[str, ...]) -> PushResult:
        timer, start = StepTimer(), time.perf_counter()
        if self._carrier is None or not self._carrier.is_connected:
            with timer.measure("join"):
                self._connect()
        carrier, engines = self._carrier, self._engines
        assert carrier is not None and engines is not None
        paused_at = time.perf_counter()
        with timer.measure("pause"):
            engines.post("pause", "/pause_generation", {"mode": self.config.pause_mode})
        with timer.measure("flush"):
            flushed = self.config.flushes and engines.flush()
        with timer.measure("begin"):
            engines.begin()
        sent_at = time.perf_counter()
        layout = carrier.transfer(plan.buckets, plan.weights, plan.dtype, timer)
        push_s = time.perf_counter() - sent_at
        with timer.measure("end"):
            engines.end()
        verifies = self._verifies
        with timer.measure("verify"):
            if verifies:
                plan.verifier.by_checksum(engines)
        with timer.measure("version"):
            engines.set_version(plan.version)
        with timer.measure("continue"):
            engines.post("continue", "/continue_generation")
        paused_s = time.perf_counter() - paused_at
        with timer.measure("verify"):
            # A paused server can't score, so the probe comes after; our own requests still wait.
            if verifies:
                plan.verifier.by_probe(engines, f"probe-{plan.version}")
        self._verified = self._verified or verifies
        return PushResult(
            version=plan.version,
            method=carrier.method,
            reason="the only method",
            layout=layout,
            num_bytes=sum(bucket.num_bytes for bucket in plan.buckets),
            num_buckets=len(plan.buckets),
            verified_by=plan.verifier.verified_by if verifies else "nothing",
            flushed=flushed,
            lost_engines=lost,
            step_s=timer.step_s,
            push_s=push_s,
            paused_s=paused_s,
            total_s=time.perf_counter() - start,
        )

    def _goes_on_without(self, error: EngineLostError) -> bool:
        known = any(worker.url == error.engine for worker in self._workers)
        return self.config.lost_engines == "drop" and known and len(self._workers) > 1

    # What is pushed to

    @property
    def _workers(self) -> Sequence[ControlClient]:
        workers: Sequence[ControlClient] = self._service.cluster.workers
        return workers

    @property
    def _infos(self) -> Sequence[WorkerInfo]:
        infos: Sequence[WorkerInfo] = self._service.cluster.infos
        return infos

    def _next_version(self) -> int:
        return served_version(self._service) + 1
