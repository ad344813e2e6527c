"""Who counts as being on this machine."""

from __future__ import annotations

import socket

import pytest

from helpers.worker_infos import ELSEWHERE, HERE
from torchrl_sglang.servers.hosts import is_here


def own_address() -> str:
    """An address of this machine that is no loopback one, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE.split("/")[2].split(":")[0], 9))  # sends nothing
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


@pytest.mark.parametrize(
    ("url", "here"),
    [
        (HERE, True),
        ("http://localhost:30000", True),
        ("http://[::1]:30000", True),
        (f"http://{own_address()}:30000", True),
        (ELSEWHERE, False),
        ("http://there.invalid:1", False),
    ],
)
def test_is_here(url: str, here: bool) -> None:
    assert is_here(url) is here
