"""Which weights servers run, by asking them all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait

from .client import ControlClient
from .completions import INITIAL_VERSION
from .threads import in_thread

ASK_S = 2.0


def ask_versions(workers: Iterable[ControlClient]) -> dict[Future[str], str]:
    """Asks servers for the version of their weights; the answers, and whose URL each is.

    Takes two times `ASK_S` at most. An answer that did not come by then does not count.
    """

    def ask(worker: ControlClient) -> str:
        answer = worker.get("/model_info", timeout_s=ASK_S)
        return str(answer.get("weight_version", INITIAL_VERSION))

    asked = {in_thread(lambda w=w: ask(w), "torchrl_sglang-ask"): w.url for w in workers}
    wait(asked, 2 * ASK_S)
    return asked


def answered(asked: Mapping[Future[str], str]) -> dict[str, str]:
    """The versions of those that answered, by URL."""
    return {
        url: answer.result()
        for answer, url in asked.items()
        if answer.done() and answer.exception() is None
    }
