"""The trainer's side of the collective. The only module that uses ``torch.distributed``."""

from __future__ import annotations

import datetime
import socket
import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import (
    Backend,
    BroadcastOptions,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
    destroy_process_group,
)

from ..errors import PortTakenError

POLL_S = 0.0002
LEAVE_S = 1.0  # a timed wait of this length frees a broadcast that nobody joined


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
        """A connection of its own, so that closing the store frees a thread that waits in it."""
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
    """

    def __init__(
        self, rendezvous: Rendezvous, *, name: str, world_size: int, backend: str, timeout_s: float
    ) -> None:
        self.name = name
        self._rendezvous = rendezvous
        self._left = threading.Event()
        self._timeout_s = timeout_s
        self._work: Any = None
        self._sent: Future[None] | None = None
        # SGLang builds its side with the same helper, under the same prefixes.
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

    def broadcast(self, tensor: torch.Tensor) -> Future[None]:
        """Sends one tensor to all ranks, from a thread that may be left behind.

        NCCL sets its communicator up inside the first broadcast and can block there for good, so
        the calling thread never enters it.
        """
        self._sent = in_thread(lambda: self._broadcast(tensor), "torchrl_sglang-broadcast")
        return self._sent

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        work = self._work = self._group.broadcast([tensor], options)
        try:
            while not work.is_completed():
                if self._left.is_set():
                    work.wait(datetime.timedelta(seconds=LEAVE_S))
                    return
                time.sleep(POLL_S)
            work.wait()
        finally:
            del work  # an error's traceback keeps this frame; see _bury for why that matters

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
            group, self._group, self._work = self._group, None, None
            destroy_process_group(group)

    def _bury(self) -> None:
        """Ends a group that others may never have joined, from a thread that may be left behind.

        An abort while the broadcast's thread waits would leave that thread waiting for good. And
        Gloo's destructor waits for a broadcast that is still under way, and was seen to stall other
        threads while it does: nobody may drop the last reference before the broadcast has run into
        its own time-out. A group that outlives even that is never dropped.
        """
        if self._sent is not None:
            wait([self._sent], 5 * LEAVE_S)
        self._group.abort()
        deadline = time.monotonic() + 2 * self._timeout_s
        while self._work is not None and not self._work.is_completed():
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        group, self._group, self._work = self._group, None, None
        destroy_process_group(group)


def in_thread(call: Any, name: str) -> Future[Any]:
    """Runs a call in a daemon thread of its own, which nothing waits for at exit."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
