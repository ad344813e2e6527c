"""Payloads on their way, and what tells whose fault it is when they don't arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

import torch

# Given a function that returns (or, on a GPU, holds the stream) until payload number so and so was
# sent, yields the tensors of one payload after another.
MakePayloads = Callable[[Callable[[int], None]], Iterable[Sequence[torch.Tensor]]]


class Sending:
    """Payloads on their way.

    Attributes:
        done: finished when all were sent; holds the error if one was not.
        at: number of the payload that is being made or waited for.
    """

    def __init__(self) -> None:
        self.done: Future[None] = Future()
        self.at = 0


class WireError(RuntimeError):
    """A broadcast failed: another rank is gone, or this one left."""


@contextlib.contextmanager
def on_the_wire() -> Iterator[None]:
    """Tells what the collective raises from what goes wrong while a payload is made."""
    try:
        yield
    except RuntimeError as error:
        raise WireError(str(error)) from error
