"""Generates with the servers of a service: blocking, awaited, or one completion after the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from ..errors import (
    ConfigError,
    EmptyBatchError,
    InputError,
    ServiceClosedError,
    SGLangError,
)
from ..servers.control import ControlClient
from ..servers.gate import ServiceState
from ..servers.http import retried
from ..servers.lora_versions import InUse, versioned
from ..servers.members import Servers
from ..servers.together import order_all
from .admission import Admission
from .bounds import CallBounds
from .cache_salt import salt_of
from .check import check_features, check_ids
from .client import Batch, DataClient
from .completion import Completion
from .loop import BackgroundLoop, closed_meanwhile, result_of
from .parse import Group
from .request import GenerateRequest, requests_of, to_requests
from .room import check_room, fitted, longest_input
from .sampling import SamplingParams
from .seeds import own_seeds
from .sessions import SESSION_CAPACITY, SESSION_TIMEOUT_S, Session, Sessions
from .two_parts import TwoParts, check_parts


class Generator:
    """Generates with the servers behind a URL. Safe to use from several threads.

    Args:
        servers: who generates.
        run_name: keeps the cached prefixes of this run apart from those of others.

    Attributes:
        sessions: the sessions that were opened here.
    """

    def __init__(self, servers: Servers, run_name: str | None = None) -> None:
        self.sessions = Sessions()
        self._servers = servers
        self._run_name = run_name
        self._lock = threading.Lock()
        self._loop: BackgroundLoop | None = None
        self._data: DataClient | None = None
        self._closed = False

    def data_plane(self) -> tuple[BackgroundLoop, DataClient]:
        """The event loop and the connection pool on it, which the first call makes."""
        servers = self._servers
        self._check_open()
        url = servers.cluster.url  # which may have to be asked
        with self._lock:
            self._check_open()
            if self._loop is None or self._data is None:
                self._loop = BackgroundLoop("torchrl_sglang")
                calls = CallBounds(
                    servers.gate, lambda: servers.known_workers, servers.timeouts, servers
                )
                self._data = DataClient(
                    url, api_key=servers.keys.api_key, timeouts=servers.timeouts, calls=calls
                )
            return self._loop, self._data

    def _check_open(self) -> None:
        if self._closed:
            raise ServiceClosedError("the service was shut down.")

    def close(self) -> None:
        """Closes the sessions and ends the thread; harmless twice."""
        self.sessions.close()
        with self._lock:
            loop, data = self._loop, self._data
            self._loop = self._data = None
            self._closed = True
        if loop is not None and data is not None:
            # In this order: a request that is cancelled says so; one whose pool is gone does not.
            loop.close(data.close)

    def generate(
        self,
        /,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        grouped: bool = False,
        fit_context: bool = True,
        **options: Any,
    ) -> Any:
        """Completes one prompt, or many at once.

        Args:
            prompts: a text, token ids or a `GenerateRequest`; or a sequence of any of these.
            sampling_params: how to sample; not with `GenerateRequest`, which brings its own.
            input_ids: token ids, or a sequence of such, instead of ``prompts``.
            grouped: one list of completions per prompt, in the order of its samples.
            fit_context: ask for what fits into the context where ``max_new_tokens`` does not; it
                then ends with ``"length"``. False: raise `PromptTooLongError`.
            **options: sampling options, laid over ``sampling_params``.

        Returns:
            A `Completion` for one prompt, else a list of them in the order of the prompts. With
            ``n`` samples, a list in which those of one prompt follow each other; ``grouped``, a
            list of lists, or for one prompt its list.

        Raises:
            InputError: an empty batch or prompt, one too long, or ids outside of the vocabulary.
            UnsupportedOptionError: an option that the servers can't serve.
            ServiceBrokenError: a weight push failed, the last one or one during the call.
            ServiceError: refused, failed, timed out, or an answer that must not be trained on.
        """
        batch, single = to_requests(
            prompts, sampling_params, options, input_ids=input_ids, fit_context=fit_context
        )
        return _shaped(batch, self.complete(batch), single, grouped)

    async def agenerate(
        self,
        /,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        grouped: bool = False,
        fit_context: bool = True,
        **options: Any,
    ) -> Any:
        """Same as `generate`, awaited; cancelling it aborts its requests on the servers."""
        batch, single = to_requests(
            prompts, sampling_params, options, input_ids=input_ids, fit_context=fit_context
        )
        return _shaped(batch, await self.acomplete(batch), single, grouped)

    def complete(
        self,
        batch: Sequence[GenerateRequest],
        arrive: Callable[[list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Completes requests, all in flight at once; waits while a weight push is under way.

        Args:
            batch: the requests; equal prompts with one seed get seeds that follow each other.
            arrive: called with the completions of each request as soon as it is finished, on the
                event loop that the others wait on: it must be quick.
        """
        batch = requests_of(batch)
        with self.sessions.held(batch) as ended:
            prepared = replace(self._prepare(batch), arrive=arrive)
            loop, data = self.data_plane()
            ended.update(enumerate(loop.run(data.generate_all(prepared))))
        return _flat(ended)

    async def acomplete(
        self,
        batch: Sequence[GenerateRequest],
        arrive: Callable[[list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Same as `complete`, awaited on any event loop."""
        batch = requests_of(batch)
        with self.sessions.held(batch) as ended:
            # In a thread: it may wait for a weight push, or ask a server.
            prepared = replace(await asyncio.to_thread(self._prepare, batch), arrive=arrive)
            loop, data = self.data_plane()
            try:
                groups = await asyncio.wrap_future(loop.submit(data.generate_all(prepared)))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._servers.gate.state is ServiceState.CLOSED and not (
                    task and task.cancelling()
                ):
                    raise closed_meanwhile() from None
                raise
            ended.update(enumerate(groups))
        return _flat(ended)

    def as_completed(
        self, batch: Sequence[GenerateRequest]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields the index of each request and its completions as soon as they are finished.

        All are in flight at once, from the first step of the loop on. Leaving it early aborts the
        rest on the servers.

        Raises:
            as `generate`: when the first request fails, the others are aborted.
        """
        batch = requests_of(batch)
        self.check(batch)

        def iterate() -> Iterator[tuple[int, list[Completion]]]:
            # Now, since it may be long since the call.
            prepared = self._admitted(own_seeds(batch))
            finished: queue.SimpleQueue[_Finished] = queue.SimpleQueue()
            with self.sessions.held(batch) as ended, self._sending(prepared, finished.put) as sent:
                while (one := finished.get()) is not None:
                    ended[one[0]] = one[1]
                    yield one
                result_of(sent)

        return iterate()

    async def aas_completed(
        self, batch: Sequence[GenerateRequest]
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        """Same as `as_completed`, for ``async for``."""
        finished: asyncio.Queue[_Finished] = asyncio.Queue()
        caller = asyncio.get_running_loop()

        def put(one: _Finished) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits
                caller.call_soon_threadsafe(finished.put_nowait, one)

        batch = requests_of(batch)
        prepared = await asyncio.to_thread(self._prepare, batch)
        with self.sessions.held(batch) as ended, self._sending(prepared, put) as sent:
            while (one := await finished.get()) is not None:
                ended[one[0]] = one[1]
                yield one
            result_of(sent)

    @contextlib.contextmanager
    def _sending(self, prepared: Batch, put: Callable[[_Finished], None]) -> Iterator[Future[None]]:
        """Sends a batch; ``put`` gets what is finished, and None at the end, however it comes."""
        loop, data = self.data_plane()

        async def send() -> None:
            async for one in data.as_completed(prepared):
                put(one)

        sent = loop.submit(send())
        sent.add_done_callback(lambda _: put(None))
        try:
            yield sent
        finally:
            sent.cancel()

    def abort(self, rid: str | None = None) -> None:
        """Aborts one request, or every request of every client, that a server has by now.

        What it had generated comes back where the request has ``partial_allowed``; other requests
        raise `RequestAbortedError`. An id that no server has is no error: it may just have ended.

        Args:
            rid: id of the request; None aborts all.

        Raises:
            UnsupportedOptionError: the request has several samples, which the server names itself.
            ServiceError: a server did not take the order; the others have it.
        """
        self._check_open()
        data = self._data
        sent = [rid] if rid is None or data is None else data.sent_rids(rid)

        def abort(server: ControlClient) -> None:
            for one in sent:
                server.abort(one)

        order_all(self._servers.workers, abort)

    def _prepare(self, batch: Sequence[GenerateRequest]) -> Batch:
        """Checks requests against the servers, then as `_admitted`."""
        self.check(batch)
        return self._admitted(own_seeds(batch))

    def _admitted(self, batch: Sequence[GenerateRequest]) -> Batch:
        """What is sent for requests that were checked; waits for the weights to be whole."""
        servers = self._servers
        start, request_s = time.monotonic(), servers.timeouts.request_s
        cluster, info = servers.cluster, servers.info
        requests, in_use = self._with_versions(fitted(batch, self.max_input_len))
        return Batch(
            requests=requests,
            adapters_in_use=in_use,
            admission=Admission(
                servers.gate,
                servers.weight_version,
                self._cache_salt if info.capabilities.cache_salt else None,
                request_s,
                servers.timeouts.retry_s,
                servers.versions.noticed,
            ),
            within_s=request_s - (time.monotonic() - start),
            seeded=info.features.deterministic,
            two_parts=self._two_parts,
            workers=tuple(w.url for w in servers.workers) if cluster.behind_router else (),
        )

    def _with_versions(
        self, batch: Sequence[GenerateRequest]
    ) -> tuple[list[GenerateRequest], InUse]:
        """The requests with the adapters' names that the servers know, which stay loaded."""
        names = {request.lora for request in batch if request.lora is not None}
        versions, in_use = self._servers.lora.versions.resolve(names, self._known_version)
        requests = [
            replace(r, lora=versioned(r.lora, versions[r.lora]), adapter_version=versions[r.lora])
            if r.lora is not None and r.lora in versions
            else r
            for r in batch
        ]
        return requests, in_use

    def check(self, batch: Sequence[GenerateRequest]) -> None:
        """Raises for requests that the servers can't serve, before anything is sent.

        Raises:
            InputError: an empty batch, or a prompt too long or with ids outside of the vocabulary.
            UnsupportedOptionError: an option that the servers can't serve.
        """
        if not batch:
            raise EmptyBatchError("the batch has no prompt.")
        info = self._servers.info
        check_room(batch, self.max_input_len, info.model_path)
        check_ids(batch, info.vocab_size)
        for features in {each.features for each in self._servers.cluster.infos}:
            check_parts(batch, features)
            for request in batch:
                check_features(request, features)
        self._servers.lora.check(each.lora for each in batch)  # SGLang itself would load it again

    @property
    def _two_parts(self) -> TwoParts | None:
        features = [each.features for each in self._servers.cluster.infos]
        if all(each.tokenizer for each in features):
            return None
        eos_ids = {id_ for each in features for id_ in each.eos_ids or ()}
        return TwoParts(eos_ids=tuple(eos_ids), max_input_len=self.max_input_len)

    @property
    def max_input_len(self) -> int | None:
        """What a prompt has to be shorter than, on every server; None: they don't tell."""
        return longest_input(each.max_input_len for each in self._servers.cluster.infos)

    def complete_each(
        self,
        batch: Sequence[GenerateRequest],
        positions: Sequence[int] | None = None,
        arrive: Callable[[int, Group], None] | None = None,
    ) -> list[Group]:
        """Same as `complete`, but a request that fails leaves the others alone.

        That goes for what the servers refuse or fail at, for a session that is closed or busy, for
        an adapter that is gone, and for what is not answered in time.

        Args:
            batch: requests of one or several callers.
            positions: each request's index in its caller's own batch, which its error names; the
                seeds are then those of that batch, and stay.
            arrive: called with a request's index and what it came to, as soon as that is known, on
                the event loop that the others wait on: it must be quick.

        Returns:
            For each request its completions, or its error.

        Raises:
            EmptyBatchError: the batch has no request.
            ServiceError: what concerns all requests: the service is broken or closed, or the
                weights did not become whole in time.
        """
        batch = requests_of(batch)
        if positions is None:
            batch = own_seeds(batch)
        places = range(len(batch)) if positions is None else positions
        groups: dict[int, Group] = {}
        with self.sessions.held_each(batch) as held:

            def end(index: int, group: Group) -> None:
                groups[index] = held.end(index, group)
                if arrive is not None:
                    arrive(index, groups[index])

            for index, error in (self._refused(batch, places) | held.refused).items():
                end(index, error)
            left = [index for index in range(len(batch)) if index not in groups]
            if left:
                prepared = replace(
                    self._admitted([batch[index] for index in left]),
                    positions=[places[index] for index in left],
                )
                loop, data = self.data_plane()
                loop.run(data.generate_each(prepared, lambda i, group: end(left[i], group)))
        return [groups[index] for index in range(len(batch))]

    def _refused(
        self, batch: Sequence[GenerateRequest], places: Sequence[int]
    ) -> dict[int, SGLangError]:
        """Why requests can't be served, by index; all were served when their callers checked."""
        try:
            self.check(batch)
            return {}
        except EmptyBatchError:
            raise
        except (ConfigError, InputError):
            refused: dict[int, SGLangError] = {}
        for index, request in enumerate(batch):
            try:
                self.check([request])
            except (ConfigError, InputError) as error:
                error.add_note(f"prompt {places[index]} of the batch")
                refused[index] = error
        return refused

    def open_session(
        self,
        *,
        timeout_s: float | None = SESSION_TIMEOUT_S,
        session_id: str | None = None,
        capacity_of_str_len: int = SESSION_CAPACITY,
    ) -> Session:
        """Opens a conversation that one server holds; see `Session`.

        Args:
            timeout_s: seconds after the last request began until the server closes it by itself;
                None: never, also where this process is killed.
            session_id: its name; by default the server chooses one.
            capacity_of_str_len: as SGLang takes it, which does not hold sessions to it.

        Raises:
            ConfigError: a name that is open here already, or is none; no capacity.
            ServiceError: the server opened none.
        """
        return self.sessions.open(
            self._servers.workers,
            timeout_s=timeout_s,
            session_id=session_id,
            capacity_of_str_len=capacity_of_str_len,
        )

    def _cache_salt(self, version: str) -> str:
        """Separates prefixes cached under different weights."""
        return salt_of(version, self._run_name)

    def _known_version(self) -> str:
        servers = self._servers
        return retried(servers.weight_version, servers.timeouts.retry_s)


Prompts = str | GenerateRequest | Sequence[int] | Sequence[str | Sequence[int] | GenerateRequest]

_Finished = tuple[int, list[Completion]] | None


def _flat(ended: Mapping[int, list[Completion]]) -> list[Completion]:
    return [completion for index in range(len(ended)) for completion in ended[index]]


def _shaped(
    batch: Sequence[GenerateRequest], completions: list[Completion], single: bool, grouped: bool
) -> Any:
    """Completions as `generate` returns them."""
    if grouped:
        following = iter(completions)
        groups = [list(itertools.islice(following, each.num_samples)) for each in batch]
        return groups[0] if single else groups
    return completions[0] if single and len(completions) == 1 else completions
