"""Runs ``sglang.launch_server`` with the CPU stand-ins installed.

Started by path (``python -P .../cpu/serve.py --model-path ...``) under the engine's interpreter,
so that the engine environment needs no ``torchrl_sglang``. The processes that SGLang spawns run
this file again as ``__mp_main__`` and get the stand-ins the same way; no other process does.
"""

from __future__ import annotations

import importlib.util
import os
import runpy


def install_standins() -> None:
    """Loads ``standins.py`` from beside this file, without touching ``sys.path``."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "standins.py")
    spec = importlib.util.spec_from_file_location("_torchrl_sglang_standins", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


install_standins()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
