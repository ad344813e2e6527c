"""Pushes named tensors into servers that then run them, or marks the service broken.

What requests in flight come to when a push starts is `WeightSyncConfig.pause_mode`: servers retract
them and go on under the new weights, freeze them, or abort them. New ones wait at the gate.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..config import WeightSyncConfig
from ..errors import (
    EngineLostError,
    PushError,
    SGLangError,
    WeightsError,
    warn,
)
from ..servers.gate import ServiceState
from ..servers.members import Servers
from ..servers.restart import rejoin, restart, restart_in_push
from ..servers.threads import in_thread
from .after_failure import after_failure, forget_frames
from .carry.carrier import Carrier
from .connection import Link
from .plan import Plan, make_plan
from .result import Course, PushResult, StepTimer
from .source.expected import expected_model
from .source.lazy import LazyWeights
from .streams import handed_over
from .targets import Targets


class Pusher(Protocol):
    """What brings something of the trainer's into all servers."""

    @property
    def config(self) -> WeightSyncConfig:
        """How it pushes."""

    @property
    def is_busy(self) -> bool:
        """Whether it is in the middle of a push, or of joining."""

    def connect(self) -> None:
        """Makes ready for pushes."""

    def push(
        self, source: Any, *, version: int | None = None, reference: nn.Module | None = None
    ) -> PushResult:
        """Pushes, and returns once every server runs it."""

    def wait(self) -> PushResult | None:
        """Waits for a push that is under way by itself; raises what it raised, once."""

    def close(self) -> None:
        """Lets go of the servers; harmless twice."""

    def abandon(self) -> None:
        """Lets go without waiting for anybody."""


