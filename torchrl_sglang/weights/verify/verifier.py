"""Proves that the servers hold what was sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ...config import WeightSyncConfig
from ...errors import ServiceError, VerificationError
from ...servers.control import ControlClient
from ...servers.info import WorkerInfo
from ...servers.together import push_error
from ..layout import FAMILIES, without_siblings
from ..source.checkpoint import CheckpointWeights
from ..source.expected import Dtypes, model_config
from ..source.lazy import placeholders
from ..source.merged import base_weights, has_adapters
from ..source.named import shown, unwrap
from ..targets import Targets
from .checksums import parse_checksums
from .proof import ChecksumProof, family_of, why_unprovable
from .score import parse_probe, probe_body, probe_ids, reference_log_probs

T = TypeVar("T")

NO_MODEL = (
    "these servers can only be verified by a probe, which compares with the trainer's model: push "
    "a module, register one with scheme.register_model(model), or accept unverified pushes with "
    "WeightSyncConfig(verify='never')."
)


class Verifier:
    """Verifies one push, by the servers' checksums where it can and by a scored probe elsewhere.

    Args:
        config: which method is wanted.
        infos: the servers.
        weights: what is sent, in the checkpoint's names.
        dtypes: dtypes in which the servers hold it.
        model: the trainer's model, for the probe.
        partial: ``weights`` are a part of the model.
        whole: the names of all that the checkpoint has, where they may be a part.

    Attributes:
        verified_by: ``"checksum"``, ``"probe"``, or ``"nothing"`` so far.
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        infos: Sequence[WorkerInfo],
        weights: Mapping[str, torch.Tensor],
        dtypes: Dtypes,
        model: nn.Module | None,
        *,
        partial: bool = False,
        whole: Collection[str] = (),
    ) -> None:
        self._config = config
        self._whole = whole
        self._partial = partial
        self._infos = infos
        self._weights = weights
        self._dtypes = dtypes
        self._model = model
        self._model_config = getattr(unwrap(model), "config", None) if model is not None else None
        self._unproved = ""
        self.verified_by = "nothing"
        self._probe: tuple[list[int], list[float]] | None = None

    def refuse_impossible(self) -> None:
        """Raises `VerificationError` where the servers can't be verified as is asked for."""
        method = self._config.verify_method
        if method == "checksum" and not self._checksums_exist:
            raise VerificationError(
                "verify_method='checksum', but not every server has SGLang's /weights_checker: "
                "use 'auto' or 'probe'."
            )
        if method == "checksum":
            for info in self._infos:
                if reason := self._why_unprovable(info):
                    raise VerificationError(
                        f"checksums can't prove a push to {info.url}: {reason}. Use "
                        "verify_method='auto' or 'probe'."
                    )
        elif self._model is None:
            doubts = self._doubts()
            if method == "probe" or doubts:
                raise VerificationError(f"{doubts[0]} {NO_MODEL}" if doubts else NO_MODEL)

    @property
    def _checksums_exist(self) -> bool:
        # Pipeline-parallel ranks hold some layers each, which is not known here.
        return all(info.capabilities.checksum and info.pp_size == 1 for info in self._infos)

    def _doubts(self) -> list[str]:
        """Why it is not certain that checksums will prove the push."""
        if not self._checksums_exist:
            return ["Not every server has SGLang's /weights_checker."]
        reasons = {info.url: self._why_unprovable(info) for info in self._infos}
        for info in self._infos:
            family = family_of(info, self._config_of(info))
            if reasons[info.url] is None and family not in FAMILIES:
                reasons[info.url] = (
                    f"how SGLang stores a {family!r} model is not known here (if it does as the "
                    "checkpoint does, verify_method='checksum' will do)"
                )
        return [f"Checksums may not prove {u}: {why}." for u, why in reasons.items() if why]

    def _why_unprovable(self, info: WorkerInfo) -> str | None:
        shapes = {name: tuple(tensor.shape) for name, tensor in placeholders(self._weights).items()}
        if lone := self._lone():
            return lone
        return why_unprovable(info, shapes, self._config_of(info))

    def _lone(self) -> str | None:
        if self._partial and (lone := without_siblings(placeholders(self._weights), self._whole)):
            return f"it fuses {lone[0]} with parameters that are not sent along"
        return None

    def prepare(self) -> None:
        """Computes what the trainer's model says of the probe, if the probe may be needed.

        For a push from another thread. The model is let go of: that thread must not touch it.

        Raises:
            VerificationError: there is no model.
        """
        method = self._config.verify_method
        if method == "probe" or (method == "auto" and self._doubts()):
            self._reference()
        self._model = None

    def _reference(self) -> tuple[list[int], list[float]]:
        if self._probe is None:
            if self._model is None:
                raise VerificationError(f"{self._unproved} {NO_MODEL}".strip())
            inner: Any = unwrap(self._model)
            weights = self._weights
            if isinstance(weights, CheckpointWeights):
                weights = weights.source
            dtypes = self._dtypes
            if has_adapters(inner):  # what is merged as it is sent, the model adds by itself
                weights = dict(inner.named_parameters())
                wide = {id(p) for n, p in base_weights(inner).items() if n in dtypes.wide}
                dtypes = replace(dtypes, wide={n for n, p in weights.items() if id(p) in wide})
            _check_names(inner, weights)
            ids = probe_ids(_num_embeddings(inner, weights))
            scores = reference_log_probs(self._model, weights, dtypes, ids)
            self._probe = (ids, scores)
        return self._probe

    def by_checksum(self, targets: Targets, timeout_s: float | None = None) -> None:
        """Compares every parameter on every rank of every server with what was sent.

        Where a server's layout is not known, such servers are only compared with each other, and
        `verified_by` stays as it was.

        Raises:
            VerificationError: a parameter differs; or nothing else but checksums was wanted and
                they prove nothing here.
            PushError: a server did not answer.
        """
        if self._config.verify_method not in ("auto", "checksum") or not self._checksums_exist:
            return
        if lone := self._lone():
            self._unproved = f"Checksums prove nothing of {self._infos[0].url}: {lone}."
            return
        within_s = timeout_s or targets.timeout_s
        given = targets.collect("verify", lambda server: server.checksums(within_s), within_s)
        answers = [
            _parsed(info.url, parse_checksums, answer, info.tp_size, info.num_copies)
            for info, answer in zip(targets.infos, given, strict=True)
        ]
        proof = ChecksumProof(self._weights, self._dtypes, self._config_of, partial=self._partial)
        unproved = proof.unproved(targets.infos, answers)
        if unproved:
            reason = next(iter(unproved.values()))
            self._unproved = f"Checksums prove nothing of {', '.join(unproved)}: {reason}."
            if self._config.verify_method == "checksum":
                raise VerificationError(f"{self._unproved} Use verify_method='auto' or 'probe'.")
        else:
            self.verified_by = "checksum"

    def _config_of(self, info: WorkerInfo) -> Any | None:
        """The config of what a server serves, from the trainer's model or from its path."""
        return self._model_config or model_config(info.model_path)

    def by_probe(self, targets: Targets, salt: str) -> None:
        """Scores a prompt on every server, unless the checksums have proved more already.

        Raises:
            VerificationError: the scores differ from the trainer's model's.
            PushError: a server did not answer.
        """
        if self.verified_by == "checksum":
            return
        ids, ours = self._reference()
        compare_probe(targets, ids, ours, salt, self._config.probe_tolerance)
        self.verified_by = "probe"


