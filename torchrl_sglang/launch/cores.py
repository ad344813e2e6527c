"""Chooses the cores that the CPU servers' ranks compute on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")

Cores = tuple[int, ...]


def usable_cores(allowed: Iterable[int], cpus: Path = CPUS) -> Cores:
    """One logical core per physical one, those of a NUMA node beside each other.

    Args:
        allowed: the logical cores that this process may use.
        cpus: where the kernel says how they belong together; where it doesn't, all are usable.
    """
    seen: set[str] = set()
    found: list[tuple[int, int]] = []
    for core in sorted(allowed):
        siblings = str(core)
        with suppress(OSError):
            siblings = (cpus / f"cpu{core}/topology/thread_siblings_list").read_text().strip()
        if siblings not in seen:
            found.append((_node_of(cpus / f"cpu{core}"), core))
        seen.add(siblings)
    return tuple(core for _, core in sorted(found))


def _node_of(cpu: Path) -> int:
    names = (path.name.removeprefix("node") for path in cpu.glob("node[0-9]*"))
    return min(map(int, names), default=0)


def divide_cores(
    cores: Sequence[int], num_replicas: int, num_ranks: int
) -> list[tuple[Cores, ...]]:
    """The cores of each rank of each replica.

    Threads of one computation wait for each other at every step. Where there are more of them than
    cores, one always waits for its turn and all others spin: a 2-core machine with two servers of
    two threads generates ten times slower than with one thread each. So every rank has cores of its
    own, and one is left to the router, the HTTP servers and the trainer. With more ranks than cores
    each has one, which it shares with others.

    Args:
        cores: what there is.
        num_replicas: servers that compute at the same time.
        num_ranks: processes of each that compute.
    """
    slots = num_replicas * num_ranks
    size = max(1, (len(cores) - 1) // slots)
    shares = [
        tuple(cores[(slot * size + i) % len(cores)] for i in range(size)) for slot in range(slots)
    ]
    return [tuple(shares[i : i + num_ranks]) for i in range(0, slots, num_ranks)]


def binding(ranks: Sequence[Cores]) -> str:
    """``SGLANG_CPU_OMP_THREADS_BIND`` for ranks on these cores: ``"0,1|2,3"``."""
    return "|".join(",".join(map(str, cores)) for cores in ranks)
