"""Sends single requests over HTTP: keys, refusals, time-outs and retries."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import requests

from ..config import Timeouts
from ..errors import (
    ConfigError,
    ConnectError,
    NoWorkersError,
    RequestRefusedError,
    RequestTimeoutError,
    ServerFailedError,
    ServiceError,
)

T = TypeVar("T")

# Waits between the attempts of one request grow from the first to the last of these.
FIRST_BACKOFF_S = 0.2
LAST_BACKOFF_S = 5.0

UNAUTHORIZED = 401


def normalise_url(url: str) -> str:
    """Checks a base URL and takes trailing slashes off; a path in it is kept.

    Raises:
        ConfigError: not an http(s) URL, or one with more than a host, a port and a path.
    """
    if not isinstance(url, str):
        raise ConfigError(f"a server URL is a string such as 'http://host:30000', got {url!r}.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not a server URL; write it like 'http://host:30000'.")
    if parts.query or parts.fragment or not _has_port_or_none(parts):
        raise ConfigError(
            f"{url!r} is not a server URL: after the host come at most a port below 65536 and a "
            "path; write it like 'http://host:30000'."
        )
    return url.strip().rstrip("/")


def _has_port_or_none(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def path_hint(url: str) -> str:
    """What to say where a URL with a path is answered as if nothing were there; else nothing."""
    parts = urlsplit(url)
    if not parts.path:
        return ""
    base = f"{parts.scheme}://{parts.netloc}"
    return (
        f" The URL has the path {parts.path!r}: routes are added here, so leave it out and pass "
        f"{base!r}, unless a gateway serves SGLang under that path."
    )


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def backoff_s(attempt: int) -> float:
    """How long to wait after the first, second, ... attempt has failed."""
    return min(FIRST_BACKOFF_S * 2.0 ** (attempt - 1), LAST_BACKOFF_S)


def retried(call: Callable[[], T], within_s: float) -> T:
    """The result of ``call``, made again while the connection or the server fails.

    Raises:
        NoWorkersError: at once; no other try helps.
        ServerFailedError, ConnectError: it still failed after ``within_s``.
    """
    give_up, attempt = time.monotonic() + within_s, 1
    while True:
        try:
            return call()
        except NoWorkersError:
            raise
        except (ServerFailedError, ConnectError):
            if time.monotonic() + backoff_s(attempt) > give_up:
                raise
        time.sleep(backoff_s(attempt))
        attempt += 1


def refusal(method: str, url: str, status: int, body: str) -> ServiceError:
    """The error for an HTTP status of 400 and above."""
    message = f"{method} {url} answered {status}: {server_message(body)}"
    if status in (401, 403):
        message += " (pass the server's api_key= and admin_api_key=)"
    # 408 and 429 ask for another try later, as 5xx do.
    failed = status >= 500 or status in (408, 429)
    kind = ServerFailedError if failed else RequestRefusedError
    return kind(message, status=status, body=body)


def server_message(body: str) -> str:
    """The human part of an error body, in whichever of SGLang's shapes it comes."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body.strip()[:2000] or "no message"
    error = answer
    if isinstance(answer, dict):
        error = answer.get("error") or answer.get("error_message") or answer
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or error)[:2000]
    return str(error)[:2000]


class HTTPClient:
    """Requests to one server or router. Safe to use from several threads.

    Args:
        url: base URL; a path in it is kept.
        api_key: key for info routes.
        admin_api_key: key for control routes; the API key where a server has only one.
        timeouts: bounds on waiting.
    """

    def __init__(
        self, url: str, *, api_key: str | None, admin_api_key: str | None, timeouts: Timeouts
    ) -> None:
        self.url = normalise_url(url)
        self._api_key = api_key
        self._admin_api_key = admin_api_key or api_key
        self._timeouts = timeouts
        self._local = threading.local()

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """GETs JSON (or text); errors as in `post`."""
        return self._send("GET", path, None, timeout_s or self._timeouts.connect_s)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        admin: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """POSTs JSON and returns the answer's JSON (or text).

        Args:
            path: route, with its leading slash.
            body: the JSON object.
            admin: a server with an admin key gives this route only to that key, as of SGLang
                0.5.23. Older ones give some of them only to the other, which is tried then.
            timeout_s: bound on the whole request; ``Timeouts.control_s`` by default.

        Raises:
            RequestRefusedError: 4xx.
            ServerFailedError: 5xx, or the connection broke.
            RequestTimeoutError: no answer in time.
            ConnectError: nothing listens there.
        """
        return self._send("POST", path, body or {}, timeout_s or self._timeouts.control_s, admin)

    def delete(self, path: str, *, timeout_s: float | None = None) -> Any:
        """DELETEs; errors as in `post`."""
        return self._send("DELETE", path, None, timeout_s or self._timeouts.control_s)

    def listens(self, timeout_s: float) -> bool:
        """Whether anything takes connections at the server's address."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((str(parts.hostname), port), timeout_s).close()
        except OSError:
            return False
        return True

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        admin: bool = False,
    ) -> Any:
        url = self.url + path
        keys = [self._admin_api_key, self._api_key] if admin else [self._api_key]
        try:
            for key in dict.fromkeys(keys):
                response = self._session().request(
                    method,
                    url,
                    json=body,
                    headers=bearer(key),
                    timeout=(min(timeout_s, self._timeouts.connect_s), timeout_s),
                )
                if response.status_code != UNAUTHORIZED:
                    break
        except requests.Timeout as error:
            raise RequestTimeoutError(
                f"{method} {url} got no answer within {timeout_s:g} s."
            ) from error
        except requests.ConnectionError as error:
            raise _connection_error(method, url, error) from error
        except requests.RequestException as error:
            raise ServerFailedError(f"{method} {url} failed: {error}") from error
        if response.status_code >= 400:
            raise refusal(method, url, response.status_code, response.text)
        try:
            return response.json()
        except ValueError:
            return response.text

    def _session(self) -> requests.Session:
        """One session per thread; ``requests`` does not promise more."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False  # no proxy between trainer and servers
        session: requests.Session = self._local.session
        return session

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def _connection_error(method: str, url: str, error: Exception) -> ServiceError:
    if "NewConnectionError" in repr(error) or "refused" in str(error):
        return ConnectError(f"nothing answers at {url}: is the server running there? ({error})")
    return ServerFailedError(f"{method} {url}: the connection broke: {error}")
