"""A push of a LoRA adapter alone: loaded beside the one before, and taken into use at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import (
    ConfigError,
    EngineLostError,
    NotConnectedError,
    TopologyError,
    UnsupportedOptionError,
    VerificationError,
    WeightsError,
)
from ...servers.info import WorkerInfo
from ...servers.lora import SERVE_WITH
from ...servers.lora_versions import versioned
from ...servers.members import Servers
from ...servers.together import Engines
from ..push import WeightPusher
from ..repair import with_its_cause
from ..result import PushResult, StepTimer
from ..source.expected import Dtypes, expected_model, served_dtype
from ..verify.score import probe_ids, reference_log_probs
from ..verify.verifier import compare_probe
from .load import Load, prepared
from .room import Room
from .source import AdapterSource, read_adapter

MIN_ADAPTERS = 2  # the version in use, and the next

Probe = tuple[list[int], list[float]]


class AdapterPusher(WeightPusher):
    """Pushes a LoRA adapter into every server of a service; the base model's weights stay.

    Nothing is paused. Each push loads ``name@version`` beside the version before, and once every
    server has it, requests that name the adapter run under it. Requests under way go on with the
    version that they began with, which stays loaded for them.

    If a push fails, the new version is unloaded again, and the one before stays in use.

    Args, attributes: as in `WeightPusher`.
    """

    def __init__(self, servers: Servers, **kwargs: Any) -> None:
        super().__init__(servers, **kwargs)
        self._room: Room | None = None

    def connect(self) -> None:
        """Checks that the servers can take part; there is no group to join.

        Raises:
            UnsupportedOptionError: a server runs without LoRA, or holds one adapter at a time.
            TopologyError: a server has data-parallel ranks.
            PushError: a server refuses the key, or did not answer.
        """
        with self._lock:
            check_servers(self._infos)
            self._ready_engines().check_allowed("load_adapter")
            self._connected = True

    def push(
        self,
        source: Any,
        *,
        version: int | None = None,
        reference: nn.Module | None = None,
        partial: bool = False,
    ) -> PushResult:
        """Pushes an adapter and returns once new requests run under it.

        Args:
            source: PEFT model, also in a wrapper; path of a PEFT folder; or LoRA tensors by name.
            version: the adapter's new version; one more than the last by default.
            reference: PEFT model that the tensors belong to, if ``source`` is a mapping.
            partial: must be False: an adapter is one piece.

        Raises:
            ConfigError: ``partial``.
            NotConnectedError: before `connect`.
            WeightsError, ConfigError: it is no adapter, or one that SGLang can't serve; nothing was
                touched.
            ServiceBrokenError: the last push of base weights failed.
            PushError: a step failed; the version before is in use.
            VerificationError: a server computes something else than the model; likewise. Or what
                is pushed can't be verified in the way that is asked for; nothing was touched.
        """
        if partial:
            raise ConfigError("method='lora' pushes whole adapters: leave partial=True out.")
        with self._lock:
            if not self._connected:
                raise NotConnectedError(
                    "the weight sync is not connected: call connect() before pushing."
                )
            self._servers.gate.wait_until_open(self._servers.timeouts.control_s)
            check_servers(self._infos)
            urls = [worker.url for worker in self._workers]
            adapter = read_adapter(
                source, reference, server_urls=urls, finite=self.config.check_finite
            )
            return self._until_done(adapter, self._next_version() if version is None else version)

    def push_later(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: a push of an adapter holds nothing back."""
        raise ConfigError("method='lora' pauses nothing: push() is all there is.")

    def _until_done(self, adapter: AdapterSource, version: int) -> PushResult:
        timer, start = StepTimer(), time.perf_counter()
        dtype = self._dtype(adapter)
        with timer.measure("verify"):
            probe = self._probe(adapter, dtype)
        lost: list[str] = []
        while True:
            try:
                name = versioned(self.config.adapter_name, version)
                with prepared(adapter, name, self._infos, dtype) as load:
                    push_s = self._carry(load, version, probe, timer)
            except BaseException as raised:
                self._drop()
                error = with_its_cause(raised, self._workers)
                if isinstance(error, EngineLostError) and self._goes_on_without(error):
                    lost.append(str(error.engine))
                    self._servers.drop(str(error.engine))
                    continue
                if error is raised:
                    raise
                raise error from raised
            self._verified = self._verified or probe is not None
            return PushResult(
                version=version,
                method="lora",
                reason="asked for",
                layout="tensors",
                num_bytes=load.num_bytes,
                num_buckets=1,
                verified_by="nothing" if probe is None else "probe",
                flushed=False,
                lost_engines=tuple(lost),
                step_s=timer.step_s,
                push_s=push_s,
                paused_s=0.0,
                total_s=time.perf_counter() - start,
            )

    def _carry(self, load: Load, version: int, probe: Probe | None, timer: StepTimer) -> float:
        """Loads, verifies and switches; the seconds that loading took."""
        engines, room = self._ready_engines(), self._ready_room()
        timeout_s = self._servers.timeouts.transfer_s
        with timer.measure("room"):
            room.make(engines, version)
        try:
            sent_at = time.perf_counter()
            with timer.measure("load"):
                engines.do("load", lambda worker: load.post(worker, timeout_s), timeout_s)
            push_s = time.perf_counter() - sent_at
            with timer.measure("verify"):
                if probe is not None:
                    self._compare(engines, version, probe)
            with timer.measure("version"):
                engines.set_version(version)
        except BaseException as error:
            error.add_note(room.take_back(engines, version))
            raise
        self._servers.versions.set_pushed(version, adapter=True)
        self._servers.rejoin()
        room.switch(version)
        room.clear(engines, version)
        return push_s

    def _compare(self, engines: Engines, version: int, probe: Probe) -> None:
        compare_probe(
            engines,
            *probe,
            f"probe-{version}",
            self.config.probe_tolerance,
            lora=versioned(self.config.adapter_name, version),
            # Nothing is paused: it waits its turn among the requests that the server has.
            timeout_s=self._servers.timeouts.transfer_s,
        )

    def _ready_engines(self) -> Engines:
        workers = tuple(self._workers)
        if self._engines is None or self._engines.workers != workers:
            self._drop_engines()
            self._engines = Engines(workers, self._infos, self._servers.timeouts.control_s)
        return self._engines

    def _drop_engines(self) -> None:
        engines, self._engines = self._engines, None
        if engines is not None:
            engines.close()

    def _ready_room(self) -> Room:
        if self._room is None:
            self._room = Room(self.config.adapter_name, self._servers.lora.versions)
        return self._room

    def _dtype(self, adapter: AdapterSource) -> torch.dtype | None:
        """The dtype that the servers compute in, or the adapter's own where that isn't known."""
        if not adapter.tensors:
            return None
        path = self._model_path or self._servers.model_path
        try:
            return served_dtype(self._infos[0], expected_model(path))
        except WeightsError:
            return next(iter(adapter.tensors.values())).dtype

    def _probe(self, adapter: AdapterSource, dtype: torch.dtype | None) -> Probe | None:
        """A prompt, and what the trainer's model makes of it; None where it is not to be asked."""
        if not self._verifies:
            return None
        if adapter.model is None or dtype is None:
            if self.config.verify_method == "probe":
                raise VerificationError(
                    "an adapter in a folder can't be verified by a probe, which compares with the "
                    "trainer's model: push the PEFT model itself, or use verify_method='auto'."
                )
            return None
        embeddings: Any = adapter.model.get_input_embeddings()  # type: ignore[operator]
        ids = probe_ids(embeddings.weight.shape[0])
        return ids, reference_log_probs(
            adapter.model, adapter.parameters, Dtypes(served=dtype), ids
        )


def check_servers(infos: Sequence[WorkerInfo]) -> None:
    """Raises where a server can't take part in pushes of adapters, as `AdapterPusher.connect`."""
    for info in infos:
        if not info.features.lora:
            raise UnsupportedOptionError(f"{info.url} runs without LoRA: {SERVE_WITH}.")
        if info.dp_size > 1:
            raise TopologyError(
                f"{info.url} runs with dp_size={info.dp_size}, with which SGLang can't load "
                "adapters: use num_replicas instead."
            )
        limit = info.features.max_adapters
        if limit is not None and limit < MIN_ADAPTERS:
            raise UnsupportedOptionError(
                f"{info.url} runs with max_loaded_loras={limit}: it would unload the adapter in "
                f"use to load the next. Start it with {MIN_ADAPTERS} or more, or without a limit."
            )
