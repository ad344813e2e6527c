"""SGLang's own code, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torchrl_sglang
from helpers import sglang_layout

CPU_FOLDER = Path(torchrl_sglang.__file__).parent / "launch" / "cpu"

SCRIPT = sglang_layout.__file__


def by_sglang(action: str, *paths: Path) -> Any:
    """What SGLang's own code answers, in a process of its own."""
    command = [sys.executable, "-P", str(SCRIPT), str(CPU_FOLDER), action, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200.0, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
