"""A server counts the tokens whose experts it computes anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from helpers.servers import needs_version_spans, num_running, perturb, told, wait_until
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme


def test_the_server_counts_what_it_computes_anew(
    service: AsyncSGLang, model: Any, connected: Callable[..., SGLangWeightSyncScheme]
) -> None:
    """That is the sign of it; without a push there is none."""
    needs_version_spans(service)
    scheme = connected()

    def ask(count: int) -> Any:
        body = {
            "input_ids": [5, 6, 7],
            "sampling_params": {"max_new_tokens": count, "ignore_eos": True},
        }
        return told(service.workers[0], "/generate", body, timeout_s=60.0)["meta_info"]

    assert ask(2)["num_retractions"] == 0
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, 400)
        wait_until(lambda: num_running(service) == 1)
        time.sleep(0.2)  # some tokens
        scheme.send(perturb(model, seed=3))
        meta = asked.result(60.0)
    assert len(meta["weight_versions"]) == 2
    assert meta["num_retractions"] == 1
