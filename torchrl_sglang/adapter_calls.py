"""What is asked of servers about their LoRA adapters, one server or all at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .client import ControlClient
from .errors import RequestRefusedError, ResponseError, ServiceError

T = TypeVar("T")


def registered(worker: ControlClient) -> frozenset[str]:
    """Names from ``/v1/models``, which lists the base model too; only adapters have a parent."""
    answer = worker.get("/v1/models")
    try:
        return frozenset(card["id"] for card in answer["data"] if card.get("parent") is not None)
    except (KeyError, TypeError, AttributeError) as error:
        raise ResponseError(
            f"GET {worker.url}/v1/models gave no list of models: {str(answer)[:200]!r}."
        ) from error


def unload(name: str, timeout_s: float | None, worker: ControlClient) -> bool:
    """Whether the server had it."""
    try:
        worker.post("/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)
    except RequestRefusedError:
        if name in registered(worker):
            raise
        return False
    return True


def ask_all(
    call: Callable[[ControlClient], T], workers: Sequence[ControlClient]
) -> tuple[dict[ControlClient, T], dict[ControlClient, ServiceError]]:
    """Calls for all workers at once: the answers, and the errors of those that failed."""
    answers: dict[ControlClient, T] = {}
    errors: dict[ControlClient, ServiceError] = {}
    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        futures = {worker: pool.submit(call, worker) for worker in workers}
        for worker, future in futures.items():
            try:
                answers[worker] = future.result()
            except ServiceError as error:
                errors[worker] = error
    return answers, errors


def list_of(registries: Iterable[frozenset[str]]) -> str:
    """What all of some servers have, in words."""
    names = sorted(frozenset.intersection(*registries))
    return f"every server has {', '.join(map(repr, names)) or 'none'}."


def said(error: ServiceError) -> str:
    """SGLang's own words, which for adapters are in a field of their own."""
    try:
        words = json.loads(getattr(error, "body", "")).get("error_message")
    except (ValueError, AttributeError):
        words = None
    return str(words or error)
