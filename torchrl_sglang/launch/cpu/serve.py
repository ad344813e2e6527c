"""Runs ``sglang.launch_server`` with what it needs on a CPU-only machine.

Started by path (``python -P .../cpu/serve.py --model-path ...``) under the engine's interpreter,
so that the engine environment needs no ``torchrl_sglang``. SGLang's other processes are forked from
this one where they may be (`forking`). Where they are spawned they run this file again as
``__mp_main__`` and get the same; no other process does.
"""

from __future__ import annotations

import importlib.util
import os
import runpy


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

if __name__ == "__main__":
    install("forking")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
