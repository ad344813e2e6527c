"""Weights that several ranks of a trainer hold in parts (FSDP2): gathered one by one, by all ranks.

Rank 0 pushes. It says which tensor comes next, and the others, who are in `assist_push`, gather it
along with it and forget it. Nobody ever holds the whole model twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import PushError, WeightsError
from .collective import hear, say, trainer_rank
from .lazy import LazyWeights
from .source import named_weights, shown


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one rank's part of a larger one (``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; all ranks of its mesh have to ask for it."""
    gathered: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


class ShardedWeights(LazyWeights):
    """Named tensors of which some are sharded; looking one up gathers it, on all ranks.

    Args:
        parts: the tensors as this rank has them.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__(parts)
        self._announced: list[str] = []

    def announce(self, names: Sequence[str]) -> None:
        """Says in one message which tensors will be looked up next, in this order."""
        sharded = [name for name in names if is_sharded(self.parts[name])]
        self._announced += sharded
        say(("gather", sharded))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.parts[name]
        if not is_sharded(tensor):
            return tensor
        if not self._announced:
            self.announce([name])
        if self._announced[0] != name:
            raise RuntimeError(f"{name} is looked up, but {self._announced[0]} was announced")
        self._announced.pop(0)
        return whole(tensor)

    def drain(self) -> None:
        """Gathers what was announced and not looked up: the other ranks wait in it."""
        while self._announced:
            whole(self.parts[self._announced.pop(0)])


@contextlib.contextmanager
def leading(source: Any) -> Iterator[None]:
    """A push of weights that may be sharded: when it is over, the other ranks are let go.

    Raises:
        WeightsError: this rank is not the one that pushes.
    """
    if not any(map(is_sharded, _tensors(source))):
        yield
        return
    check_leader()
    try:
        yield
    except BaseException as error:
        say(("done", f"{type(error).__name__}: {error}"))
        raise
    say(("done", None))


def _tensors(source: Any) -> Iterable[Any]:
    if isinstance(source, nn.Module):
        return source.parameters()
    return source.values() if isinstance(source, Mapping) else ()


def check_leader() -> None:
    """Raises `WeightsError` on a rank other than 0 that tries to push sharded weights."""
    if trainer_rank() != 0:
        raise WeightsError(
            f"rank {trainer_rank()} pushes sharded weights: rank 0 pushes, the others call "
            "assist_push(model) at the same time."
        )


def assist_push(source: Any) -> None:
    """Gathers sharded weights along with rank 0, which pushes them at the same time.

    Every rank of the trainer but 0 calls this where rank 0 calls ``send``.

    Args:
        source: the same model, or state dict, as on rank 0, with this rank's parts.

    Raises:
        WeightsError: this rank has other names than rank 0.
        PushError: the push failed on rank 0; says how.
    """
    weights = named_weights(source)
    missing: list[str] = []
    while True:
        kind, *said = hear()
        if kind == "done":
            [error] = said
            if error is not None:
                raise PushError(f"rank 0 said: {error}", step="push")
            if missing:
                raise WeightsError(f"this rank has no {shown(missing)}, which rank 0 pushed.")
            return
        [names] = said
        missing += [name for name in names if name not in weights]
        for name in names:
            if name in weights:
                whole(weights[name])
