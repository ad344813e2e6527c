"""Makes requests for pinned memory harmless where there is no accelerator to pin it for.

SGLang's LoRA layers ask for pinned host memory whatever the device is, and torch refuses on a
machine without an accelerator. Pinning only speeds up copies to one, so here it is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# The functions that SGLang's ``torch_native`` LoRA backend and layers pass ``pin_memory=True`` to.
FACTORIES = ("empty", "tensor", "zeros")


def install() -> None:
    """Drops ``pin_memory`` from torch's factories, once; nothing where an accelerator exists."""
    try:
        import torch
    except ImportError:
        return  # SGLang says so itself, and better
    if torch.accelerator.is_available() or hasattr(torch.zeros, "__wrapped__"):
        return
    for name in FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = _as_it_is  # type: ignore[method-assign,assignment]


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _as_it_is(tensor: Any, device: object = None) -> Any:
    """Stands for ``Tensor.pin_memory``."""
    return tensor
