"""Judges what the servers' ``/weights_checker`` answered against what was sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...errors import VerificationError, count_of
from ...servers.info import WorkerInfo
from ..layout import FAMILIES, Heads, Rank, heads_of, ignored, sources_of, why_unknown
from ..source.expected import Dtypes
from ..source.lazy import placeholders
from ..source.named import shown
from .checksums import RankChecksums, disagreements, expected_checksums, mismatches

Answer = Sequence[RankChecksums]

DP_ATTENTION = "how data-parallel attention divides a model is not known here"


def why_unprovable(
    info: WorkerInfo, shapes: Mapping[str, Sequence[int]], config: Any | None
) -> str | None:
    """Why checksums can't prove a push to an engine, as far as that is known without asking it.

    Args:
        info: the engine.
        shapes: names and shapes of what will be sent.
        config: the model config of what it serves, or None.
    """
    if info.dp_attention:
        return DP_ATTENTION
    if info.quantization:
        return f"it stores its weights quantised ({info.quantization})"
    if info.features.lora:
        return "its layers are wrapped for LoRA adapters, under other names"
    return why_unknown(
        shapes,
        shapes,
        family=family_of(info, config),
        tp_size=info.tp_size,
        heads=heads_of(config),
        on_cpu=info.device == "cpu",
    )


def family_of(info: WorkerInfo, config: Any | None) -> str | None:
    """The ``model_type`` of what an engine serves."""
    return info.model_type or getattr(config, "model_type", None)


class ChecksumProof:
    """Compares answers with what was sent; engines alike cost one computation.

    Args:
        weights: what was sent, in the checkpoint's names.
        dtypes: dtypes in which the servers hold it.
        config_of: the model config of what a server serves, or None.
        partial: a part of the model was sent, and only that is looked at.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        dtypes: Dtypes,
        config_of: Callable[[WorkerInfo], Any | None],
        *,
        partial: bool = False,
    ) -> None:
        self._weights = weights
        self._dtypes = dtypes
        self._config_of = config_of
        self._partial = partial
        self._shapes = {name: tuple(tensor.shape) for name, tensor in placeholders(weights).items()}
        self._known: dict[tuple[object, ...], dict[str, str]] = {}

    def unproved(self, infos: Sequence[WorkerInfo], answers: Sequence[Answer]) -> dict[str, str]:
        """URLs of the engines that checksums can't tell of, and why.

        Raises:
            VerificationError: an engine holds something else than was sent, or engines whose
                layout isn't known differ from each other.
        """
        reasons = [self.why_unproved(i, a) for i, a in zip(infos, answers, strict=True)]
        unproved = {i.url: reason for i, reason in zip(infos, reasons, strict=True) if reason}
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, info in enumerate(infos):
            if info.url in unproved:
                kind = (info.tp_size, info.device, info.dtype, info.model_path)
                alike.setdefault(kind, []).append(index)
        for group in alike.values():
            for tp_rank, names in disagreements([answers[index] for index in group]).items():
                urls = ", ".join(infos[index].url for index in group)
                raise VerificationError(
                    f"after the same push, {urls} hold different values on rank {tp_rank} in "
                    f"{count_of(len(names), 'parameter')}: {shown(names)}."
                )
        return unproved

    def _of_what_was_sent(self, info: WorkerInfo, answer: Answer) -> Answer:
        """Of what an engine hashed, the parameters all parts of which were sent."""
        sent = self._shapes.keys()
        parts = {name: set(sources_of(name, sent)) for rank in answer for name in rank.checksums}
        self._refuse_lost(info, sorted(sent - set().union(*parts.values())))
        return [
            replace(rank, checksums={n: h for n, h in rank.checksums.items() if parts[n] <= sent})
            for rank in answer
        ]

    def _refuse_lost(self, info: WorkerInfo, lost: Sequence[str]) -> None:
        if lost:
            raise VerificationError(
                f"{info.url} has no parameter for {len(lost)} of those that were sent, so it "
                f"computes without them: {shown([*lost])}."
            )

    def why_unproved(self, info: WorkerInfo, answer: Answer) -> str | None:
        """Why an answer proves nothing; None if the engine holds exactly what was sent.

        Raises:
            VerificationError: it does not.
        """
        if self._partial:
            answer = self._of_what_was_sent(info, answer)
        config = self._config_of(info)
        family = family_of(info, config)
        heads = heads_of(config)
        for rank in answer:
            unknown = self._why_unknown(info, rank, family, heads)
            if unknown:
                return unknown
        wrong: dict[str, list[int]] = {}
        for rank in answer:
            ours = self._expected(
                rank.checksums,
                Rank(tp_rank=rank.tp_rank, tp_size=info.tp_size, heads=heads),
                on_gpu=info.device.startswith("cuda"),
            )
            for name in mismatches(rank.checksums, ours):
                wrong.setdefault(name, []).append(rank.tp_rank)
        if wrong and family not in FAMILIES:
            return f"how SGLang stores a {family!r} model is not known here"
        if wrong:
            raise VerificationError(_differs(info, answer, wrong))
        return None

    def _why_unknown(
        self, info: WorkerInfo, rank: RankChecksums, family: str | None, heads: Heads | None
    ) -> str | None:
        if info.dp_attention:
            return DP_ATTENTION
        if family in FAMILIES and not self._partial:
            self._refuse_lost(info, ignored(rank.checksums, self._shapes))
        return why_unknown(
            rank.checksums,
            self._shapes,
            family=family,
            tp_size=info.tp_size,
            heads=heads,
            on_cpu=info.device == "cpu",
        )

    def _expected(self, names: Mapping[str, str], rank: Rank, *, on_gpu: bool) -> dict[str, str]:
        key = (rank, on_gpu, frozenset(names))
        if key not in self._known:
            self._known[key] = expected_checksums(
                names,
                self._weights,
                dtypes=self._dtypes,
                rank=rank,
                on_gpu=on_gpu,
                device=self._device if on_gpu else None,
            )
        return self._known[key]

    @property
    def _device(self) -> torch.device | None:
        """The GPU, for weights that are kept on the CPU, where its hash takes long."""
        on_cpu = any(tensor.device.type == "cpu" for tensor in placeholders(self._weights).values())
        if on_cpu and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return None


def _differs(info: WorkerInfo, answer: Answer, wrong: Mapping[str, Sequence[int]]) -> str:
    where = ""
    if info.tp_size > 1:
        where = f" on ranks {sorted({rank for ranks in wrong.values() for rank in ranks})}"
    return (
        f"{info.url} holds other values than were sent in {len(wrong)} of "
        f"{len(answer[0].checksums)} parameters{where}: {shown(list(wrong))}."
    )
