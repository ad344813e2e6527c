"""Carries weights over a collective: trainer and all ranks of all servers in one group."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from ...config import SyncLayout, Timeouts
from ...errors import PushError, TopologyError
from ...servers.control import ControlClient
from ...servers.threads import in_thread
from ...servers.together import tell_all, watch
from ..buckets import FLATTENED, Bucket
from ..result import StepTimer
from ..targets import Targets
from .carrier import Carrier
from .group import Rendezvous, TrainerGroup
from .payload import Payloads
from .topology import plan_ranks

# What SGLang's models pass over in a checkpoint: an announced tensor that changes nothing.
PROBE_NAME = "model.layers.0.self_attn.rotary_emb.inv_freq"
# A server that does not answer shall be named before the trainer's end runs out of time too.
JOIN_LAG_S = 2.0
STORE_RETRY_S = 5.0  # how long torch pauses at most between two tries to reach a store
# Of one broadcast over NCCL: never reached, since torch ends the whole process when it is.
NCCL_OPERATION_S = 7 * 24 * 3600.0
CLEAN_UP_S = 2.0  # how long a server has for what nobody waits for
NCCL_HELP = (
    "Trainer and server must agree on NCCL_CUMEM_ENABLE: a server that was started by hand sets 0 "
    "for itself, so start it with NCCL_CUMEM_ENABLE=1 in its environment, or the trainer with "
    "NCCL_CUMEM_ENABLE=0. NCCL_SOCKET_IFNAME, NCCL_IB_DISABLE and NCCL_P2P_DISABLE must fit too."
)


class Broadcast(Carrier):
    """Carries weights to servers over gloo (CPU) or NCCL (GPU).

    Args:
        targets: the servers.
        address: address at which they reach this process.
        port: port of the rendezvous; None for a free one.
        device: device that sends.
        layout: how buckets travel, see `Payloads`.
        timeouts: bounds on waiting.

    Raises:
        TopologyError: a server can't take part.
    """

    method = "broadcast"
    order = "announce"

    def __init__(
        self,
        targets: Targets,
        *,
        address: str,
        port: int | None,
        device: torch.device,
        layout: SyncLayout,
        timeouts: Timeouts,
    ) -> None:
        super().__init__()
        self._targets = targets
        self._address = address
        self._port = port
        self._device = device
        self._layout = layout
        self._timeouts = timeouts
        self._ranks = plan_ranks(targets.infos)
        self._backend = "gloo" if targets.infos[0].device == "cpu" else "nccl"
        if self._backend == "nccl" and device.type != "cuda":
            raise TopologyError(
                f"the servers are on GPUs, so NCCL has to send, which needs a GPU here too; the "
                f"weight sync was given device={str(device)!r}. Name one with device='cuda:0', or "
                "push with WeightSyncConfig(method='disk')."
            )
        self._group: TrainerGroup | None = None

    @property
    def is_connected(self) -> bool:
        """Whether there is a group to send in."""
        return self._group is not None

    # Joining

    def connect(self) -> None:
        """Joins this process and all ranks of all servers into a new group.

        Raises:
            PortTakenError: the port is in use.
            PushError: a server refused or did not come; the others are freed.
        """
        if self._backend == "nccl":
            self._targets.wait_for_gpus("init")  # one that is stuck would make others wait for it
        name = f"torchrl_sglang-{uuid.uuid4().hex[:12]}"
        timeout_s = self._timeouts.group_s
        rendezvous = Rendezvous(self._address, self._port, timeout_s + JOIN_LAG_S)
        invited = self._invite(rendezvous, name)
        joined = in_thread(
            lambda: self._join(rendezvous, name),
            "torchrl_sglang-join",
            # Its bounds count from where it stands, and a store that is gone is tried for twice.
            exit_waits_s=2 * (timeout_s + JOIN_LAG_S) + STORE_RETRY_S,
        )
        try:
            watch({**invited, joined: None}, step="init", timeout_s=timeout_s)
        except BaseException:
            rendezvous.close()
            joined.add_done_callback(_leave)  # it may have joined all the same, or still do so
            self._forget(name)
            self._targets.close()
            raise
        self._group = joined.result()
        if self._backend == "nccl":
            self._first_broadcast()

    def _join(self, rendezvous: Rendezvous, name: str) -> TrainerGroup:
        return TrainerGroup(
            rendezvous,
            name=name,
            world_size=self._ranks.world_size,
            backend=self._backend,
            timeout_s=self._timeouts.group_s + JOIN_LAG_S,
            operation_s=operation_s(self._backend, self._timeouts),
        )

    def _invite(self, rendezvous: Rendezvous, name: str) -> dict[Future[Any], str | None]:
        offsets = {
            server.url: offset
            for server, offset in zip(self._targets.workers, self._ranks.offsets, strict=True)
        }

        def invite(server: ControlClient) -> None:
            body = {
                "master_address": rendezvous.address,
                "master_port": rendezvous.port,
                "rank_offset": offsets[server.url],
                "world_size": self._ranks.world_size,
                "group_name": name,
                "backend": self._backend,
            }
            server.join(body, self._timeouts.group_s)

        return self._targets.ask(invite)

    def _first_broadcast(self) -> None:
        """One element to every rank: NCCL connects only now, and can fail or hang in it.

        Raises:
            PushError: it did not arrive; says which settings to look at.
        """
        assert self._group is not None
        body = Bucket.probe(PROBE_NAME).announcement(self._group.name)
        body["load_format"] = None
        one = torch.zeros(1, dtype=torch.float32, device=self._device)
        timeout_s = self._timeouts.probe_s
        try:
            self._targets.begin()
            sending = self._group.send(lambda after: iter([[one]]), device=self._device)
            answers = self._targets.ask(partial(_announce, body, timeout_s))
            watch({**answers, sending.done: None}, step="init", timeout_s=timeout_s)
            self._targets.end()
        except BaseException as error:
            self.drop()
            self._tell(ControlClient.end)
            if not isinstance(error, PushError):
                raise
            said = f"the first broadcast over NCCL did not get through: {error}. {NCCL_HELP}"
            raise type(error)(said, step="init", engine=error.engine) from error

    # Sending

    def transfer(
        self,
        buckets: list[Bucket],
        weights: Mapping[str, torch.Tensor],
        timer: StepTimer,
    ) -> str:
        """Sends all buckets and returns once every server has loaded them.

        The trainer's end sends bucket after bucket without waiting. Each server is told of one
        bucket at a time, since two announcements could overtake each other. Whichever end fails
        first ends the other.

        Returns:
            The layout that was used.

        Raises:
            PushError: names the bucket, and the engine unless it was the trainer's end.
        """
        group = self._group
        if group is None:
            raise PushError("the group is gone", step="transfer", bucket=0)
        payloads = Payloads(buckets, weights, device=self._device, layout=self._layout)
        with timer.measure("transfer"):
            sending = group.send(payloads, device=self._device)
            for index, bucket in enumerate(buckets):
                timeout_s = self._timeouts.bucket_s(bucket.num_bytes)
                body = bucket.announcement(group.name)
                body["load_format"] = FLATTENED if payloads.flattened else None
                watch(
                    self._targets.ask(partial(_announce, body, timeout_s)),
                    step="transfer",
                    timeout_s=timeout_s,
                    bucket=index,
                    beside=sending.done,
                    bucket_beside=lambda: sending.at,
                )
            # Over NCCL servers acknowledge what they have queued: all of it may be on its way.
            total = sum(bucket.num_bytes for bucket in buckets)
            watch(
                {sending.done: None},
                step="transfer",
                timeout_s=self._timeouts.bucket_s(total),
                bucket=len(buckets) - 1,
                beside=sending.done,
                bucket_beside=lambda: sending.at,
            )
        return "flattened" if payloads.flattened else "tensors"

    # Leaving

    def drop(self) -> None:
        """Leaves the group at once; after a failure it can't be trusted. Harmless twice."""
        group, self._group = self._group, None
        if group is not None:
            group.close(broken=True)
            self._forget(group.name)

    def close(self) -> None:
        """Leaves the group, on both sides; harmless twice."""
        group, self._group = self._group, None
        if group is None:
            return
        name, timeout_s = group.name, self._timeouts.step_s
        # NCCL ends a communicator only when all ranks do, so no side may wait for another.
        ends = self._targets.ask(lambda server: server.leave(name, timeout_s))
        left = in_thread(
            lambda: group.close(broken=False), "torchrl_sglang-leave", exit_waits_s=timeout_s
        )
        ends[left] = None
        with contextlib.suppress(PushError):  # a server that is gone has left already
            watch(ends, step="close", timeout_s=timeout_s)

    def _forget(self, name: str) -> None:
        """Has the servers give back what a group took that came to nothing, if they can.

        Over gloo only: NCCL ends a communicator when all ranks do, so a server that is told to can
        hang in it, and then takes no other group.
        """
        if self._backend == "gloo":
            self._tell(ControlClient.leave, name)

    def _tell(self, order: Callable[..., None], *args: Any) -> None:
        """Gives an order to every server from threads that nothing waits for."""
        tell_all(self._targets.workers, lambda server: order(server, *args, timeout_s=CLEAN_UP_S))


def operation_s(backend: str, timeouts: Timeouts) -> float:
    """How long one broadcast may take: longer than anything that this process waits for one.

    Broadcasts are started ahead, so that one waits for the bucket before it too.
    """
    longest = 2 * timeouts.transfer_s + timeouts.group_s + timeouts.probe_s
    return longest if backend == "gloo" else max(NCCL_OPERATION_S, longest)


def _leave(joined: Future[TrainerGroup]) -> None:
    if joined.exception() is None:
        joined.result().close(broken=True)


def _announce(body: Mapping[str, Any], timeout_s: float, server: ControlClient) -> None:
    server.announce(body, timeout_s)


def sending_device(served_on: str, given: torch.device | str | int | None) -> torch.device:
    """The device that broadcasts to servers on ``served_on``: the CPU, or one GPU by its number."""
    if served_on == "cpu":
        return torch.device("cpu")
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
