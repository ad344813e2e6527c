"""Finds out what answers at a URL: a router with its workers, or a single server."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..config import Timeouts
from ..errors import (
    ConnectError,
    RequestRefusedError,
    RequestTimeoutError,
    ServerFailedError,
    ServiceError,
    warn,
)
from .control import ControlClient
from .http import path_hint
from .info import WorkerInfo, parse_worker_info
from .router import worker_urls
from .together import order_all

# How long a server is waited for that answers only once it is not paused any more.
PAUSED_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Keys of the servers and of the router in front of them."""

    api_key: str | None = None
    admin_api_key: str | None = None

    @classmethod
    def chosen(cls, api_key: str | None, admin_api_key: str | None) -> Self:
        """Keys for managed servers: those given, random ones for None, none for an empty string."""
        random = secrets.token_hex(24), secrets.token_hex(24)
        given = api_key, admin_api_key
        keys = [r if g is None else g or None for g, r in zip(given, random, strict=True)]
        return cls(api_key=keys[0], admin_api_key=keys[1])


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What answers at a URL.

    Attributes:
        url: where generation goes.
        behind_router: whether that is a router.
        workers: a control client per server.
        infos: what each server says of itself, in the same order.
        silent: URLs of the servers behind the router that did not answer, and so are left out.
        paused: whether a server kept a request back when it was asked, as one that is paused does.
    """

    url: str
    behind_router: bool
    workers: tuple[ControlClient, ...]
    infos: tuple[WorkerInfo, ...]
    silent: tuple[str, ...] = ()
    paused: bool = False

    def without(self, url: str) -> Self:
        """The cluster after one server has left."""
        kept = [index for index, server in enumerate(self.workers) if server.url != url]
        return replace(
            self,
            workers=tuple(self.workers[index] for index in kept),
            infos=tuple(self.infos[index] for index in kept),
        )

    def having(self, server: ControlClient, info: WorkerInfo) -> Self:
        """The cluster after a server has joined, or has come back to its place."""
        servers = {w.url: (w, i) for w, i in zip(self.workers, self.infos, strict=True)}
        servers[server.url] = (server, info)
        return replace(
            self,
            workers=tuple(server for server, _ in servers.values()),
            infos=tuple(info for _, info in servers.values()),
        )


def attach(
    url: str, keys: Credentials, timeouts: Timeouts, known: Sequence[WorkerInfo] = ()
) -> Cluster:
    """Asks a URL what it is, and every server behind it what it can do.

    A server that does not answer is left out, with a warning, where others do.

    Args:
        url: of a router or a server.
        keys: what they ask for.
        timeouts: bounds on waiting.
        known: servers that are members whether they answer or not, by what they said before.

    Raises:
        ConnectError: nothing answers there, or nothing that this library knows.
        NoWorkersError: a router without a worker.
    """
    front = client_of(url, keys, timeouts)
    urls = worker_urls(front)
    workers = tuple(client_of(u, keys, timeouts) for u in (urls or [front.url]))
    answers = _ask(workers)
    said = {info.url: info for info in known}
    said |= {url: answer.info for url, answer in answers.items() if answer.info}
    members = _members(url, workers, answers, said)
    infos = tuple(said[server.url] for server in members)
    models = {info.model_path for info in infos}
    if len(models) > 1:
        raise ConnectError(f"the workers behind {url} serve different models: {sorted(models)}.")
    return Cluster(
        url=front.url,
        behind_router=urls is not None,
        workers=members,
        infos=infos,
        silent=tuple(answers.keys() - said),
        paused=any(answer.paused for answer in answers.values()),
    )


def _members(
    url: str,
    workers: Sequence[ControlClient],
    answers: Mapping[str, _Answer],
    said: Mapping[str, WorkerInfo],
) -> tuple[ControlClient, ...]:
    """The servers of which it is known what they are; warns of the others."""
    members = tuple(server for server in workers if server.url in said)
    silent = {url: answer.error for url, answer in answers.items() if url not in said}
    if not members:
        raise ConnectError(f"can't attach to {url}: {_told(silent)}")
    if silent:
        warn(
            f"{url} is used without those of its servers that don't answer: {_told(silent)}. Call "
            "refresh() once they do. A push of weights takes those that it does not reach out of "
            "the router."
        )
    return members


def _told(errors: Mapping[str, ServiceError | None]) -> str:
    return "; ".join(f"{url}: {error}" for url, error in errors.items())


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a server said of itself, or why it said nothing."""

    info: WorkerInfo | None = None
    error: ServiceError | None = None
    paused: bool = False


