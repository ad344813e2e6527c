"""Admits the attempts of a call through the gate, each with the salt of the present weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..servers.gate import UpdateGate
from ..servers.http import retried
from .completion import Completion


@dataclass(frozen=True, eq=False)
class Ticket:
    """What an attempt is made with.

    Attributes:
        epoch: of the gate; an attempt is posted in it, or not at all.
        cache_salt: separates prefixes cached under different weights; None sends none.
    """

    epoch: int
    cache_salt: str | None


class Admission:
    """Hands tickets to the attempts of one call. Made in any thread, used on one event loop.

    The requests of a call share a ticket for as long as it is good: asking what the servers run
    can take a request of its own.

    Args:
        gate: holds the call while weights change.
        version: the version of the weights that the servers run; may ask them, and block.
        salt: the salt of a version; None: the servers take none.
        timeout_s: how long a push is waited for now.
        retry_s: how long servers are asked now that fail to answer; for later tickets once, as
            whoever asks tries again himself.
        noticed: called with a version that the servers run and the salt does not name.

    Raises:
        ServiceBrokenError, ServiceClosedError, RequestTimeoutError: see the gate.
        ServiceError: the servers did not tell what they run.
    """

    def __init__(
        self,
        gate: UpdateGate,
        version: Callable[[], str],
        salt: Callable[[str], str] | None,
        timeout_s: float,
        retry_s: float,
        noticed: Callable[[str], None],
    ) -> None:
        self.gate = gate
        self._version = version
        self._salt_of = salt
        self._noticed = noticed
        self._renewing = asyncio.Lock()
        epoch = gate.wait_until_open(timeout_s)  # before the salt: a push in between makes it stale
        self._ticket = Ticket(epoch, retried(self._salt, retry_s))

    def _salt(self) -> str | None:
        return None if self._salt_of is None else self._salt_of(self._version())

    async def ticket(self, used: Ticket | None = None) -> Ticket:
        """A ticket that is good now; waits while weights change.

        Args:
            used: the ticket of the attempt before. It is not given again: another process may have
                pushed since.

        Raises:
            as when it is made, but unbounded: whoever awaits it bounds it.
        """
        if self._is_good(used):
            return self._ticket
        async with self._renewing:
            while not self._is_good(used):
                epoch = await self.gate.entered()
                self._ticket = Ticket(epoch, await asyncio.to_thread(self._salt))
            return self._ticket

    def _is_good(self, used: Ticket | None) -> bool:
        return self._ticket is not used and self.gate.is_open(self._ticket.epoch)

    def note(self, ticket: Ticket, completions: Sequence[Completion]) -> None:
        """Takes note of what sampled the completions of an attempt."""
        version = completions[-1].weight_version
        if version is None:
            return
        if self._salt_of is None or ticket.cache_salt != self._salt_of(version):
            self._noticed(version)
