"""Pushes a LoRA adapter alone: it is loaded beside the one before, and taken into use at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...config import WeightSyncConfig
from ...errors import (
    EngineLostError,
    TopologyError,
    UnsupportedOptionError,
    VerificationError,
    WeightsError,
)
from ...servers.info import WorkerInfo
from ...servers.lora import SERVE_WITH
from ...servers.lora_versions import versioned
from ...servers.members import Servers
from ...servers.restart import rejoin
from ..after_failure import with_its_cause
from ..connection import Link
from ..result import PushResult, StepTimer
from ..source.expected import Dtypes, expected_model, served_dtype
from ..targets import Targets
from ..verify.score import probe_ids, reference_log_probs
from ..verify.verifier import compare_probe
from .load import Load, prepared
from .loaded import LoadedVersions
from .source import AdapterSource, read_adapter

MIN_ADAPTERS = 2  # the version in use, and the next

Probe = tuple[list[int], list[float]]


class AdapterPusher:
    """Pushes a LoRA adapter into every server of a service; the base model's weights stay.

    Nothing is paused. Each push loads ``name@version`` beside the version before, and once every
    server has it, requests that name the adapter run under it. Requests under way go on with the
    version that they began with, which stays loaded for them.

    If a push fails, the new version is unloaded again, and the one before stays in use.

    Args:
        link: to the servers; there is no group to join.

    Attributes:
        link: as given.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._lock = threading.Lock()
        self._loaded: LoadedVersions | None = None

    @property
    def config(self) -> WeightSyncConfig:
        """How it pushes."""
        return self.link.config

    @property
    def _servers(self) -> Servers:
        return self.link.servers

    @property
    def is_busy(self) -> bool:
        """Whether it is in the middle of a push."""
        return self._lock.locked()

    def connect(self) -> None:
        """Checks that the servers can take part; there is no group to join.

        Raises:
            UnsupportedOptionError: a server runs without LoRA, or holds one adapter at a time.
            TopologyError: a server has data-parallel ranks.
            PushError: a server refuses the key, or did not answer.
        """
        with self._lock:
            check_servers(self.link.infos)
            self._targets().check_allowed("load_adapter")
            self.link.connected = True

    def wait(self) -> None:
        """Returns: no push goes on by itself."""

    def close(self) -> None:
        """Lets go of the servers, once a push under way is over; harmless twice."""
        with self._lock:
            self.abandon()

    def abandon(self) -> None:
        """Lets go without waiting for anybody."""
        self.link.connected = False
        self.link.drop()

    def push(
        self, source: Any, *, version: int | None = None, reference: nn.Module | None = None
    ) -> PushResult:
        """Pushes an adapter and returns once new requests run under it.

        Args:
            source: PEFT model, also in a wrapper; path of a PEFT folder; or LoRA tensors by name.
            version: the adapter's new version; one more than the last by default.
            reference: PEFT model that the tensors belong to, if ``source`` is a mapping.

        Raises:
            NotConnectedError: before `connect`.
            WeightsError, ConfigError: it is no adapter, or one that SGLang can't serve; nothing was
                touched.
            ServiceBrokenError: the last push of base weights failed.
            PushError: a step failed; the version before is in use.
            VerificationError: a server computes something else than the model; likewise. Or what
                is pushed can't be verified in the way that is asked for; nothing was touched.
        """
        with self._lock:
            self.link.check_connected()
            self._servers.gate.wait_until_open(self._servers.timeouts.control_s)
            check_servers(self.link.infos)
            urls = [server.url for server in self.link.workers]
            adapter = read_adapter(
                source, reference, server_urls=urls, finite=self.config.check_finite
            )
            number = self._servers.highest_version() + 1 if version is None else version
            return self._until_done(adapter, number)

    def _until_done(self, adapter: AdapterSource, version: int) -> PushResult:
        timer, start = StepTimer(), time.perf_counter()
        dtype = self._dtype(adapter)
        with timer.measure("verify"):
            probe = self._probe(adapter, dtype)
        lost: list[str] = []
        while True:
            try:
                name = versioned(self.config.adapter_name, version)
                with prepared(adapter, name, self.link.infos, dtype) as load:
                    push_s = self._carry(load, version, probe, timer)
            except BaseException as raised:
                self.link.drop()
                error = with_its_cause(raised, self.link.workers)
                if isinstance(error, EngineLostError) and self.link.goes_on_without(error):
                    lost.append(str(error.engine))
                    self._servers.drop(str(error.engine))
                    continue
                if error is raised:
                    raise
                raise error from raised
            self.link.verified = self.link.verified or probe is not None
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
        targets, loaded = self._targets(), self._versions()
        timeout_s = self._servers.timeouts.transfer_s
        with timer.measure("room"):
            loaded.make_room(targets, version)
        try:
            sent_at = time.perf_counter()
            with timer.measure("load"):
                targets.do("load", lambda server: load.post(server, timeout_s), timeout_s)
            push_s = time.perf_counter() - sent_at
            with timer.measure("verify"):
                if probe is not None:
                    self._compare(targets, version, probe)
            with timer.measure("version"):
                targets.set_version(version)
        except BaseException as error:
            error.add_note(loaded.take_back(targets, version))
            raise
        self._servers.versions.set_pushed(version, adapter=True)
        rejoin(self._servers)
        loaded.switch(version)
        loaded.clear(targets, version)
        return push_s

    def _compare(self, targets: Targets, version: int, probe: Probe) -> None:
        compare_probe(
            targets,
            *probe,
            f"probe-{version}",
            self.config.probe_tolerance,
            lora=versioned(self.config.adapter_name, version),
            # Nothing is paused: it waits its turn among the requests that the server has.
            timeout_s=self._servers.timeouts.transfer_s,
        )

    def _targets(self) -> Targets:
        link = self.link
        return link.targets if link.targets is not None and link.reaches_all else link.reach()

    def _versions(self) -> LoadedVersions:
        if self._loaded is None:
            versions = self._servers.lora.versions
            self._loaded = LoadedVersions(self.config.adapter_name, versions)
        return self._loaded

    def _dtype(self, adapter: AdapterSource) -> torch.dtype | None:
        """The dtype that the servers compute in, or the adapter's own where that isn't known."""
        if not adapter.tensors:
            return None
        try:
            return served_dtype(self.link.infos[0], expected_model(self.link.model_path))
        except WeightsError:
            return next(iter(adapter.tensors.values())).dtype

    def _probe(self, adapter: AdapterSource, dtype: torch.dtype | None) -> Probe | None:
        """A prompt, and what the trainer's model makes of it; None where it is not to be asked."""
        if not self.link.verifies:
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
