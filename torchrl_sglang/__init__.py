"""SGLang as the rollout engine of a TorchRL training loop."""

from .adapters import Adapters
from .completions import Completion, VersionSpan
from .config import RouterConfig, ServerConfig, Timeouts, WeightSyncConfig
from .engine import RLSGLangEngine
from .gate import ServiceState
from .mismatch import Mismatch, mismatch
from .partial import continuation, joined
from .policy import SGLangWrapper
from .processors import (
    allowed_tokens,
    combined,
    disallowed_tokens,
    progress_temperature,
    user_processor,
)
from .protocol import GenerateRequest, LogitProcessor, Media, Returns
from .rollout.conversations import conversations
from .rollout.row_requests import BehaviourLogProbWarning
from .sampling import SamplingParams
from .service import AsyncSGLang, make_sglang_server
from .sessions import Session
from .weights.result import PushResult
from .weights.scheme import SGLangWeightSyncScheme
from .weights.sender import SGLangWeightReceiver, SGLangWeightSender, get_model_metadata
from .weights.sharded import assist_push

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
