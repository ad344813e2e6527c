"""Pushed adapters: what is asked of the servers, and who else is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helpers.prompts import LORA_PROMPTS
from helpers.servers import connect_like, worst_error
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams

FROM_TENSORS, FROM_FOLDER = "/load_lora_adapter_from_tensors", "/load_lora_adapter"


def attach(url: str, service: AsyncSGLang, **timeouts: float) -> AsyncSGLang:
    """Another service on the same server, which knows nothing of what the first one did."""
    return connect_like(
        service,
        url,
        timeouts=replace(service.timeouts, **timeouts),
    )


def requests_of(
    lora: str | None, prompts: Sequence[Sequence[int]] = LORA_PROMPTS, **sampling: Any
) -> Any:
    usual = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    params = SamplingParams(**{**usual, **sampling})
    return [GenerateRequest(input_ids=tuple(p), sampling=params, lora=lora) for p in prompts]


def generated(service: AsyncSGLang, lora: str | None = "policy") -> Any:
    return service.generate(requests_of(lora))


def is_run(service: AsyncSGLang, model: Any, lora: str | None = "policy") -> bool:
    """Whether what is generated is of that model, by every log-prob."""
    return worst_error(model, LORA_PROMPTS, generated(service, lora)) < 0.02


def versions(completions: Any) -> set[str]:
    return {span.version for one in completions for span in one.version_spans}
