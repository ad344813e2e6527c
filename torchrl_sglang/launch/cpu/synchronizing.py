"""Makes waiting for the GPU harmless where there is none.

Older releases of SGLang wait for the GPU in ``/weights_checker`` whatever the device is, and torch
refuses on a machine without CUDA. A CPU has nothing to wait for.
"""

from __future__ import annotations


def install() -> None:
    """Lets ``torch.cuda.synchronize`` return at once; nothing where CUDA exists."""
    try:
        import torch
    except ImportError:
        return  # SGLang says so itself, and better
    if not torch.cuda.is_available():
        torch.cuda.synchronize = _nothing_to_wait_for


def _nothing_to_wait_for(device: object = None) -> None:
    """Stands for ``torch.cuda.synchronize``."""
