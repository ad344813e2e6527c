"""Runs ``sglang.launch_server`` with what it needs on a CPU-only machine.

Started by path (``python -P .../cpu/serve.py --model-path ...``) under the engine's interpreter,
so that the engine environment needs no ``torchrl_sglang``. SGLang's other processes are forked from
this one: none of them has to import all of SGLang again, for 15 seconds of a core each, and they
share its memory. It has opened no socket and computed nothing in parallel by then. Where that is
not so they are spawned, as by SGLang itself, and run this file again as ``__mp_main__``.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import sys


def install(name: str) -> None:
    """Loads a module from beside this file, without touching ``sys.path``, and installs it."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec = importlib.util.spec_from_file_location("_torchrl_sglang_" + name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


install("standins")  # what is imported but not there
install("pinning")  # what is called but can't be
install("synchronizing")


def may_fork() -> bool:
    """Whether no process needs an accelerator, which a forked one can't use, and one thread forks.

    Data-parallel replicas are started by a thread each, and those of a NUMA node through a script.
    """
    import torch

    given = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
    alone = given.get("--dp-size", "1") == "1" and "--numa-node" not in given
    return alone and not torch.accelerator.is_available()


def fork() -> None:
    """Has ``multiprocessing`` fork, whatever SGLang sets."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None


if __name__ == "__main__":
    if may_fork():
        fork()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
