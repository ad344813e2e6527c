"""How many requests each server has done."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from helpers.servers import asked
from torchrl_sglang import AsyncSGLang

COUNTERS = {
    "requests": "sglang:num_requests_total",
    "prompt": "sglang:prompt_tokens_total",
    "generated": "sglang:generation_tokens_total",
    "cached": "sglang:cached_tokens_total",
}


Counts = dict[str, int]


def counted(service: AsyncSGLang) -> list[Counts]:
    """What every worker says it has done."""
    pages = [asked(worker, "/metrics") for worker in service.workers]
    return [
        {
            name: int(sum(map(float, re.findall(rf"^{counter}(?:{{.*}})? (\S+)$", page, re.M))))
            for name, counter in COUNTERS.items()
        }
        for page in pages
    ]


def done_by(service: AsyncSGLang, act: Callable[[], Any]) -> tuple[Any, list[Counts]]:
    """What an action returns, and what it made every worker do."""
    before = counted(service)
    result = act()
    after = counted(service)
    return result, [
        {name: new[name] - old[name] for name in COUNTERS}
        for old, new in zip(before, after, strict=True)
    ]
