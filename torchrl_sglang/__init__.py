"""SGLang as the rollout engine of a TorchRL training loop.

The public names are loaded when they are first used, so that `torchrl_sglang.errors`, `.config` and
what needs only these come without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import RouterConfig, ServerConfig, Timeouts, WeightSyncConfig

if TYPE_CHECKING:
    from .generate.completion import Completion, VersionSpan, joined
    from .generate.partial import continuation
    from .generate.processors.make import (
        allowed_tokens,
        combined,
        disallowed_tokens,
        progress_temperature,
        user_processor,
    )
    from .generate.request import GenerateRequest, LogitProcessor, Media, Returns
    from .generate.sampling import SamplingParams
    from .generate.sessions import Session
    from .policy.mismatch import Mismatch, mismatch
    from .policy.requests.rows import BehaviourLogProbWarning
    from .policy.training_rows import conversations
    from .policy.wrapper import SGLangWrapper
    from .servers.gate import ServiceState
    from .servers.lora import Adapters
    from .service.engine import RLSGLangEngine
    from .service.service import AsyncSGLang, make_sglang_server
    from .sync.scheme import SGLangWeightSyncScheme
    from .sync.sender import SGLangWeightReceiver, SGLangWeightSender, get_model_metadata
    from .weights.result import PushResult
    from .weights.source.sharded import assist_push

# Where the others are.
HOMES = {
    "Adapters": "servers.lora",
    "AsyncSGLang": "service.service",
    "BehaviourLogProbWarning": "policy.requests.rows",
    "Completion": "generate.completion",
    "GenerateRequest": "generate.request",
    "LogitProcessor": "generate.request",
    "Media": "generate.request",
    "Mismatch": "policy.mismatch",
    "PushResult": "weights.result",
    "RLSGLangEngine": "service.engine",
    "Returns": "generate.request",
    "SGLangWeightReceiver": "sync.sender",
    "SGLangWeightSender": "sync.sender",
    "SGLangWeightSyncScheme": "sync.scheme",
    "SGLangWrapper": "policy.wrapper",
    "SamplingParams": "generate.sampling",
    "ServiceState": "servers.gate",
    "Session": "generate.sessions",
    "VersionSpan": "generate.completion",
    "allowed_tokens": "generate.processors.make",
    "assist_push": "weights.source.sharded",
    "combined": "generate.processors.make",
    "continuation": "generate.partial",
    "conversations": "policy.training_rows",
    "disallowed_tokens": "generate.processors.make",
    "get_model_metadata": "sync.sender",
    "joined": "generate.completion",
    "make_sglang_server": "service.service",
    "mismatch": "policy.mismatch",
    "progress_temperature": "generate.processors.make",
    "user_processor": "generate.processors.make",
}

__all__ = [
    "Adapters",
    "AsyncSGLang",
    "BehaviourLogProbWarning",
    "Completion",
    "GenerateRequest",
    "LogitProcessor",
    "Media",
    "Mismatch",
    "PushResult",
    "RLSGLangEngine",
    "Returns",
    "RouterConfig",
    "SGLangWeightReceiver",
    "SGLangWeightSender",
    "SGLangWeightSyncScheme",
    "SGLangWrapper",
    "SamplingParams",
    "ServerConfig",
    "ServiceState",
    "Session",
    "Timeouts",
    "VersionSpan",
    "WeightSyncConfig",
    "allowed_tokens",
    "assist_push",
    "combined",
    "continuation",
    "conversations",
    "disallowed_tokens",
    "get_model_metadata",
    "joined",
    "make_sglang_server",
    "mismatch",
    "progress_temperature",
    "user_processor",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
