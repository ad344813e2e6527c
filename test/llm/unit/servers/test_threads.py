"""A call in a thread."""

from __future__ import annotations

import sys
import threading

import pytest

from torchrl_sglang.servers.threads import in_thread


def test_a_call_in_a_thread() -> None:
    assert in_thread(lambda: 3, "torchrl_sglang-test").result(5.0) == 3
    with pytest.raises(SystemExit):
        in_thread(lambda: sys.exit(3), "torchrl_sglang-test").result(5.0)
    seen = in_thread(threading.current_thread, "torchrl_sglang-test").result(5.0)
    assert (seen.name, seen.daemon) == ("torchrl_sglang-test", True)
