"""Loads, unloads and lists LoRA adapters on every server."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import NoReturn, TypeVar

from ..errors import (
    ConfigError,
    ConnectError,
    InputError,
    RequestRefusedError,
    ResponseError,
    ServiceError,
    UnsupportedOptionError,
)
from .control import ControlClient
from .http import server_message
from .lora_folder import adapter_path
from .lora_versions import AdapterVersions, versions_of
from .together import ask_all, retold

# How long the servers' list of adapters is believed, so that a batch asks for it but not each of
# many small requests. Asking takes 1 ms per server.
LIST_VALID_S = 1.0

SERVE_WITH = (
    "start the servers with enable_lora=True, max_lora_rank=16, "
    'lora_target_modules=["q_proj", "v_proj"] (or ["all"])'
)

Failures = Mapping[ControlClient, ServiceError]


class Adapters:
    """The LoRA adapters of a set of servers, which always load and unload together.

    Requests choose one by name. What is loaded is asked of the servers, never remembered: another
    process may change it. Prefixes cached under one adapter are never used under another, nor under
    the same name once it was loaded again. A push of base weights leaves the adapters alone.

    SGLang loads an adapter again, from its folder as it is then, when a request names one that was
    loaded once and unloaded since; `check` before a request is what refuses that.

    Args:
        workers: a control client per server.
        versions: what this process knows of adapters that are pushed.

    Attributes:
        versions: as given.
    """

    def __init__(
        self, workers: Sequence[ControlClient], versions: AdapterVersions | None = None
    ) -> None:
        self.versions = versions or AdapterVersions()
        self._workers = tuple(workers)
        self._seen: dict[str, float] = {}  # when a name was last seen on every server

    def load(
        self,
        name: str,
        path: str | PathLike[str],
        pinned: bool = False,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Loads an adapter on every server, or on none.

        Where servers have ``max_loaded_loras``, they unload the adapter that was used least
        recently to make room for this one.

        Args:
            name: what requests will call it.
            path: its folder, as PEFT's ``save_pretrained`` writes it and as the servers see it; or
                its hub name.
            pinned: keep it in the servers' pool of adapters in use.
            timeout_s: bound on waiting for each server; ``Timeouts.control_s`` by default.

        Raises:
            ConfigError: an empty name, one that is loaded already, or a folder that holds no
                adapter or a damaged one.
            UnsupportedOptionError: the servers run without LoRA, or SGLang can't compute with such
                an adapter.
            ServiceError: a server refused or failed; the message names it, and the adapter was
                unloaded from the others.
        """
        _check_name(name)
        folder = adapter_path(path, [server.url for server in self._workers])
        holders = [server.url for server, names in self._registries().items() if name in names]
        if holders:
            raise ConfigError(
                f"adapter {name!r} is loaded already, on {', '.join(holders)}: unload it first, or "
                "choose another name."
            )
        body = {"lora_name": name, "lora_path": folder, "pinned": pinned}
        answers = ask_all(self._workers, lambda server: server.load_adapter(body, timeout_s))
        if failures := answers.failures:
            note = self._roll_back(name, failures, timeout_s)
            self._raise_failure(f"adapter {name!r} was not loaded", failures, note)

    def unload(self, name: str, *, timeout_s: float | None = None) -> None:
        """Unloads an adapter from every server that has it.

        Each server waits until its requests with that adapter are done; new ones are for `check` to
        refuse. After a failure, call it again.

        Args:
            name: what it was loaded as.
            timeout_s: bound on waiting for each server; ``Timeouts.control_s`` by default.

        Raises:
            ConfigError: an empty name, or no server has such an adapter.
            UnsupportedOptionError: the servers run without LoRA.
            ServiceError: a server failed; the message names it, and the others unloaded it.
        """
        _check_name(name)
        self._seen.pop(name, None)  # the servers may be waiting for requests for long
        had_it = ask_all(self._workers, partial(unload, name, timeout_s))
        self._seen.pop(name, None)  # a check may have come in between
        self.versions.unloaded(name)
        if failures := had_it.failures:
            self._raise_failure(f"adapter {name!r} was not unloaded", failures, "call unload again")
        if not any(had_it.given.values()):
            self._raise_disabled()
            names = list_of(self._registries().values())
            raise ConfigError(f"adapter {name!r} can't be unloaded: {names}")

    def names(self) -> tuple[str, ...]:
        """Adapters that every server has, sorted.

        Raises:
            ServiceError: a server does not answer.
        """
        return tuple(sorted(frozenset.intersection(*self._registries().values())))

    def check(self, names: Iterable[str | None]) -> None:
        """Raises unless every server has the adapters; None stands for none.

        Of an adapter that is pushed, ``name@version``, it is enough that they have any version.
        Costs 1 ms per server, at most once in `LIST_VALID_S` for each name. An adapter that another
        process unloads is noticed after that time at the latest; requests that are under way by
        then make SGLang load it again.

        Args:
            names: adapters that requests are about to name.

        Raises:
            InputError: a name is empty, or a server does not have it.
            UnsupportedOptionError: a name, and the servers run without LoRA.
            ServiceError: no server answers, or one answers with an error.
        """
        wanted = {n for n in names if n is not None and self.versions.pushed(n) is None}
        if "" in wanted:
            raise InputError('lora="" names no adapter: for the base model, leave it None.')
        asked_at = time.monotonic()
        stale = {n for n in wanted if asked_at - self._seen.get(n, -math.inf) >= LIST_VALID_S}
        if not stale:
            return
        registries = self._registries(skip_dead=True)
        for name in sorted(stale):
            missing = [server.url for server, names in registries.items() if name not in names]
            everywhere = frozenset.intersection(*registries.values())
            versions = versions_of(name, everywhere) if missing else ()
            self.versions.listed(name, versions)
            if missing and not versions:
                self._seen.pop(name, None)
                self._raise_disabled()
                raise InputError(
                    f"adapter {name!r} is not loaded on {', '.join(missing)}: "
                    f"{list_of(registries.values())} Load it with "
                    f"service.lora.load({name!r}, folder)."
                )
            self._seen[name] = asked_at

    # Requests

    def _registries(self, *, skip_dead: bool = False) -> Mapping[ControlClient, frozenset[str]]:
        """The adapters that each server has.

        Args:
            skip_dead: leave out servers at whose address nothing listens (a router sends them
                nothing either), unless that is all of them.
        """
        answers = ask_all(self._workers, registered)
        dead = [*answers.failures.values()]
        if skip_dead and answers.given and all(isinstance(each, ConnectError) for each in dead):
            return answers.given
        answers.all()
        return answers.given

    def _roll_back(self, name: str, failures: Failures, timeout_s: float | None) -> str:
        """Unloads what a failed load may have loaded; says what is left.

        A server that did not answer may have loaded it all the same; one that refused has not.
        """
        loaded = [w for w in self._workers if not isinstance(failures.get(w), RequestRefusedError)]
        if left := ask_all(loaded, partial(unload, name, timeout_s)).failures:
            urls = ", ".join(server.url for server in left)
            return f"{urls} may have it now: call unload({name!r}) once it answers"
        return "no server has it"

    def _raise_failure(self, what: str, failures: Failures, note: str) -> NoReturn:
        """Raises the first server's error, with its name and what it said."""
        self._raise_disabled()
        server, error = next(iter(failures.items()))
        others = [f"{other.url} failed too" for other in failures if other is not server]
        message = "; ".join([f"{what}: {server.url} says: {said(error)}", *others, note])
        raise retold(error, message) from error

    def _raise_disabled(self) -> None:
        """Raises if it is the servers' options that rule out adapters; asked only after a no."""
        for server in self._workers:
            try:
                info = server.server_info()
            except ServiceError:
                continue  # the error at hand says more
            if not info.get("enable_lora", True):
                raise UnsupportedOptionError(f"{server.url} runs without LoRA: {SERVE_WITH}.")
            if info.get("dp_size", 1) > 1:
                raise UnsupportedOptionError(
                    f"{server.url} runs with dp_size={info['dp_size']}, with which SGLang can't "
                    "load adapters: use num_replicas instead."
                )


def _check_name(name: str) -> None:
    # SGLang loads one called "", and then takes "" in a request for none.
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name is a string that is not empty, got {name!r}.")


T = TypeVar("T")


def registered(server: ControlClient) -> frozenset[str]:
    """Names from ``/v1/models``, which lists the base model too; only adapters have a parent."""
    answer = server.models()
    try:
        return frozenset(card["id"] for card in answer["data"] if card.get("parent") is not None)
    except (KeyError, TypeError, AttributeError) as error:
        raise ResponseError(
            f"GET {server.url}/v1/models gave no list of models: {str(answer)[:200]!r}."
        ) from error


def unload(name: str, timeout_s: float | None, server: ControlClient) -> bool:
    """Whether the server had it."""
    try:
        server.unload_adapter(name, timeout_s)
    except RequestRefusedError:
        if name in registered(server):
            raise
        return False
    return True


def list_of(registries: Iterable[frozenset[str]]) -> str:
    """What all of some servers have, in words."""
    names = sorted(frozenset.intersection(*registries))
    return f"every server has {', '.join(map(repr, names)) or 'none'}."


def said(error: ServiceError) -> str:
    """The server's own words, where it said any."""
    body = getattr(error, "body", "")
    return server_message(body) if body else str(error)
