"""Hands over GPU work that one thread has queued to the thread that goes on with it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch


def handed_over(
    tensors: Iterable[torch.Tensor], device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """Hands tensors that this thread's streams may still be writing to another thread.

    Args:
        tensors: whatever was queued here to make them is waited for there, on the GPU.
        device: becomes the other thread's current one, if it is a GPU. What was queued there is
            waited for too: memory that was allocated here may still be in use by it.

    Returns:
        What the other thread enters to use the tensors, on streams of its own: it neither waits for
        what is queued here later, nor does that wait for it.
    """
    gpus = {tensor.device for tensor in tensors if tensor.is_cuda}
    gpus |= {device} if device.type == "cuda" else set()
    written = {gpu: torch.cuda.current_stream(gpu).record_event() for gpu in gpus}
    # The last one that is entered stays the current device.
    order = [*(gpus - {device}), *([device] if device.type == "cuda" else [])]

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for gpu in order:
                stream = _stream_beside(gpu)
                stream.wait_event(written[gpu])
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return entered


@functools.cache
def _stream_beside(gpu: torch.device) -> torch.cuda.Stream:
    """One for all pushes: memory that was allocated on a stream is used again on that one alone."""
    return torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
