"""SGLang as the rollout engine of a TorchRL training loop."""

from .completions import Completion, VersionSpan
from .config import RouterConfig, ServerConfig, Timeouts, WeightSyncConfig
from .engine import RLSGLangEngine
from .gate import ServiceState
from .policy import SGLangWrapper
from .protocol import GenerateRequest
from .rollout.row_requests import BehaviourLogProbWarning
from .sampling import SamplingParams
from .service import AsyncSGLang, make_sglang_server
from .weights.result import PushResult
from .weights.scheme import SGLangWeightSyncScheme

__all__ = [
    "AsyncSGLang",
    "BehaviourLogProbWarning",
    "Completion",
    "GenerateRequest",
    "PushResult",
    "RLSGLangEngine",
    "RouterConfig",
    "SGLangWeightSyncScheme",
    "SGLangWrapper",
    "SamplingParams",
    "ServerConfig",
    "ServiceState",
    "Timeouts",
    "VersionSpan",
    "WeightSyncConfig",
    "make_sglang_server",
]
