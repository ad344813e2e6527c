"""Runs ``sglang_router.launch_router`` without what only its mini load balancer needs.

Started by path under the engine's interpreter, which needs no ``torchrl_sglang``. The router itself
is a compiled module. Its launcher imports the mini load balancer in any case, and with it all of
SGLang: ten seconds and 500 MB, at every start. Here that is imported once it is asked for.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import types

MINI_LB = "sglang_router.mini_lb"


def mini_load_balancer(router_args: object) -> object:
    """The real one."""
    del sys.modules[MINI_LB]
    return importlib.import_module(MINI_LB).MiniLoadBalancer(router_args)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not for others (-P needs Python 3.11)
    later = types.ModuleType(MINI_LB)
    later.MiniLoadBalancer = mini_load_balancer  # type: ignore[attr-defined]
    sys.modules[MINI_LB] = later
    runpy.run_module("sglang_router.launch_router", run_name="__main__", alter_sys=True)
