"""Lists, adds and removes the servers behind a router."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ..errors import ConnectError, NoWorkersError, RequestRefusedError, ServiceError
from .control import ControlClient
from .http import path_hint
from .info import parse_worker_urls

ROUTER_POLL_S = 0.1


def worker_urls(front: ControlClient) -> list[str] | None:
    """The workers' URLs, or None where ``front`` is a server itself."""
    try:
        answer = front.workers()
    except RequestRefusedError as error:
        if error.status in (404, 405):
            return None
        raise ConnectError(
            f"can't list the workers of {front.url}: {error}.{path_hint(front.url)}"
        ) from error
    except ServiceError as error:
        raise ConnectError(f"can't attach to {front.url}: {error}") from error
    urls = parse_worker_urls(answer)
    if urls is None:
        raise ConnectError(
            f"{front.url} answers, but neither as an SGLang server nor as an SGLang router: "
            f"GET /workers gave {str(answer)[:200]!r}.{path_hint(front.url)}"
        )
    if not urls:
        raise NoWorkersError(
            f"the router at {front.url} has no workers: start a server and add it with "
            f'POST {front.url}/workers {{"url": "http://server:30000"}}.'
        )
    return urls


def remove_from_router(router: ControlClient, url: str) -> None:
    """Asks a router to forget a server; one that it does not know is no error."""
    with contextlib.suppress(ServiceError):  # its own checks find out, only later
        for worker in _routed(router, url):
            router.remove_worker(worker["id"])


def add_to_router(router: ControlClient, url: str, api_key: str | None, timeout_s: float) -> None:
    """Has a router send to a server again, as to one that it never saw fail.

    Raises:
        ConnectError: the router does not take it.
    """
    deadline = time.monotonic() + timeout_s
    remove_from_router(router, url)
    while _routed(router, url):
        _wait_for_router(url, deadline)
    router.add_worker(url, api_key)
    while not any(worker.get("is_healthy") for worker in _routed(router, url)):
        _wait_for_router(url, deadline)


def _routed(router: ControlClient, url: str) -> list[dict[str, Any]]:
    """What a router says of a server."""
    workers = router.workers().get("workers", ())
    return [worker for worker in workers if str(worker.get("url", "")).rstrip("/") == url]


def _wait_for_router(url: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ConnectError(f"the router did not take {url} back.")
    time.sleep(ROUTER_POLL_S)