class FullPusher:
    """Pushes whole models into every server of a service.

    Args:
        link: to the servers.

    Attributes:
        link: as given.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._lock = threading.Lock()
        self._running: Future[PushResult] | None = None

    @property
    def config(self) -> WeightSyncConfig:
        """How it pushes."""
        return self.link.config

    @property
    def _servers(self) -> Servers:
        return self.link.servers

    @property
    def is_busy(self) -> bool:
        """Whether it is in the middle of a push, or of joining."""
        running = self._running
        return self._lock.locked() or (running is not None and not running.done())

    def connect(self) -> None:
        """Joins the trainer and all ranks of all servers into one group.

        Raises:
            TopologyError: a server can't take part.
            PushError: a server refused or did not come.
        """
        with self._lock:
            self.link.find_device()
            if self._servers.state is ServiceState.BROKEN:
                self._restart_lifeless()
            try:
                self.link.join()
            except PushError:
                if not self._restart_lifeless():
                    raise
                self.link.join()
            self.link.connected = True

    def _restart_lifeless(self) -> bool:
        urls = self._servers.lifeless()
        if urls:
            restart(self._servers, urls)
        return bool(urls)

    def abandon(self) -> None:
        """Leaves the group without waiting for anybody, servers included."""
        self.link.connected = False
        self.link.drop()

    def close(self) -> None:
        """Leaves the group, on both sides, once a push under way is over; harmless twice.

        Warns of what that push raised, which nobody else will hear of.
        """
        failed: Exception | None = None
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001
            failed = error
        with self._lock:
            self.link.connected = False
            self.link.leave()
        if failed is not None:
            warn(f"the last weight push failed: {failed}")

    def push(
        self,
        source: Any,
        *,
        version: int | None = None,
        reference: nn.Module | None = None,
        partial: bool = False,
    ) -> PushResult:
        """Pushes a model and returns once every server runs it.

        Args:
            source: module, wrapper, TensorDict or state dict.
            version: the weights' new version; one more than the last by default.
            reference: model to compute the probe's reference with, if ``source`` is none.
            partial: ``source`` may be a part of the model; the rest stays as it is.

        Raises:
            NotConnectedError: before `connect`.
            WeightsError: there are none, or names, shapes, dtypes or values are not as the served
                model's; nothing was touched.
            PushError: a step failed; the service is broken until a push succeeds.
            VerificationError: the servers do not hold what was sent; broken likewise.
        """
        self.wait()
        with self._lock:
            plan = self._planned(source, version, reference, partial=partial)
            return self._carried_out(plan)

    def push_later(
        self,
        source: Any,
        *,
        version: int | None = None,
        reference: nn.Module | None = None,
        partial: bool = False,
        keeping: object = None,
    ) -> Future[PushResult]:
        """Copies the weights and pushes them from another thread; arguments as in `push`.

        New requests wait from now on, as in `push`. One push is under way at a time.

        Args:
            source: as in `push`.
            version: as in `push`.
            reference: as in `push`.
            partial: as in `push`.
            keeping: stays alive until the push is over.

        Raises:
            NotConnectedError, WeightsError: as in `push`, at once.
            PushError, VerificationError: of the push before. This one's come in the future, in
                `wait` and in the next push.
        """
        self.wait()
        with self._lock:
            plan = self._planned(source, version, reference, copy=True, partial=partial)
            ready = handed_over([*plan.weights.values()], self.link.sending_device)

            def carry_out(kept: object = keeping) -> PushResult:
                with self._lock, self._broken_unless_done(), ready():
                    return self._carried_out(plan)

            with self._broken_unless_done():
                self._servers.gate.begin()
                self._running = in_thread(
                    carry_out,
                    "torchrl_sglang-push",
                    # A script may end with its last push under way, which goes on to its end.
                    exit_waits_s=self._servers.timeouts.transfer_s,
                )
            return self._running

    def wait(self) -> PushResult | None:
        """Waits for the push of `push_later`; raises what it raised, once."""
        running = self._running
        if running is None:
            return None
        wait([running])  # an exception in here (Ctrl-C) leaves the push's own for the next call
        self._running = None
        return running.result()

    def _planned(
        self,
        source: Any,
        version: int | None,
        reference: nn.Module | None,
        *,
        copy: bool = False,
        partial: bool = False,
    ) -> Plan:
        self.link.check_connected()
        repairs = self._servers.state is ServiceState.BROKEN
        if partial and repairs:
            raise WeightsError(
                "a part of the weights can't repair a service whose last push failed: push the "
                "whole model."
            )
        plan = make_plan(
            source,
            model_path=self.link.model_path,
            infos=self.link.infos,
            config=self.config,
            reference=reference,
            version=self._next_version() if version is None else version,
            # Also if this push is not verified: a repair in it would be.
            verifies=self.config.verify != "never",
            copy=copy,
            partial=partial,
            repairs=repairs,
        )
        if plan.sharded is not None:
            tied = expected_model(self.link.model_path).tied
            plan.sharded.compare(tied, finite=self.config.check_finite)
        if self.link.carrier is not None:
            self.link.carrier.prepare(plan.buckets)
        return plan

    @contextlib.contextmanager
    def _broken_unless_done(self) -> Iterator[None]:
        """Whatever ends the block early, Ctrl-C included, the service does not stay UPDATING."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self._servers.gate.fail(sys.exception() or RuntimeError("the push was given up"))

    def _carried_out(self, plan: Plan) -> PushResult:
        with self._servers.changing, self._broken_unless_done():
            self._servers.gate.begin()
            result = self._tried(plan)
            rejoin(self._servers)
            self._servers.versions.set_pushed(plan.version)
            self._servers.gate.commit()
            return result

    def _tried(self, plan: Plan) -> PushResult:
        course = Course()
        if plan.repairs:
            try:
                self._revive(course)
            except BaseException:
                self.link.drop()  # with what it has made for this push
                raise
        while True:
            try:
                return self._attempt(plan, course)
            except BaseException as raised:
                in_session = self._may_be_in_session(raised)
                self.link.drop()
                if isinstance(plan.weights, LazyWeights):
                    plan.weights.drain()
                error = after_failure(raised, self.link.workers, in_session=in_session)
                forget_frames(error)
                if self._goes_on(error, plan, course):
                    continue
                if error is raised:
                    raise
                raise error from raised

    def _may_be_in_session(self, error: BaseException) -> bool:
        carrier, targets = self.link.carrier, self.link.targets
        if (
            carrier is None
            or targets is None
            or not (carrier.begins_and_ends and targets.takes_begin_end)
        ):
            return False
        step = error.step if isinstance(error, PushError) else None
        return step in ("transfer", "end") or not isinstance(error, SGLangError)

    def _attempt(self, plan: Plan, course: Course) -> PushResult:
        link, timer = self.link, course.timer
        link.leave_if_changed()
        if link.carrier is None or not link.carrier.is_connected:
            with timer.measure("join"):
                link.join()
        carrier, targets, choice = link.carrier, link.targets, link.choice
        assert carrier is not None and targets is not None and choice is not None
        carrier.prepare(plan.buckets)  # a new one; for the one before it has been done already
        verifies = link.verifies
        num_bytes = sum(bucket.num_bytes for bucket in plan.buckets)
        timeouts, device = self._servers.timeouts, link.infos[0].device
        done = attempt(
            plan,
            carrier,
            targets,
            config=self.config,
            verifies=verifies,
            # Checksums are those of the whole model, also where a part of it was sent.
            whole_s=timeouts.control_s if plan.partial else timeouts.whole_s(num_bytes, device),
            timer=timer,
        )
        link.verified = link.verified or verifies
        return PushResult(
            version=plan.version,
            method=carrier.method,
            reason=choice.reason,
            layout=done.layout,
            num_bytes=num_bytes,
            num_buckets=len(plan.buckets),
            verified_by=plan.verifier.verified_by if verifies else "nothing",
            flushed=done.flushed,
            lost_engines=tuple(course.lost),
            restarted_engines=tuple(course.restarted),
            step_s=timer.step_s,
            push_s=done.push_s,
            paused_s=done.paused_s,
            total_s=time.perf_counter() - course.start,
        )

    def _goes_on(self, error: BaseException, plan: Plan, course: Course) -> bool:
        """Whether the push can be tried again: without an engine, or with it started again."""
        if isinstance(error, EngineLostError) and self.link.goes_on_without(error):
            course.lost.append(str(error.engine))
            self._servers.drop(str(error.engine))
            # A part of the weights is too little for a server that has the model's own files.
            return not (self._revive(course) and plan.partial)
        restarts = self.config.lost_engines == "restart" or bool(course.lost)
        goes_on = restarts and not plan.partial and isinstance(error, PushError)
        return goes_on and self._revive(course)

    def _revive(self, course: Course) -> bool:
        """Whether there were engines to start again, each for the first time in this push."""
        urls = self._servers.lifeless()
        if not urls or {*urls} & {*course.restarted}:
            return False
        with course.timer.measure("restart"):
            restart_in_push(self._servers, urls)
        course.restarted += urls
        return True

    def _next_version(self) -> int:
        return self._servers.highest_version() + 1


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
    targets: Targets,
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
        targets: the servers.
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
        targets.pause("pause", config.pause_mode)
    with timer.measure("flush"):
        flushed = config.flushes and targets.flush()
    with timer.measure("begin"):
        if carrier.begins_and_ends:
            targets.begin()
    sent_at = time.perf_counter()
    layout = carrier.transfer(plan.buckets, plan.weights, timer)
    push_s = time.perf_counter() - sent_at
    with timer.measure("end"):
        if carrier.begins_and_ends:
            targets.end(whole_s)
    with timer.measure("verify"):
        if verifies:
            plan.verifier.by_checksum(targets, whole_s)
    with timer.measure("version"):
        targets.set_version(plan.version)
    with timer.measure("continue"):
        targets.resume()
    paused_s = time.perf_counter() - paused_at
    with timer.measure("verify"):
        if verifies:
            _score(plan, targets)
    return Attempt(layout=layout, flushed=flushed, push_s=push_s, paused_s=paused_s)


def _score(plan: Plan, targets: Targets) -> None:
    """Verifies what checksums left open; a paused server can't score, so the servers run by now.

    Our own requests still wait. What others sent, and what was in flight before, runs on weights
    that are not proved yet: under the new version, so that it can be told from what the old weights
    gave. If the proof fails, it does not go on with the weights of the next push.
    """
    try:
        plan.verifier.by_probe(targets, f"probe-{plan.version}")
    except BaseException:
        with contextlib.suppress(PushError):
            targets.pause("verify", "abort")
        raise


def abandon_with(owner: object, pusher: Pusher) -> weakref.finalize[..., object]:
    """Leaves the group once ``owner`` is gone, without a word to the servers.

    Not in a forked copy, and never at the interpreter's exit: nothing that it needs is there then.
    """
    finalizer = weakref.finalize(owner, _abandon, pusher, os.getpid())
    finalizer.atexit = False
    return finalizer


def _abandon(pusher: Pusher, pid: int) -> None:
    if os.getpid() == pid:
        pusher.abandon()
