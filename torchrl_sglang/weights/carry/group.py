"""Is the trainer's side of the collective that trainer and servers share."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import (
    Backend,
    BroadcastOptions,
    GroupName,
    PrefixStore,
    _get_default_group,
    _new_process_group_helper,
    _set_pg_timeout,
    _world,
    destroy_process_group,
    is_initialized,
)

from ...errors import PortTakenError
from ...servers.threads import in_thread

POLL_S = 0.0002
LEAVE_S = 1.0  # a timed wait of this length frees a broadcast that nobody joined
LEFT_S = 5 * LEAVE_S  # by when a thread that sends is over once its group was left


class Rendezvous:
    """The store at which trainer and servers meet; closing it frees whoever still waits there.

    Attributes:
        address: where servers reach it.
        port: its port.
    """

    def __init__(self, address: str, port: int | None, timeout_s: float) -> None:
        self.address = address
        self._timeout = datetime.timedelta(seconds=timeout_s)
        listener = _listen(address, port)
        self.port: int = listener.getsockname()[1]
        self._master: TCPStore | None = TCPStore(
            address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=listener.detach(),
        )

    def member(self) -> TCPStore:
        """A connection of its own, so that closing the store frees a thread that waits in it.

        Raises:
            ConnectionError: the store is closed.
        """
        if self._master is None:
            raise ConnectionError("the store at which trainer and servers meet is closed")
        return TCPStore(
            self.address,
            self.port,
            is_master=False,
            wait_for_workers=False,
            timeout=self._timeout,
        )

    def close(self) -> None:
        """Ends the store; harmless twice."""
        self._master = None


def _listen(address: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port or 0))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise PortTakenError(
            f"the weight sync can't listen on {address}:{port or 'any port'} "
            f"({getattr(error, 'strerror', None) or error}): name another master_port, or a "
            "master_address of this machine."
        ) from error
    return listener


class TrainerGroup:
    """Rank 0 of the collective.

    Args:
        rendezvous: where to meet.
        name: name of the group, new each time.
        world_size: all ranks, this one included.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout_s: bound on the rendezvous.
        operation_s: bound on one broadcast. NCCL's watchdog ends the whole process where it is
            exceeded, so it has to be larger than what anybody waits for a broadcast. With gloo a
            broadcast that nobody joined occupies memory and a thread for so long.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        name: str,
        world_size: int,
        backend: str,
        timeout_s: float,
        operation_s: float,
    ) -> None:
        self.name = name
        self._rendezvous = rendezvous
        self._left = threading.Event()
        # A broadcast of gloo's ends by its own bound at the latest. NCCL's ends by the abort; one
        # that does not is never going to.
        self._bury_s = operation_s + timeout_s if backend == "gloo" else 2 * timeout_s
        self._works: list[Any] = []
        self._sent: Future[None] | None = None
        # SGLang builds its side with the same helper, under the same prefixes.
        with _nothing_to_split():
            self._group: Any = _new_process_group_helper(
                world_size,
                0,
                [],
                Backend(backend),
                PrefixStore(name, rendezvous.member()),
                group_name=GroupName(name),
                timeout=datetime.timedelta(seconds=timeout_s),
            )[0]
        # destroy_process_group expects the entry that new_group would have made.
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}
        _set_pg_timeout(datetime.timedelta(seconds=operation_s), self._group)

    def send(self, make_payloads: MakePayloads, *, device: torch.device) -> Sending:
        """Broadcasts payload after payload to all ranks, each as soon as it is made.

        Nothing waits for the receivers in between, so that the link is never idle; they must take
        the payloads in the same order. All work happens in a thread that may be left behind: NCCL
        sets its communicator up inside the first broadcast and can block there for good.

        Args:
            make_payloads: yields the tensors of one payload after another, see `MakePayloads`.
            device: where the tensors are. On a GPU the copies are made on the caller's stream, so
                they come after what it has queued, and what it queues later comes after them.
        """
        sending = Sending()
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def run() -> None:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                self._send(make_payloads, sending, stream is not None)

        sending.done = self._sent = in_thread(run, "torchrl_sglang-broadcast", exit_waits_s=LEFT_S)
        return sending

    def _send(self, make_payloads: MakePayloads, sending: Sending, on_gpu: bool) -> None:
        works = self._works = []

        def after(index: int) -> None:
            """Lets a payload's memory be written again: what follows waits until it was sent."""
            sending.at = index
            if on_gpu:
                works[index].wait()  # holds the stream, not this thread
            else:
                self._finish(works[index])
            sending.at = len(works)

        try:
            for tensors in make_payloads(after):
                for tensor in tensors:
                    self._check_not_left()
                    work = self._start(tensor)
                works.append(work)
                sending.at = len(works)
            if on_gpu and works:
                works[-1].wait()
            for sending.at, work in enumerate(works):
                self._finish(work)
        finally:
            work = None  # an error's traceback keeps this frame; see _bury for why that matters

    def _start(self, tensor: torch.Tensor) -> Any:
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        with on_the_wire():
            return self._group.broadcast([tensor], options)

    def _finish(self, work: Any) -> None:
        """Waits for a broadcast, unless the group is left meanwhile."""
        with on_the_wire():
            while not work.is_completed():
                if self._left.is_set():
                    work.wait(datetime.timedelta(seconds=LEAVE_S))
                    self._check_not_left()
                time.sleep(POLL_S)
            work.wait()

    def _check_not_left(self) -> None:
        if self._left.is_set():
            raise RuntimeError("the group was left while a broadcast was under way")

    def close(self, *, broken: bool) -> None:
        """Leaves the group; harmless twice.

        Args:
            broken: a broadcast may be under way that others never joined.
        """
        if self._left.is_set():
            return
        self._left.set()
        self._rendezvous.close()
        if broken:
            in_thread(self._bury, "torchrl_sglang-bury")
        else:
            self._end()

    def _bury(self) -> None:
        """Ends a group that others may never have joined, from a thread that may be left behind.

        An abort while the broadcast's thread waits would leave that thread waiting for good. And
        Gloo's destructor waits for a broadcast that is still under way, and was seen to stall other
        threads while it does: nobody may drop the last reference before the broadcast has run into
        its own time-out. A group that outlives even that is never dropped.
        """
        if self._sent is not None:
            wait([self._sent], LEFT_S)
        self._group.abort()
        deadline = time.monotonic() + self._bury_s
        while not all(work.is_completed() for work in self._works):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        self._end()

    def _end(self) -> None:
        self._works.clear()  # the same list that an error's traceback may keep
        group, self._group = self._group, None
        destroy_process_group(group)


@contextlib.contextmanager
def _nothing_to_split() -> Iterator[None]:
    """Keeps a new group from being split off the trainer's own.

    Where ``init_process_group`` was given a ``device_id``, torch takes every new group for a part
    of the default one, which the servers are not in.
    """
    default = _get_default_group() if is_initialized() else None
    bound = getattr(default, "bound_device_id", None)
    if default is None or bound is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


# Given a function that returns (or, on a GPU, holds the stream) until payload number so and so was
# sent, yields the tensors of one payload after another.
MakePayloads = Callable[[Callable[[int], None]], Iterable[Sequence[torch.Tensor]]]


class Sending:
    """Payloads on their way.

    Attributes:
        done: finished when all were sent; holds the error if one was not.
        at: number of the payload that is being made or waited for.
    """

    def __init__(self) -> None:
        self.done: Future[None] = Future()
        self.at = 0


class WireError(RuntimeError):
    """A broadcast failed: another rank is gone, or this one left."""


@contextlib.contextmanager
def on_the_wire() -> Iterator[None]:
    """Tells what the collective raises from what goes wrong while a payload is made."""
    try:
        yield
    except RuntimeError as error:
        raise WireError(str(error)) from error
