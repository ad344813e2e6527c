"""Holds conversations on a server (sessions), so that only what is new is sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from ..config import is_count
from ..errors import (
    ConfigError,
    InputError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServiceError,
    SGLangError,
)
from ..servers.control import ControlClient
from .completion import Completion
from .parse import Group
from .request import GenerateRequest, SessionTurn
from .sampling import is_text

SESSION_CAPACITY = 1 << 20  # what SGLang takes as capacity_of_str_len
# A client that is killed closes nothing, and a server that it did not start would hold its sessions
# for good. Longer than `Timeouts.request_s`: SGLang counts from the last request's arrival.
SESSION_TIMEOUT_S = 3600.0


class Session:
    """A conversation on one server. Close it, or use it as a context manager.

    A session goes on from its last completed request, or from an earlier one by that one's id: of a
    prompt that begins with everything so far, only the rest is sent. One request at a time.

    Args:
        server: the one that is to hold it.
        timeout_s: seconds after the last request began until the server closes it; None: never.
        session_id: its name; None: the server's choice.
        capacity_of_str_len: as SGLang takes it, which does not hold sessions to it.

    Attributes:
        session_id: the server's name for it.
        tokens: everything so far, prompts and responses.

    Raises:
        ConfigError: a name that is none, or no capacity.
        RequestRefusedError: the server opened none: it has a session of that name, for instance.
    """

    def __init__(
        self,
        server: ControlClient,
        *,
        timeout_s: float | None = None,
        session_id: str | None = None,
        capacity_of_str_len: int = SESSION_CAPACITY,
    ) -> None:
        body = _opening(session_id, capacity_of_str_len, timeout_s)
        answer = server.open_session(body)
        if not isinstance(answer, str) or not answer:
            raise RequestRefusedError(f"{server.url} opened no session: {answer!r:.200}")
        self.session_id = answer
        self.tokens: list[int] = []
        self._worker = server
        self._last_rid: str | None = None
        self._held: dict[str, tuple[int, ...]] = {}  # tokens up to each completed request
        self._busy = False
        self._closed = False
        self._lock = threading.Lock()

    def request(
        self, input_ids: Sequence[int], *, after: str | None = None, **fields: Any
    ) -> GenerateRequest:
        """The request that goes on with this session.

        Args:
            input_ids: the whole prompt, which begins with `tokens`, or, with ``after``, with what
                the session held after that request.
            after: id of the completed request to go on from; None: the last one.
            **fields: of `GenerateRequest`.

        Raises:
            ConfigError: the session was closed, or its last request is not finished.
            InputError: the prompt does not go on from where the session is, or no request of that
                id was completed here.
        """
        with self._lock:
            self._check_free()
            before = self._tokens_after(after)
            ids, start = tuple(input_ids), len(before)
            if ids[:start] != before or len(ids) == start:
                raise InputError(
                    f"session {self.session_id} holds {start} tokens, and the prompt of {len(ids)} "
                    "tokens does not begin with them and go on; open a new session, or pass the "
                    "tokens of the turn before unchanged."
                )
            turn = SessionTurn(
                session_id=self.session_id,
                worker_url=self._worker.url,
                after=self._last_rid if after is None else after,
                before=before,
                branches=after is not None,
            )
            return GenerateRequest(input_ids=ids[start:], **{**fields, "session": turn})

    def _tokens_after(self, rid: str | None) -> tuple[int, ...]:
        if rid is None:
            return tuple(self.tokens)
        if rid not in self._held:
            raise InputError(
                f"session {self.session_id} has no completed request {rid!r:.100} to go on from: "
                "give the `rid` of one of its completions."
            )
        return self._held[rid]

    def begin(self, request: GenerateRequest) -> None:
        """A request is about to be sent.

        Raises:
            ConfigError: closed, or another request is under way or was there in the meantime.
        """
        with self._lock:
            self._check_free()
            turn = request.session
            if turn is None or (turn.after != self._last_rid and not turn.branches):
                raise ConfigError(
                    f"session {self.session_id} has gone on since this request was made: make a "
                    "new one."
                )
            self._busy = True

    def finish(self, request: GenerateRequest, completion: Completion | None) -> None:
        """Takes note of how a request ended; None, or aborted: the session stays where it was.

        Raises:
            ResponseError: the server put other tokens before the request's than this session's.
        """
        with self._lock:
            self._busy = False
            if completion is None or completion.finish_type == "abort":
                return
            before = () if request.session is None else request.session.before
            prompt = [*before, *(request.input_ids or ())]
            if completion.prompt_tokens != len(prompt):
                raise ResponseError(
                    f"session {self.session_id}: the server answers a prompt of "
                    f"{completion.prompt_tokens} tokens, not of {len(prompt)}."
                )
            self.tokens = [*prompt, *completion.output_ids]
            self._last_rid = completion.rid
            self._held[completion.rid] = tuple(self.tokens)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def worker_url(self) -> str:
        """The server that holds it."""
        return self._worker.url

    def _check_free(self) -> None:
        if self._closed:
            raise ConfigError(f"session {self.session_id} was closed: open a new one.")
        if self._busy:
            raise ConfigError(f"session {self.session_id} has a request under way; one at a time.")

    def close(self) -> None:
        """Frees what the server holds; harmless twice, and again after it failed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._worker.close_session(self.session_id)
        except ServiceError:
            self._closed = False
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Sessions:
    """The sessions that one service opened."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}
        self._next_worker = 0
        self._lock = threading.Lock()

    def open(
        self,
        workers: Sequence[ControlClient],
        *,
        timeout_s: float | None,
        session_id: str | None = None,
        capacity_of_str_len: int = SESSION_CAPACITY,
    ) -> Session:
        """Opens a session on the next server in turn; arguments and errors as of `Session`."""
        with self._lock:
            self._forget_closed()
            if session_id in self._open:
                raise ConfigError(f"session {session_id!r} is open here: close it, or rename one.")
            server = workers[self._next_worker % len(workers)]
            self._next_worker += 1
        session = Session(
            server,
            timeout_s=timeout_s,
            session_id=session_id,
            capacity_of_str_len=capacity_of_str_len,
        )
        with self._lock:
            self._open[session.session_id] = session
        return session

    def request(self, input_ids: Sequence[int], session: str, **fields: Any) -> GenerateRequest:
        """The request that goes on with the session of that id, see `Session.request`."""
        return self.find(session).request(input_ids, **fields)

    def find(self, session_id: str) -> Session:
        """The open session of that id; raises `InputError` where there is none."""
        with self._lock:
            session = self._open.get(session_id)
        if session is None:
            raise InputError(
                f"session {session_id!r} was not opened here, or is closed; open one with "
                "service.open_session()."
            )
        return session

    @contextlib.contextmanager
    def held(self, batch: Sequence[GenerateRequest]) -> Iterator[dict[int, list[Completion]]]:
        """Holds the sessions of a batch while it is under way.

        Into the dictionary go the completions of each request that ended well, by its index.

        Raises:
            InputError: a session that was not opened here.
            ConfigError, ResponseError: as `Session.begin` and `Session.finish`.
        """
        ended: dict[int, list[Completion]] = {}
        with contextlib.ExitStack() as stack:
            for index, request in enumerate(batch):
                if request.session is not None:
                    session = self.find(request.session.session_id)
                    session.begin(request)
                    stack.callback(_finish, session, request, index, ended)
            yield ended

    @contextlib.contextmanager
    def held_each(self, batch: Sequence[GenerateRequest]) -> Iterator[HeldSessions]:
        """Same as `held`, but a session that can't go on leaves the others alone."""
        held = HeldSessions(batch)
        for index, request in enumerate(batch):
            if request.session is not None:
                try:
                    held.begin(index, self.find(request.session.session_id))
                except (ConfigError, InputError) as error:
                    held.refused[index] = error
        try:
            yield held
        finally:
            held.give_up()

    def close(self) -> None:
        """Closes every session; servers that are gone hold none any more."""
        with self._lock:
            sessions, self._open = list(self._open.values()), {}
        silent: set[str] = set()
        for session in sessions:
            if session.worker_url not in silent:
                try:
                    session.close()
                except RequestTimeoutError:
                    silent.add(session.worker_url)  # it would be waited for again and again
                except ServiceError:
                    pass

    def _forget_closed(self) -> None:
        self._open = {k: s for k, s in self._open.items() if not s.closed}


