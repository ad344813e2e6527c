"""Sends generation requests over HTTP: all at once, over one pool of connections."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import orjson
from aiohttp.abc import AbstractStreamWriter

from ..config import Timeouts
from ..errors import (
    ConnectError,
    InputError,
    RequestRefusedError,
    RequestTimeoutError,
    ServerFailedError,
    SGLangError,
    UnsupportedOptionError,
)
from ..servers.gate import UpdateGate
from ..servers.http import backoff_s, bearer, normalise_url, refusal
from .admission import Admission, Ticket
from .bounds import CallBounds
from .completion import Completion
from .parse import Group, never_ran, parse_completions
from .request import GenerateRequest, passes_router
from .room import fitted_to_refusal
from .two_parts import TwoParts, both

DESCRIPTORS_KEPT_FREE = 256
ABORTED = 499  # what SGLang 0.5.17 answers for a request that was aborted while it waited


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that are sent together.

    Attributes:
        requests: in the order in which completions come back.
        admission: lets every attempt through the gate, with the salt of the present weights.
        within_s: bound on the whole.
        seeded: every sample needs a seed of its own, see `GenerateRequest.bodies`.
        workers: servers behind the router, for what it does not pass on; empty without a router.
        positions: each request's index in its caller's own batch; None: as they are.
        arrive: called with the completions of each request as soon as it is finished.
        adapters_in_use: keeps what they name loaded while the batch lives.
        two_parts: how servers without a tokenizer serve ``min_new_tokens``; None: they have one.
    """

    requests: Sequence[GenerateRequest]
    admission: Admission
    within_s: float
    seeded: bool = False
    workers: tuple[str, ...] = ()
    positions: Sequence[int] | None = None
    arrive: Callable[[list[Completion]], None] | None = None
    adapters_in_use: object = None
    two_parts: TwoParts | None = None

    def position(self, index: int) -> int:
        """Where a request stands in its caller's own batch."""
        return index if self.positions is None else self.positions[index]


