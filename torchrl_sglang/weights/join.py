"""Trainer and servers meet in one group."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from ..client import ControlClient
from ..info import WorkerInfo
from .collective import Rendezvous, TrainerGroup, in_thread
from .plan import plan_ranks
from .watch import watch


def join_group(
    workers: Sequence[ControlClient],
    infos: Sequence[WorkerInfo],
    *,
    address: str,
    port: int | None,
    timeout_s: float,
) -> TrainerGroup:
    """Joins this process and all ranks of all servers into a new group.

    Args:
        workers: the servers.
        infos: what each says of itself, in the same order.
        address: address at which they reach this process.
        port: port of the rendezvous; None for a free one.
        timeout_s: bound on all of it.

    Raises:
        TopologyError: a server can't take part.
        PortTakenError: the port is in use.
        PushError: a server refused or did not come; the others are freed.
    """
    ranks = plan_ranks(infos)
    backend = "gloo" if infos[0].device == "cpu" else "nccl"
    name = f"torchrl_sglang-{uuid.uuid4().hex[:12]}"
    rendezvous = Rendezvous(address, port, timeout_s)

    def invite(worker: ControlClient, rank_offset: int) -> None:
        body = {
            "master_address": rendezvous.address,
            "master_port": rendezvous.port,
            "rank_offset": rank_offset,
            "world_size": ranks.world_size,
            "group_name": name,
            "backend": backend,
        }
        worker.post("/init_weights_update_group", body, timeout_s=timeout_s)

    def join() -> TrainerGroup:
        return TrainerGroup(
            rendezvous,
            name=name,
            world_size=ranks.world_size,
            backend=backend,
            timeout_s=timeout_s,
        )

    answers = {
        in_thread(lambda w=w, o=o: invite(w, o), "torchrl_sglang-invite"): w.url
        for w, o in zip(workers, ranks.offsets, strict=True)
    }
    joined = in_thread(join, "torchrl_sglang-join")
    try:
        watch({**answers, joined: None}, step="init", timeout_s=timeout_s)
    except BaseException:
        rendezvous.close()
        raise
    group: TrainerGroup = joined.result()
    return group
