"""Tells what a push did, and how long each part of it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What a push did, and how long each part took.

    Attributes:
        version: the version that every server now runs.
        label: what the push called that version, if it gave it a name.
        method: how the weights travelled: ``"broadcast"``, ``"tensor"``, ``"disk"`` or ``"lora"``.
        reason: why that method.
        layout: ``"flattened"`` (a bucket is one tensor) or ``"tensors"`` (each by itself).
        num_bytes: bytes sent.
        num_buckets: pieces they were sent in.
        verified_by: ``"checksum"``, ``"probe"`` or ``"nothing"``.
        flushed: every server's prefix cache was emptied. False where it was not to be, and where a
            server before SGLang 0.5.23 refused because requests were in flight: those that it
            retracted may go on from a prefix of the old weights, new ones do not.
        lost_engines: URLs of servers that died on the way and were left out.
        restarted_engines: URLs of servers that were found dead or stuck and started again.
        step_s: seconds of each step, by name: ``restart``, ``join`` (with a new group), ``pause``,
            ``flush``, ``begin``, ``write`` (of files), ``transfer``, ``end``, ``verify``,
            ``version``, ``continue``; of an adapter ``room``, ``load``, ``verify``, ``version``.
        push_s: seconds from the first announcement to the last acknowledgement.
        paused_s: seconds from pause to continue.
        total_s: seconds of all of it.
    """

    version: int
    label: str | None = None
    method: str = "broadcast"
    reason: str = ""
    layout: str = "flattened"
    num_bytes: int
    num_buckets: int
    verified_by: str
    flushed: bool
    lost_engines: tuple[str, ...] = ()
    restarted_engines: tuple[str, ...] = ()
    step_s: Mapping[str, float]
    push_s: float
    paused_s: float
    total_s: float


@dataclass
class StepTimer:
    """Seconds of each step, added up by name."""

    step_s: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Times the block and adds it to ``step``; a step that raises is not counted."""
        start = time.perf_counter()
        yield
        self.step_s[step] = self.step_s.get(step, 0.0) + time.perf_counter() - start


@dataclass
class Course:
    """How a push goes, over all attempts.

    Attributes:
        lost: engines that were left out.
        restarted: engines that were started again.
        timer: how long the steps took.
        start: when it began.
    """

    lost: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    timer: StepTimer = field(default_factory=StepTimer)
    start: float = field(default_factory=time.perf_counter)