def _ask(workers: Sequence[ControlClient]) -> dict[str, _Answer]:
    """Asks all servers at once; answers by URL, errors as in `attach`."""
    answers = order_all(workers, _asked)
    return {server.url: answer for server, answer in zip(workers, answers, strict=True)}


def read_info(server: ControlClient) -> WorkerInfo:
    """What a server says of itself.

    Raises:
        ConnectError: it does not answer, or as nothing that this library knows.
    """
    answer = _asked(server)
    if answer.info is None:
        raise ConnectError(f"can't attach to {server.url}: {answer.error}") from answer.error
    return answer.info


def client_of(url: str, keys: Credentials, timeouts: Timeouts) -> ControlClient:
    """A control client for a server or router."""
    return ControlClient(
        url, api_key=keys.api_key, admin_api_key=keys.admin_api_key, timeouts=timeouts
    )


def _asked(server: ControlClient) -> _Answer:
    try:
        server_info = server.server_info()
        model_info = server.model_info()
        openapi = server.openapi()
    except (ConnectError, ServerFailedError, RequestTimeoutError) as error:
        return _Answer(error=error)
    except ServiceError as error:
        hint = path_hint(server.url) if isinstance(error, RequestRefusedError) else ""
        raise ConnectError(f"can't attach to {server.url}: {error}.{hint}") from error
    info = parse_worker_info(server.url, server_info, model_info, openapi)
    path = _model_folder(info.model_path, info.tokenizer_path)
    size, paused = _vocab_size(server, path)
    features = replace(info.features, eos_ids=configured_eos_ids(Path(path)))
    info = replace(info, model_path=path, vocab_size=size, features=features)
    return _Answer(info=info, paused=paused)


def _model_folder(model_path: str, tokenizer_path: str) -> str:
    """The folder that a server was started with.

    Up to 0.5.17 or so SGLang names the files that it has loaded last instead, which may be gone by
    now; the tokenizer's folder is usually the model's own.
    """
    gone = Path(model_path).is_absolute() and not Path(model_path).exists()
    return (
        tokenizer_path if gone and (Path(tokenizer_path) / "config.json").is_file() else model_path
    )


def _vocab_size(server: ControlClient, model_path: str) -> tuple[int | None, bool]:
    """Asks a server; where it does not say, the model's folder, if it is on this machine.

    And whether it kept its answer back, as it does while it is paused.
    """
    size, paused = None, False
    try:
        server.score(QUESTION, PAUSED_S)
    except RequestRefusedError as error:
        size = told_vocab_size(error.body)
    except RequestTimeoutError:
        paused = True  # it answered until now
    except ServiceError:
        pass
    return size or configured_vocab_size(Path(model_path) / "config.json"), paused


# No route tells the size, but the refusal of a bias does, before the scheduler hears of the
# request. A server that took it would add 0 to the last logit, and generate nothing.
QUESTION = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0, "logit_bias": {"-1": 0.0}}}
ANSWER = re.compile(r"keys in \[0, (\d+)\]")


def told_vocab_size(refusal: str) -> int | None:
    """The size that a server's answer to `QUESTION` tells; None where it tells none."""
    said = ANSWER.search(refusal)
    return None if said is None else int(said[1]) + 1


def configured_vocab_size(path: Path) -> int | None:
    """The size in a model's ``config.json``; None where the file can't be read or has none."""
    try:
        config = json.loads(path.read_text())
        size = config.get("text_config", config)["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def configured_eos_ids(folder: Path) -> tuple[int, ...] | None:
    """The ids at which SGLang ends a row, from a model's folder; None where it does not tell.

    A ``config.json`` without an ``eos_token_id`` leaves it to the model's class.
    """
    try:
        given = [json.loads((folder / "config.json").read_text())["eos_token_id"]]
        generation = folder / "generation_config.json"
        if generation.is_file():
            given.append(json.loads(generation.read_text()).get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    ids = [each for part in given for each in (part if isinstance(part, list) else [part])]
    return tuple(sorted({each for each in ids if isinstance(each, int)}))
