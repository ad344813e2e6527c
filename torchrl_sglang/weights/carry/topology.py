"""Numbers the ranks of servers in a collective, and refuses those that none can reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import TopologyError
from ...servers.info import WorkerInfo


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who is who in the collective; the trainer is rank 0.

    Attributes:
        world_size: the trainer and every rank of every server.
        offsets: first rank of each server.
    """

    world_size: int
    offsets: tuple[int, ...]


def plan_ranks(workers: Sequence[WorkerInfo]) -> Ranks:
    """Numbers the ranks of all servers.

    Raises:
        TopologyError: a server has data- or pipeline-parallel ranks, which a broadcast can't reach.
    """
    offsets, next_rank = [], 1
    for server in workers:
        check_topology(server)
        offsets.append(next_rank)
        next_rank += server.tp_size
    return Ranks(world_size=next_rank, offsets=tuple(offsets))


def count_ranks(workers: Sequence[WorkerInfo]) -> int:
    """Processes that hold weights, in all servers together."""
    return sum(w.tp_size * w.pp_size * w.num_copies for w in workers)


def check_topology(server: WorkerInfo) -> None:
    """Raises `TopologyError` where SGLang refuses a broadcast, or hangs in it."""
    if server.pp_size > 1:
        raise TopologyError(
            f"{server.url} runs with pp_size={server.pp_size}: a weight broadcast deadlocks there. "
            "Use tp_size instead, or more replicas, or WeightSyncConfig(method='disk')."
        )
    if server.num_copies > 1:
        raise TopologyError(
            f"{server.url} runs with dp_size={server.dp_size}: SGLang takes no weight broadcast "
            "there. Use num_replicas instead of dp_size, or WeightSyncConfig(method='disk')."
        )
