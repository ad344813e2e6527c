"""Holds what a service has in one process alone: threads, sockets and child processes."""

from __future__ import annotations

import os

from ..generate.generator import Generator
from ..servers.members import Servers
from ..weights.direct import DirectSync


class Local:
    """Everything of a service that must not travel to another process.

    Args:
        servers: as this process knows them.
        run_name: see `Generator`.

    Attributes:
        servers: as given.
        generator: generates with them.
        sync: pushes weights to them by a script's own call.
    """

    def __init__(self, servers: Servers, run_name: str | None = None) -> None:
        self.servers = servers
        self.generator = Generator(servers, run_name)
        self.sync = DirectSync(servers)
        self._pid = os.getpid()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked copy of another process's."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Ends threads and children; harmless twice and in a forked copy."""
        if self.foreign:
            return
        self.servers.gate.close()
        self.generator.sessions.close()
        fleet, self.servers.fleet = self.servers.fleet, None
        self.generator.close()
        if fleet is not None:
            fleet.stop()
