"""TorchRL's collectors, and what counts the versions of their policies."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import InitTracker
from torchrl.envs.llm import ChatEnv

from helpers.prompts import EIGHT_PROMPTS
from helpers.servers import asked, told, worst_error
from torchrl_sglang import AsyncSGLang, SGLangWrapper

SAMPLING = {"max_new_tokens": 8, "ignore_eos": True}


def make_env(tokenizer: Any, batch_size: int = 4) -> Any:
    loader = DataLoader(
        ["the quick", "hello", "no", "42"] * 100,
        batch_size=batch_size,
        collate_fn=lambda queries: {"query": queries},
    )
    return ChatEnv.from_dataloader(
        loader, batch_size=(batch_size,), tokenizer=tokenizer, input_mode="history"
    ).append_transform(InitTracker())


def make_collector(service: AsyncSGLang, tokenizer: Any, **kwargs: Any) -> LLMCollector:
    return LLMCollector(
        make_env(tokenizer),
        policy=SGLangWrapper(service, generate_kwargs=SAMPLING),
        dialog_turns_per_batch=4,
        total_dialog_turns=400,
        **kwargs,
    )


def served_error(service: AsyncSGLang, model: Any) -> float:
    return worst_error(model, EIGHT_PROMPTS, service.generate(EIGHT_PROMPTS, SAMPLING))


class Counter:
    """What a collector in another process (Ray) shows of its versions."""

    def __init__(self, version: Any = 0) -> None:
        self.version = version
        self.bumps = 0

    @property
    def policy_version(self) -> Any:
        return self.version

    def increment_version(self) -> None:
        self.bumps += 1
        if isinstance(self.version, int):
            self.version += 1


def server_versions(service: AsyncSGLang) -> list[str]:
    return [asked(worker, "/model_info")["weight_version"] for worker in service.workers]


def at_version(service: AsyncSGLang, version: int) -> None:
    """Tells the servers what they run, as an earlier trainer would have."""
    for worker in service.workers:
        body = {"new_version": str(version), "abort_all_requests": False}
        told(worker, "/update_weight_version", body)
    service.servers.versions.set_pushed(version)
