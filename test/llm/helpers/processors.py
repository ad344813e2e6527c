"""Processors as users write them, and a stand-in for SGLang's request."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import dill
import torch

from torchrl_sglang.generate.request import LogitProcessor

# Classes as a user writes them.


class Force:
    """Only ``params["token"]`` can be sampled."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        forced = torch.full_like(logits, -math.inf)
        tokens = torch.tensor([row["token"] for row in params])
        return forced.scatter_(1, tokens[:, None], 0.0)


class Raising:
    """A bug."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        raise KeyError("missing")


class NaNRow:
    """NaN in the rows that ask for it."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        for row, own in zip(logits, params, strict=True):
            if own["nan"]:
                row[3] = math.nan
        return logits


class NothingLeft:
    """Every logit is -inf."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        return torch.full_like(logits, -math.inf)


class NotMade:
    """An ``__init__`` that fails, on the server."""

    def __init__(self) -> None:
        raise OSError("no such table")

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        return logits


def load(processor: LogitProcessor) -> Any:
    """As SGLang's ``CustomLogitProcessor.from_str``."""
    return dill.loads(bytes.fromhex(json.loads(processor.serialized)["callable"]))()


def fake_req(generated: int = 0, temperature: float = 1.0) -> Any:
    return SimpleNamespace(
        origin_input_ids=[1, 2, 3],
        output_ids=[0] * max(generated - 1, 0),  # as in the overlapped schedule
        kv=SimpleNamespace(kv_committed_len=3 + generated),
        sampling_params=SimpleNamespace(temperature=temperature),
        to_finish=None,
    )


def rows_of(processors: Sequence[LogitProcessor], reqs: Sequence[Any]) -> list[dict[str, Any]]:
    """The ``custom_param_list`` after it went through JSON."""
    return [
        {**json.loads(json.dumps(p.params)), "__req__": req}
        for p, req in zip(processors, reqs, strict=True)
    ]


def run(processors: Sequence[LogitProcessor], logits: torch.Tensor, reqs: Any = None) -> Any:
    """One step of rows that share a processor's text."""
    assert len({p.serialized for p in processors}) == 1
    reqs = reqs or [fake_req() for _ in processors]
    return load(processors[0])(logits, rows_of(processors, reqs))
