"""A fresh interpreter that has run what a CPU server runs first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torchrl_sglang.launch.commands import CPU_SERVE

# As a process that SGLang spawns does it: the file runs again, as __mp_main__.
SETUP = f"""
import importlib, runpy, sys
def refused(call, kind):
    try:
        call()
    except kind as error:
        return type(error).__name__ + ": " + str(error)
    raise AssertionError("nothing was raised")
sys.path[:0] = sys.argv[1:]
before = list(sys.path), list(sys.meta_path)
runpy.run_path({str(CPU_SERVE)!r}, run_name="__mp_main__")
"""


def run(code: str, *folders: Path, before: str = "", site_packages: bool = False) -> str:
    """What a fresh interpreter prints that has run serve.py between ``before`` and ``code``."""
    flags = ["-I"] if site_packages else ["-I", "-S"]
    done = subprocess.run(
        [sys.executable, *flags, "-c", before + SETUP + code, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
