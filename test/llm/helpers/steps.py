"""The steps of a push, and what comes after one that failed."""

from __future__ import annotations

import time
from typing import Any

from helpers.prompts import PROMPTS
from helpers.servers import worst_error
from torchrl_sglang import AsyncSGLang, ServiceState, SGLangWeightSyncScheme

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}


def repaired(service: AsyncSGLang, scheme: SGLangWeightSyncScheme, model: Any) -> float:
    """Seconds of the next full push, after which everything is as it should be."""
    begun = time.monotonic()
    scheme.send(model)
    took = time.monotonic() - begun
    assert service.state is ServiceState.SYNCED
    assert worst_error(model, PROMPTS, service.generate(PROMPTS, SAMPLING)) < 0.02
    return took


STEPS = {
    "init": "/init_weights_update_group",
    "pause": "/pause_generation",
    "flush": "/flush_cache",
    "begin": "/begin_weight_update",
    "transfer": "/update_weights_from_distributed",
    "end": "/end_weight_update",
    "verify": "/weights_checker",
    "version": "/update_weight_version",
    "continue": "/continue_generation",
}


NORM = "model.norm.weight"
