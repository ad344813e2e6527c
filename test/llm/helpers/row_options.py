"""Rows with options of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

PROMPTS = [[i, 2 * i + 3, 77, 100 + i] for i in range(3, 7)]


def only(*ids: int) -> dict[int, float]:
    """A bias after which nothing else comes."""
    return dict.fromkeys(ids, 100.0)


def make_input(options: Sequence[Mapping[str, Any] | None] | None = None) -> Any:
    """The prompts, and options for each."""
    rows = []
    for index, prompt in enumerate(PROMPTS):
        row = TensorDict(tokens=Tokens(prompt=torch.tensor(prompt), batch_size=()), batch_size=())
        if options is not None and options[index] is not None:
            own = TensorDict({})
            for name, value in options[index].items():
                own.set(name, value if isinstance(value, torch.Tensor) else NonTensorData(value))
            row.set("sampling", own)
        rows.append(row)
    return lazy_stack(rows)
