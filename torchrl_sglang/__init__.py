"""SGLang as the rollout engine of a TorchRL training loop."""

from .config import RouterConfig, ServerConfig, Timeouts, WeightSyncConfig
from .generate.completion import Completion, VersionSpan
from .generate.partial import continuation, joined
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
from .policy.conversations import conversations
from .policy.mismatch import Mismatch, mismatch
from .policy.requests.rows import BehaviourLogProbWarning
from .policy.wrapper import SGLangWrapper
from .servers.gate import ServiceState
from .servers.lora import Adapters
from .service.engine import RLSGLangEngine
from .service.service import AsyncSGLang, make_sglang_server
from .sync.scheme import SGLangWeightSyncScheme
from .sync.sender import SGLangWeightReceiver, SGLangWeightSender, get_model_metadata
from .weights.result import PushResult
from .weights.source.sharded import assist_push

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
