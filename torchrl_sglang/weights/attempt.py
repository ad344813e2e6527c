"""The steps of one push, in their order."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from ..config import WeightSyncConfig
from ..errors import PushError
from .carrier import Carrier
from .engines import Engines
from .planned import Plan
from .result import StepTimer


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a push came to.

    Attributes:
        layout: how the weights travelled.
        flushed: every server's prefix cache was emptied.
        push_s: seconds from the first announcement to the last acknowledgement.
        paused_s: seconds from pause to continue.
    """

    layout: str
    flushed: bool
    push_s: float
    paused_s: float


def attempt(
    plan: Plan,
    carrier: Carrier,
    engines: Engines,
    *,
    config: WeightSyncConfig,
    verifies: bool,
    whole_s: float,
    timer: StepTimer,
) -> Attempt:
    """Pushes once: every server runs the weights when this returns.

    Args:
        plan: what to push.
        carrier: how.
        engines: the servers.
        config: what stands around it.
        verifies: the servers prove what they hold.
        whole_s: bound on each step that reads all weights.
        timer: is given the time of each step.

    Raises:
        PushError: a step failed; servers may be paused, and hold anything.
        VerificationError: the servers do not hold what was sent.
    """
    paused_at = time.perf_counter()
    with timer.measure("pause"):
        engines.post("pause", "/pause_generation", {"mode": config.pause_mode})
    with timer.measure("flush"):
        flushed = config.flushes and engines.flush()
    with timer.measure("begin"):
        if carrier.in_session:
            engines.begin()
    sent_at = time.perf_counter()
    layout = carrier.transfer(plan.buckets, plan.weights, timer)
    push_s = time.perf_counter() - sent_at
    with timer.measure("end"):
        if carrier.in_session:
            engines.end(whole_s)
    with timer.measure("verify"):
        if verifies:
            plan.verifier.by_checksum(engines, whole_s)
    with timer.measure("version"):
        engines.set_version(plan.version)
    with timer.measure("continue"):
        engines.post("continue", "/continue_generation")
    paused_s = time.perf_counter() - paused_at
    with timer.measure("verify"):
        if verifies:
            _probe(plan, engines)
    return Attempt(layout=layout, flushed=flushed, push_s=push_s, paused_s=paused_s)


def _probe(plan: Plan, engines: Engines) -> None:
    """Verifies what checksums left open; a paused server can't score, so the servers run by now.

    Our own requests still wait. What others sent, and what was in flight before, runs on weights
    that are not proved yet: under the new version, so that it can be told from what the old weights
    gave. If the proof fails, it does not go on with the weights of the next push.
    """
    try:
        plan.verifier.by_probe(engines, f"probe-{plan.version}")
    except BaseException:
        with contextlib.suppress(PushError):
            engines.post("verify", "/pause_generation", {"mode": "abort"})
        raise
