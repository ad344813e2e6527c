"""Tells which servers are on this machine. Needs only the standard library."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def is_here(url: str) -> bool:
    """Whether a URL's host is this machine: a loopback address, or one of its own.

    A tunnel or a container behind such an address is taken for this machine too.
    """
    host = urlsplit(url).hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)  # works with this machine's addresses only
    except OSError:
        return False
    return True


def local_address(url: str) -> str:
    """Address of the interface over which this machine reaches ``url``."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
