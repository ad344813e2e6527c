"""Holds named tensors of which some are made only when they are looked up, one at a time."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence

import torch


class LazyWeights(Mapping[str, torch.Tensor]):
    """Weights that are never whole in memory at once.

    Args:
        parts: tensors of the same names, shapes and devices, which cost nothing to ask for those.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        self.parts = parts

    @abc.abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor:
        """Makes one tensor."""

    def announce(self, names: Sequence[str]) -> None:
        """Says which tensors will be looked up next, in this order."""

    def drain(self) -> None:
        """Gives up what was announced and not looked up."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def placeholders(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Tensors of which shape, dtype and device can be asked without making anything."""
    return weights.parts if isinstance(weights, LazyWeights) else weights