def _check_names(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises `VerificationError` where a model can't compute with weights that have other names."""
    parameters = model.named_parameters(remove_duplicate=False)
    names = {name for name, _ in [*parameters, *model.named_buffers()]}
    if other := [name for name in weights if name not in names]:
        raise VerificationError(
            f"the model that a probe compares with has no {shown(other)}, as the checkpoint has: "
            "push weights under the model's own names, or the model itself, or let checksums alone "
            "judge with WeightSyncConfig(verify_method='checksum')."
        )


def _num_embeddings(model: Any, weights: Mapping[str, torch.Tensor]) -> int:
    """Ids that a model knows."""
    if hasattr(model, "get_input_embeddings"):
        return int(model.get_input_embeddings().weight.shape[0])
    return next(tensor for tensor in weights.values() if tensor.ndim == 2).shape[0]


def compare_probe(
    targets: Targets,
    ids: list[int],
    ours: Sequence[float],
    salt: str,
    tolerance: float,
    lora: str | None = None,
    timeout_s: float | None = None,
) -> None:
    """Scores a prompt on every server and compares with what the trainer's model gives.

    Args:
        targets: the servers.
        ids: the prompt.
        ours: the trainer's log-probs of ``ids[1:]``.
        salt: one that no cache has seen.
        tolerance: largest difference of a log-prob.
        lora: the adapter to score with.
        timeout_s: bound on waiting for a server; that on an order by default.

    Raises:
        VerificationError: the scores differ by more.
        PushError: a server did not answer.
    """
    body = probe_body(ids, salt, lora)

    def score(server: ControlClient) -> Any:
        return server.score(body, timeout_s)

    given = targets.collect("verify", score, timeout_s)
    for server, answer in zip(targets.workers, given, strict=True):
        theirs = _parsed(server.url, parse_probe, answer, ids)
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if worst > tolerance:
            raise VerificationError(
                f"{server.url} scores a probe differently from the trainer's model: log-probs "
                f"differ by up to {worst:.3f} (probe_tolerance={tolerance})."
            )


def _parsed(url: str, parse: Callable[..., T], *answer: Any) -> T:
    try:
        return parse(*answer)
    except (ServiceError, ValueError) as error:
        raise push_error(error, "verify", url) from error