class HeldSessions:
    """Holds the sessions of a batch's requests, each until its own request has ended.

    Attributes:
        refused: why sessions can't go on, by the request's index.
    """

    def __init__(self, batch: Sequence[GenerateRequest]) -> None:
        self._batch = batch
        self._under_way: dict[int, Session] = {}
        self.refused: dict[int, SGLangError] = {}

    def begin(self, index: int, session: Session) -> None:
        """A request is about to be sent; errors as in `Session.begin`."""
        session.begin(self._batch[index])
        self._under_way[index] = session

    def end(self, index: int, group: Group) -> Group:
        """What a request came to; another error where it is not what the session can go on from."""
        session = self._under_way.pop(index, None)
        if session is None:
            return group
        try:
            session.finish(self._batch[index], group[0] if isinstance(group, list) else None)
        except ResponseError as error:
            return error
        return group

    def give_up(self) -> None:
        """Sessions whose requests did not end stay where they were."""
        for index in list(self._under_way):
            session = self._under_way.pop(index, None)
            if session is not None:
                session.finish(self._batch[index], None)


def _opening(session_id: Any, capacity: Any, timeout_s: float | None) -> dict[str, Any]:
    """The body of a request for a session; raises `ConfigError` for what can't be asked for."""
    if session_id is not None and (not is_text(session_id) or not session_id):
        raise ConfigError(f"session_id={session_id!r:.100}: must be a string, not empty.")
    if not is_count(capacity):
        raise ConfigError(f"capacity_of_str_len={capacity!r:.100}: must be an integer >= 1.")
    body: dict[str, Any] = {"capacity_of_str_len": capacity}
    if session_id is not None:
        body["session_id"] = session_id
    if timeout_s is not None:
        body["timeout"] = timeout_s
    return body


def _finish(
    session: Session, request: GenerateRequest, index: int, ended: dict[int, list[Completion]]
) -> None:
    session.finish(request, ended[index][0] if index in ended else None)
