"""The body of a request, which asks the gate once more before it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp.abc import AbstractStreamWriter

from .errors import InputError
from .gate import UpdateGate


class PushBeganError(Exception):
    """A request was not written, since a push began after it was made; it is made anew."""


class Body(aiohttp.BytesPayload):
    """A request's body, which is written in the epoch in which it was made, or not at all.

    The gate is asked here because a request may wait long for a connection.

    Raises:
        InputError: something that JSON can't say.
    """

    def __init__(self, fields: Mapping[str, Any], gate: UpdateGate, epoch: int) -> None:
        super().__init__(_json(fields))
        self.is_stale = False
        self._gate = gate
        self._epoch = epoch

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Writes the body; aiohttp calls this before 3.12, the other one since.

        Raises:
            PushBeganError: a push began since the body was made; nothing was written.
        """
        with self._posting():
            await super().write(writer)

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        """Same as `write`."""
        with self._posting():
            await super().write_with_length(writer, content_length)

    @contextlib.contextmanager
    def _posting(self) -> Iterator[None]:
        if not self._gate.start_posting(self._epoch):
            self.is_stale = True
            raise PushBeganError
        try:
            yield
        finally:
            self._gate.end_posting()


def _json(fields: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields)
    except orjson.JSONEncodeError as error:
        raise InputError(f"request {fields.get('rid')!r:.100} can't be sent: {error}.") from error
