"""Has SGLang fork its other processes from its first one, where nothing speaks against it.

None of them then has to import all of SGLang again, for 15 seconds of a core each, and they share
its memory. The first one has opened no socket and computed nothing in parallel by then.
"""

from __future__ import annotations

import multiprocessing
import sys

import torch


def may_fork() -> bool:
    """Whether no process needs an accelerator, which a forked one can't use, and one thread forks.

    Data-parallel replicas are started by a thread each, and those of a NUMA node through a script.
    """
    given = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
    alone = given.get("--dp-size", "1") == "1" and "--numa-node" not in given
    return alone and not torch.accelerator.is_available()


def install() -> None:
    """Has ``multiprocessing`` fork, whatever SGLang sets."""
    if may_fork():
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.set_start_method = lambda method, force=False: None
