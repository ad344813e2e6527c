"""The generating half of a service: blocking, awaited, or one completion after the other."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from .adapters import Adapters
from .admission import Admission, salt_of
from .background import BackgroundLoop, closed_meanwhile, result_of
from .client import retried
from .completions import Completion
from .config import Timeouts
from .data_client import Batch, DataClient
from .errors import EmptyBatchError, ServiceError
from .gate import ServiceState, UpdateGate
from .protocol import GenerateRequest
from .requests_in import requests_of, to_requests
from .room import check_room, fitted, longest_input
from .sampling import SamplingParams
from .seeds import own_seeds
from .served import ServedModel
from .sessions import SESSION_CAPACITY, SESSION_TIMEOUT_S, Session, Sessions
from .two_parts import TwoParts, check_parts
from .vocabulary import check_ids

Prompts = str | GenerateRequest | Sequence[int] | Sequence[str | Sequence[int] | GenerateRequest]


class GeneratingModel(ServedModel):
    """Generates with the servers behind a URL. Safe to use from several threads."""

    timeouts: Timeouts
    run_name: str | None

    @property
    @abc.abstractmethod
    def gate(self) -> UpdateGate:
        """Holds requests while weights change."""

    @property
    @abc.abstractmethod
    def weight_version(self) -> str:
        """Version of the weights that the servers run."""

    @abc.abstractmethod
    def _noticed(self, version: str) -> None:
        """A completion came back from weights of this version, which was not expected."""

    @abc.abstractmethod
    def _data_plane(self) -> tuple[BackgroundLoop, DataClient]:
        """The event loop and the connection pool on it."""

    def generate(
        self,
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
            loop, data = self._data_plane()
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
            loop, data = self._data_plane()
            try:
                groups = await asyncio.wrap_future(loop.submit(data.generate_all(prepared)))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self.gate.state is ServiceState.CLOSED and not (task and task.cancelling()):
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
        loop, data = self._data_plane()

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
        _, data = self._data_plane()
        rids = [""] if rid is None else data.sent_rids(rid)
        failures: list[ServiceError] = []
        for worker in self.workers:
            try:
                for one in rids:
                    worker.post("/abort_request", {"rid": one, "abort_all": rid is None})
            except ServiceError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _prepare(self, batch: Sequence[GenerateRequest]) -> Batch:
        """Checks requests against the servers, then as `_admitted`."""
        self.check(batch)
        return self._admitted(own_seeds(batch))

    def _admitted(self, batch: Sequence[GenerateRequest]) -> Batch:
        """What is sent for requests that were checked; waits for the weights to be whole."""
        start, request_s, cluster = time.monotonic(), self.timeouts.request_s, self.cluster
        asked = fitted(batch, self.max_input_len)
        requests, in_use = self.lora.versions.resolved(asked, self._known_version)
        return Batch(
            requests=requests,
            adapters_in_use=in_use,
            admission=Admission(
                self.gate,
                lambda: self.weight_version,
                self._cache_salt if self.info.capabilities.cache_salt else None,
                request_s,
                self.timeouts.retry_s,
                self._noticed,
            ),
            within_s=request_s - (time.monotonic() - start),
            seeded=self.info.features.deterministic,
            two_parts=self._two_parts,
            workers=tuple(w.url for w in self.workers) if cluster.behind_router else (),
        )

    def check(self, batch: Sequence[GenerateRequest]) -> None:
        """Raises for requests that the servers can't serve, before anything is sent.

        Raises:
            InputError: an empty batch, or a prompt too long or with ids outside of the vocabulary.
            UnsupportedOptionError: an option that the servers can't serve.
        """
        if not batch:
            raise EmptyBatchError("the batch has no prompt.")
        info = self.info
        check_room(batch, self.max_input_len, info.model_path)
        check_ids(batch, info.vocab_size)
        for features in {each.features for each in self.cluster.infos}:
            check_parts(batch, features)
            for request in batch:
                features.check(request)
        self.lora.check(each.lora for each in batch)  # SGLang itself would load it again

    @property
    def _two_parts(self) -> TwoParts | None:
        features = [each.features for each in self.cluster.infos]
        if all(each.tokenizer for each in features):
            return None
        eos_ids = {id_ for each in features for id_ in each.eos_ids or ()}
        return TwoParts(eos_ids=tuple(eos_ids), max_input_len=self.max_input_len)

    @property
    def max_input_len(self) -> int | None:
        """What a prompt has to be shorter than, on every server; None: they don't tell."""
        return longest_input(each.max_input_len for each in self.cluster.infos)

    @property
    @abc.abstractmethod
    def lora(self) -> Adapters:
        """The LoRA adapters."""

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
            self.workers,
            timeout_s=timeout_s,
            session_id=session_id,
            capacity_of_str_len=capacity_of_str_len,
        )

    @property
    @abc.abstractmethod
    def sessions(self) -> Sessions:
        """The sessions that this service opened; closed with it."""

    def _cache_salt(self, version: str) -> str:
        """Separates prefixes cached under different weights."""
        return salt_of(version, self.run_name)

    def _known_version(self) -> str:
        return retried(lambda: self.weight_version, self.timeouts.retry_s)


_Finished = tuple[int, list[Completion]] | None


def _shaped(
    batch: Sequence[GenerateRequest], completions: list[Completion], single: bool, grouped: bool
) -> Any:
    """Completions as `generate` returns them."""
    if grouped:
        following = iter(completions)
        groups = [list(itertools.islice(following, each.num_samples)) for each in batch]
        return groups[0] if single else groups
    return completions[0] if single and len(completions) == 1 else completions


def _flat(ended: Mapping[int, list[Completion]]) -> list[Completion]:
    return [completion for index in range(len(ended)) for completion in ended[index]]