class DataClient:
    """Sends generation requests. Lives on one event loop.

    Args:
        url: router or server.
        api_key: its key.
        timeouts: bounds on waiting.
        calls: those under way on the same event loop.
    """

    def __init__(
        self, url: str, *, api_key: str | None, timeouts: Timeouts, calls: CallBounds
    ) -> None:
        self._base = normalise_url(url)
        self._headers = {**bearer(api_key), "Content-Type": "application/json"}
        self._timeouts = timeouts
        self._calls = calls
        self._session: aiohttp.ClientSession | None = None
        # By a request's id: the ids under which its present attempt was sent.
        self._sent_rids: dict[str, tuple[str, ...]] = {}
        self._turn = itertools.count()  # servers take turns where no router spreads requests

    async def generate_all(self, batch: Batch) -> list[list[Completion]]:
        """The completions of each request, in the order of the requests.

        Raises:
            RequestTimeoutError: not all answered within ``Timeouts.request_s``, or servers stay
                paused.
            ServiceBrokenError: a push failed before all were answered.
            ConnectError: what this process had started is dead, and stays so.
            ServiceError: the first request that failed, with a note on which prompt it was; the
                others are cancelled, which aborts them on the server.
        """
        groups: list[list[Completion]] = [[] for _ in batch.requests]

        async def keep(index: int, completions: list[Completion]) -> None:
            groups[index] = completions
            if batch.arrive is not None:
                batch.arrive(completions)

        await self._send_all(batch, keep)
        return groups

    async def generate_each(self, batch: Batch, arrive: Callable[[int, Group], None]) -> None:
        """Each request's completions or its own error; one failure leaves the others alone.

        Args:
            batch: the requests.
            arrive: called with a request's index and what it came to, as soon as that is known.
                What is not answered in time comes to `RequestTimeoutError`.

        Raises:
            ServiceBrokenError: a push failed meanwhile, which concerns all of them.
        """
        waiting = set(range(len(batch.requests)))

        async def one(index: int, request: GenerateRequest) -> None:
            group: Group
            try:
                group = await self._generate(request, batch, index)
            except SGLangError as error:
                group = error
            waiting.discard(index)
            arrive(index, group)

        try:
            await self._run_all(batch, one)
        except RequestTimeoutError as error:
            for index in sorted(waiting):
                late = RequestTimeoutError(str(error))
                late.add_note(f"prompt {batch.position(index)} of the batch")
                arrive(index, late)

    async def as_completed(self, batch: Batch) -> AsyncIterator[tuple[int, list[Completion]]]:
        """Index and completions of each request as soon as it is finished; errors as above."""
        done: asyncio.Queue[tuple[int, list[Completion]] | None] = asyncio.Queue()

        async def put(index: int, completions: list[Completion]) -> None:
            done.put_nowait((index, completions))

        async def send() -> None:
            try:
                await self._send_all(batch, put)
            finally:
                done.put_nowait(None)

        sender = asyncio.create_task(send())
        try:
            while (finished := await done.get()) is not None:
                yield finished
            await sender
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_all(
        self, batch: Batch, finished: Callable[[int, list[Completion]], Awaitable[None]]
    ) -> None:
        async def one(index: int, request: GenerateRequest) -> None:
            await finished(index, await self._generate(request, batch, index))

        await self._run_all(batch, one)

    async def _run_all(
        self, batch: Batch, one: Callable[[int, GenerateRequest], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            async with self._calls.bounded(batch.within_s), asyncio.TaskGroup() as group:
                for index, request in enumerate(batch.requests):
                    group.create_task(one(index, request))
        except RequestTimeoutError:
            raise
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"POST {self._base}/generate: not all of {len(batch.requests)} prompts were "
                f"answered within {self._timeouts.request_s:g} s (Timeouts.request_s)."
            ) from error
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _generate(
        self, request: GenerateRequest, batch: Batch, index: int
    ) -> list[Completion]:
        """One request, or two where the servers can't serve it in one."""
        parts = batch.two_parts
        if parts is None or not parts.apply(request):
            return await self._sent(request, batch, index)
        first = await self._sent(parts.first(request), batch, index)

        async def whole(sample: int, begun: Completion) -> Completion:
            rest = parts.rest(request, begun, sample, batch.seeded)
            if rest is None:
                return begun
            known_as = request.rid if request.num_samples == 1 else None
            (ended,) = await self._sent(rest, batch, index, known_as)
            return both(begun, ended)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(whole(*sample)) for sample in enumerate(first)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _sent(
        self, request: GenerateRequest, batch: Batch, index: int, known_as: str | None = None
    ) -> list[Completion]:
        """One request; sent again where the connection or the server failed, never refused ones.

        Each attempt goes through the gate, up to the moment in which it is written.
        """
        clock, rid = asyncio.get_running_loop().time, request.rid
        give_up, attempt, first_rid = None, 1, known_as or request.rid
        ticket: Ticket | None = None
        try:
            while True:
                try:
                    last = ticket
                    ticket = await batch.admission.ticket(last)
                    if last is not None and ticket.epoch != last.epoch:
                        give_up = None  # what failed before may have been started again meanwhile
                    return await self._attempt(request, batch, ticket, first_rid)
                except PushBeganError:
                    continue  # nothing was sent
                except SGLangError as error:
                    give_up = give_up or clock() + self._timeouts.retry_s
                    backoff = backoff_s(attempt)
                    retriable = isinstance(error, ServerFailedError | ConnectError)
                    if not retriable or clock() + backoff > give_up:
                        at = f"prompt {batch.position(index)} of the batch, attempt {attempt}"
                        error.add_note(at)
                        raise
                if await self._calls.recovered():
                    give_up = None
                await asyncio.sleep(backoff)
                attempt += 1
                # A server aborts what begins with the id that it is given, and the attempt before
                # is aborted once its connection is seen to be gone: maybe after this one was sent.
                request = replace(request, rid=f"~{attempt}~{rid}")
        finally:
            self._sent_rids.pop(first_rid, None)

    async def _attempt(
        self, request: GenerateRequest, batch: Batch, ticket: Ticket, first_rid: str
    ) -> list[Completion]:
        """One attempt; where the server counted more tokens than fit, one that asks for fewer."""
        fields = request.bodies(batch.seeded, ticket.cache_salt)
        self._sent_rids[first_rid] = _rids(fields, request)
        body = Body(fields, batch.admission.gate, ticket.epoch)
        url = self._destination(request, fields, batch) + "/generate"
        try:
            completions = await self._post(url, request, body)
        except RequestRefusedError as error:
            smaller = fitted_to_refusal(request, error.body)
            if smaller is None:
                raise
            return await self._attempt(smaller, batch, ticket, first_rid)
        batch.admission.note(ticket, completions)
        return completions

    def sent_rids(self, rid: str) -> Sequence[str]:
        """The ids under which a request is known to a server now.

        Raises:
            UnsupportedOptionError: it has samples, to which the server gave ids of its own.
        """
        rids = self._sent_rids.get(rid, (rid,))
        if not rids:
            raise UnsupportedOptionError(
                f"request {rid} has several samples, whose ids the server keeps to itself: they "
                "can't be aborted one by one. Cancel the call, abort everything, or send one "
                "request per sample."
            )
        return rids

    async def _post(self, url: str, request: GenerateRequest, body: Body) -> list[Completion]:
        try:
            async with self._pool().post(url, data=body) as response:
                answer = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise ConnectError(f"nothing answers at {url}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            if body.is_stale:
                raise PushBeganError from None
            raise ServerFailedError(
                f"POST {url}: the connection broke: {type(error).__name__}: {error}"
            ) from error
        if response.status == ABORTED:
            return never_ran(request)
        if response.status >= 400:
            raise refusal("POST", url, response.status, answer.decode(errors="replace"))
        return parse_completions(_json(answer, url), request)

    def _destination(self, request: GenerateRequest, body: Mapping[str, Any], batch: Batch) -> str:
        """The router, except for sessions and for what it would not pass on."""
        if request.session is not None:
            return request.session.worker_url
        if not batch.workers or passes_router(body):
            return self._base
        return batch.workers[next(self._turn) % len(batch.workers)]

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None:
            limit = _max_connections()
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect_s)
            connector = aiohttp.TCPConnector(limit=limit, limit_per_host=limit)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, headers=self._headers
            )
        return self._session

    async def close(self) -> None:
        """Closes the pool."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _rids(body: Mapping[str, Any], request: GenerateRequest) -> tuple[str, ...]:
    """The ids in a body; none where the server makes its own."""
    if isinstance(body["rid"], list):
        return tuple(body["rid"])
    return (body["rid"],) if request.num_samples == 1 else ()


def _json(answer: bytes, url: str) -> Any:
    try:
        return orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise ServerFailedError(f"POST {url}: the answer is no JSON: {answer[:200]!r}") from error


def _max_connections() -> int:
    """As many connections as the process may have files open, less some for everything else."""
    soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft_limit == resource.RLIM_INFINITY:
        return 0  # aiohttp: no limit
    return max(64, soft_limit - DESCRIPTORS_KEPT_FREE)


class PushBeganError(Exception):
    """A request was not written, since a push began after it was made; it is made anew."""


class Body(aiohttp.BytesPayload):
    """A request's body, which is written in the epoch in which it was made, or not at all.

    The gate is asked here because a request may wait long for a connection.

    Raises:
        InputError: something that JSON can't say.
    """

    def __init__(self, fields: Mapping[str, Any], gate: UpdateGate, epoch: int) -> None:
        super().__init__(_encoded(fields))
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


def _encoded(fields: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields)
    except orjson.JSONEncodeError as error:
        raise InputError(f"request {fields.get('rid')!r:.100} can't be sent: {error}.") from error
