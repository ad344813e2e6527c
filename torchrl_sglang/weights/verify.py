"""Proof that the servers hold what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..client import ControlClient
from ..config import WeightSyncConfig
from ..errors import PushError, ServiceError, VerificationError
from ..info import WorkerInfo
from .checksum import can_check, mismatches
from .probe import parse_probe, probe_body, probe_ids, reference_log_probs
from .source import shown


class Verifier:
    """Verifies one push, by the servers' checksums where it can and by a scored probe elsewhere.

    Args:
        config: which method is wanted.
        infos: the servers.
        weights: what is sent, in the checkpoint's names.
        dtype: dtype in which the servers hold it.
        model: the trainer's model, for the probe.

    Attributes:
        verified_by: ``"checksum"``, ``"probe"``, or ``"nothing"`` so far.
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        infos: Sequence[WorkerInfo],
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        model: nn.Module | None,
    ) -> None:
        self._config = config
        self._infos = infos
        self._weights = weights
        self._dtype = dtype
        self._model = model
        self.verified_by = "nothing"
        self._refuse_impossible()

    def _refuse_impossible(self) -> None:
        method = self._config.verify_method
        if method == "checksum" and not self._checksums_exist:
            raise VerificationError(
                "verify_method='checksum', but only CPU servers of SGLang with /weights_checker "
                "and tp_size=1 hash in a way that is known here: use 'auto' or 'probe'."
            )
        if method == "probe" and self._model is None:
            raise VerificationError(
                "verify_method='probe' compares with the trainer's model: push a module, or "
                "register one with scheme.register_model(model)."
            )

    @property
    def _checksums_exist(self) -> bool:
        return all(
            info.capabilities.checksum and info.device == "cpu" and info.tp_size == 1
            for info in self._infos
        )

    def by_checksum(self, workers: Sequence[ControlClient], timeout_s: float) -> None:
        """Compares every parameter of every server with what was sent, where that is possible.

        Raises:
            VerificationError: a parameter differs.
            PushError: a server did not answer.
        """
        if self._config.verify_method not in ("auto", "checksum") or not self._checksums_exist:
            return
        answers = [self._checksums(worker, timeout_s) for worker in workers]
        if not all(can_check(answer, self._weights) for answer in answers):
            if self._config.verify_method == "checksum":
                raise VerificationError(
                    "the servers fuse their parameters in a way that is not known here: use "
                    "verify_method='probe'."
                )
            return
        for worker, answer in zip(workers, answers, strict=True):
            wrong = mismatches(answer, self._weights, self._dtype)
            if wrong:
                raise VerificationError(
                    f"{worker.url} holds other values than were sent in {len(wrong)} of "
                    f"{len(answer)} parameters: {shown(wrong)}."
                )
        self.verified_by = "checksum"

    def _checksums(self, worker: ControlClient, timeout_s: float) -> dict[str, str]:
        try:
            answer = worker.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
            checksums: dict[str, str] = answer["ranks"][0]["checksums"]
        except ServiceError as error:
            raise PushError(str(error), step="verify", engine=worker.url) from error
        except (KeyError, TypeError, IndexError) as error:
            raise PushError(
                f"no checksums in {str(answer)[:200]!r}", step="verify", engine=worker.url
            ) from error
        return checksums

    def by_probe(self, workers: Sequence[ControlClient], timeout_s: float, salt: str) -> None:
        """Scores a prompt on every server, unless the checksums have proved more already.

        Raises:
            VerificationError: the scores differ from the trainer's model's.
            PushError: a server did not answer.
        """
        if self._config.verify_method == "never" or self.verified_by == "checksum":
            return
        if self._model is None:
            raise VerificationError(
                "these servers can only be verified by a probe, which compares with the trainer's "
                "model: push a module, register one with scheme.register_model(model), or accept "
                "unverified pushes with WeightSyncConfig(verify_method='never')."
            )
        embedding = next(t for t in self._weights.values() if t.ndim == 2)
        ids = probe_ids(embedding.shape[0])
        ours = reference_log_probs(self._model, self._weights, self._dtype, ids)
        for worker in workers:
            try:
                answer = worker.post("/generate", probe_body(ids, salt), timeout_s=timeout_s)
                theirs = parse_probe(answer, ids)
            except ServiceError as error:
                raise PushError(str(error), step="verify", engine=worker.url) from error
            worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            if worst > self._config.probe_tolerance:
                raise VerificationError(
                    f"{worker.url} scores a probe differently from the trainer's model: log-probs "
                    f"differ by up to {worst:.3f} (probe_tolerance={self._config.probe_tolerance})."
                )
        self.verified_by = "probe"
