"""Starts and ends several servers and one router together."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from ..config import RouterConfig, ServerConfig, Timeouts
from ..errors import EngineNotFoundError, LaunchError, ProcessDiedError
from .commands import exempt_from_proxies, router_argv, server_argv, server_env
from .options import KnownOptions
from .ports import PortReservation, wait_until_free
from .process import ChildProcess, installed_version, known_options

# A port that was free when reserved can still be refused; more often it is something else.
PORT_ATTEMPTS = 3
FREED_S = 10.0  # how long a killed server may hold its port
PORT_IN_USE = ("address already in use", "EADDRINUSE", "errno 98", "port is already in use")

ROUTER = "router"

logger = logging.getLogger("torchrl_sglang")

ReadyCheck = Callable[[str], bool]
RouterCheck = Callable[[str, int], bool]  # with the number of servers that it should have


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """What to start.

    Attributes:
        servers: one entry per replica.
        router: the router in front of them.
        python: interpreter that has SGLang and sglang-router.
        log_dir: folder for the children's logs; None makes one that is kept.
        timeouts: bounds on starting and stopping.
    """

    servers: tuple[ServerConfig, ...]
    router: RouterConfig
    python: str
    log_dir: Path | None
    timeouts: Timeouts


class Fleet:
    """Running servers behind a running router.

    Attributes:
        router_url: where requests go.
        server_urls: the servers, in the order of the plan.
        log_dir: where their logs are.
        router_version: version of sglang-router.
    """

    def __init__(
        self, plan: FleetPlan, *, server_ready: ReadyCheck, router_ready: RouterCheck
    ) -> None:
        """Starts everything, or nothing.

        Args:
            plan: what to start.
            server_ready: asks one server's URL whether it takes requests.
            router_ready: asks the router's URL whether it has so many servers.

        Raises:
            UnsupportedOptionError: an option that what is installed does not have.
            LaunchError: something did not start; everything else was ended again.
        """
        self.router_version = _check_installed(plan.python)
        self._plan = plan = _with_known_options(plan)
        self._server_ready = server_ready
        self._router_ready = router_ready
        self._children: list[ChildProcess] = []
        self._environ = dict(os.environ)  # of the first start, also for later ones
        self._stopped = False
        self._lock = threading.Lock()
        self._reviving = threading.Lock()
        self.log_dir = plan.log_dir or Path(tempfile.mkdtemp(prefix="torchrl_sglang_"))
        self.log_dir.mkdir(parents=True, exist_ok=True)
        try:
            self.server_urls = self._start_servers()
            self.router_url = self._start_router(self.server_urls)
        except BaseException:
            self.stop()
            raise

    @property
    def _indices(self) -> range:
        return range(len(self._plan.servers))

    def _start_servers(self) -> list[str]:
        with ThreadPoolExecutor(len(self._plan.servers)) as pool:
            try:
                starts = [pool.submit(self._start_server, i) for i in self._indices]
                return [start.result() for start in _fail_fast(starts, self.stop)]
            except BaseException:
                self.stop()  # before the pool waits for threads that wait for their servers
                raise

    def restart(self, url: str, given_up: threading.Event | None = None) -> None:
        """Starts a server again at its address, with the model's own files.

        What is left of it is killed. Its log goes on in the next ``server-0.2.log``.

        Args:
            url: one of `server_urls`.
            given_up: once it is set, nothing is started any more.

        Raises:
            LaunchError: it did not start; nothing of it is left running.
        """
        index, port = self.server_urls.index(url), urlsplit(url).port
        assert port is not None
        self.kill(url)
        wait_until_free(self._plan.servers[index].host, port, FREED_S)
        try:
            self._start_server(index, port, given_up)
        except BaseException:
            self.kill(url)
            raise

    def revive_router(self, server_urls: Sequence[str]) -> None:
        """Starts the router again at its address if it ended by itself; harmless while it lives.

        Args:
            server_urls: the servers that it may send to.

        Raises:
            LaunchError: it did not start again; says how it ended first.
        """
        with self._reviving:
            if ROUTER in self._living or self._stopped:
                return
            said = told(self.ended(ROUTER)) or "The router is gone."
            url = urlsplit(self.router_url)
            self._kill(lambda child: child.name == ROUTER)
            wait_until_free(self._plan.router.host, int(url.port or 0), FREED_S)
            try:
                self._start_router(server_urls, url.port)
            except LaunchError as error:
                self._kill(lambda child: child.name == ROUTER)
                raise LaunchError(f"{said} It did not start again: {error}") from error
            # Not a warning: whoever makes an error of it would lose the calls that wait for this.
            logger.warning("%s It was started again.", said)

    @property
    def has_ended(self) -> bool:
        """Whether nobody can be served: the router ended and isn't back, or every server did."""
        router_lives = ROUTER in self._living and not self._reviving.locked()
        return not (router_lives and self.living_urls)

    @property
    def living_urls(self) -> list[str]:
        """URLs of the servers whose process lives."""
        living = self._living
        return [url for i, url in enumerate(self.server_urls) if _server_name(i) in living]

    @property
    def _living(self) -> set[str]:
        with self._lock:
            return {child.name for child in self._children if child.exit_code is None}

    def ended(self, name: str | None = None) -> list[ChildProcess]:
        """Children, or those of a name, that ended though nobody stopped them."""
        with self._lock:
            children = [child for child in self._children if name in (None, child.name)]
        return [child for child in children if child.exit_code is not None]

    def kill(self, url: str) -> None:
        """Ends a server at once; harmless where it is gone.

        Raises:
            LaunchError: it does not end.
        """
        name = _server_name(self.server_urls.index(url))
        self._kill(lambda child: child.name == name)

    def _kill(self, chosen: Callable[[ChildProcess], bool]) -> None:
        with self._lock:
            children = [child for child in self._children if chosen(child)]
        for child in children:
            child.kill()
            with self._lock, contextlib.suppress(ValueError):  # all are being stopped
                self._children.remove(child)

    def _start_server(
        self,
        index: int,
        port: int | None = None,
        given_up: threading.Event | None = None,
    ) -> str:
        config, name = self._plan.servers[index], _server_name(index)

        def start(port: int, second_port: int) -> ChildProcess:
            argv = server_argv(config, python=self._plan.python, port=port, nccl_port=second_port)
            env = server_env(config, self._environ)
            return self._spawn(name, argv, env, given_up)

        return self._start(config.host, port or config.port, start, self._server_ready)

    def _start_router(self, server_urls: Sequence[str], port: int | None = None) -> str:
        config = self._plan.router

        def start(port: int, second_port: int) -> ChildProcess:
            argv = router_argv(
                config,
                python=self._plan.python,
                port=port,
                prometheus_port=second_port,
                worker_urls=server_urls,
                api_key=self._plan.servers[0].api_key,
            )
            return self._spawn(ROUTER, argv, exempt_from_proxies(self._environ, config.host))

        def is_ready(url: str) -> bool:
            return self._router_ready(url, len(server_urls))

        return self._start(config.host, port or config.port, start, is_ready)

    def _start(
        self,
        host: str,
        wanted_port: int | None,
        start: Callable[[int, int], ChildProcess],
        is_ready: ReadyCheck,
    ) -> str:
        """Starts one child on a port of its own; another free port if that one was lost."""
        for attempt in range(1, PORT_ATTEMPTS + 1):
            with PortReservation(host, wanted_port) as http, PortReservation() as second:
                child = start(http.port, second.port)
                url = f"http://{_url_host(host)}:{http.port}"
                try:
                    child.wait_until(lambda url=url: is_ready(url), self._plan.timeouts.start_s)  # type: ignore[misc]
                    return url
                except ProcessDiedError as error:
                    lost_port = any(mark in error.log_tail for mark in PORT_IN_USE)
                    if not lost_port or wanted_port is not None or attempt == PORT_ATTEMPTS:
                        raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _spawn(
        self,
        name: str,
        argv: Sequence[str],
        env: dict[str, str],
        given_up: threading.Event | None = None,
    ) -> ChildProcess:
        with self._lock:
            if self._stopped or (given_up is not None and given_up.is_set()):
                raise LaunchError(
                    f"{name} was not started: the servers are being shut down, or it was given up."
                )
            child = ChildProcess(
                name,
                argv,
                env=env,
                log_path=self._new_log(name),
                grace_s=self._plan.timeouts.stop_s,
            )
            self._children.append(child)
        return child

    def _new_log(self, name: str) -> Path:
        """A log that nothing was written to, in a folder that may have been used before."""
        for number in itertools.count(1):
            path = self.log_dir / (f"{name}.log" if number == 1 else f"{name}.{number}.log")
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Ends router and servers, all at once; harmless twice."""
        with self._lock:
            self._stopped = True
            children, self._children = self._children, []
        for child in children:
            child.ask_stop()
        for child in reversed(children):
            child.stop()


def told(ended: Sequence[ChildProcess]) -> str:
    """How children ended, and where they logged it."""
    return " ".join(
        f"{child.name} ended with exit code {child.exit_code}"
        f"{f': {cause}' if (cause := child.cause()) else ''} (its log: {child.log_path})."
        for child in ended
    )


def _check_installed(python: str) -> str:
    """The router's version; raises `EngineNotFoundError` where something is missing."""
    versions = {name: installed_version(python, name) for name in ("sglang", "sglang-router")}
    for name, version in versions.items():
        if version is None:
            raise EngineNotFoundError(
                f"a managed start needs {name}, which {python} does not have. "
                "Install it there (GPU: pip install 'torchrl-sglang[sglang]'; CPU: the pinned "
                "lists in requirements/, which `make env` installs), name an environment that "
                "has it with server_python=, or attach to a running server with "
                "AsyncSGLang.connect(url)."
            )
    return str(versions["sglang-router"])


def _with_known_options(plan: FleetPlan) -> FleetPlan:
    """The plan in the words of what is installed; refuses options that it does not have.

    Else a server would say so half a minute later, and the router after all servers had started.
    """
    known = defaultdict(KnownOptions, known_options(plan.python))
    servers = tuple(
        replace(server, extra_args=known["sglang"].checked(server.extra_args, "SGLang's server"))
        for server in plan.servers
    )
    of_router = known["sglang_router"].checked(plan.router.extra_args, "sglang-router")
    return replace(plan, servers=servers, router=replace(plan.router, extra_args=of_router))


def _server_name(index: int) -> str:
    return f"server-{index}"


def _url_host(host: str) -> str:
    """The host part of a URL at which this machine reaches a server that listens on ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return local.get(host, f"[{host}]" if ":" in host else host)


def _fail_fast(starts: Sequence[Future[str]], stop: Callable[[], None]) -> Sequence[Future[str]]:
    """The finished starts; the first failure stops the others' children at once."""
    done, pending = wait(starts, return_when=FIRST_EXCEPTION)
    if pending:
        with contextlib.suppress(Exception):
            stop()
        for start in done:
            start.result()
    return starts
