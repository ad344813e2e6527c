"""Defines a carrier, which gets weights from a trainer into every server: the seam of all ways."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..buckets import Bucket
from ..result import StepTimer


class Carrier(abc.ABC):
    """Carries the weights of one push after the other to a fixed set of servers.

    Attributes:
        method: its name in `PushResult`.
        order: the method of `ControlClient` that gives servers its weights.
        begins_and_ends: the servers take its weights between begin and end of an update.
    """

    method: ClassVar[str]
    order: ClassVar[str]
    begins_and_ends: ClassVar[bool] = True

    def __init__(self) -> None:
        self._connected = False

    @property
    def is_connected(self) -> bool:
        """Whether weights can be carried now."""
        return self._connected

    def connect(self) -> None:
        """Makes ready; errors are the way's own."""
        self._connected = True

    def prepare(self, buckets: Sequence[Bucket]) -> None:  # noqa: B027
        """Gets what carrying these takes, while nothing is touched yet.

        Raises:
            WeightsError: they can't be carried.
        """

    @abc.abstractmethod
    def transfer(
        self,
        buckets: list[Bucket],
        weights: Mapping[str, torch.Tensor],
        timer: StepTimer,
    ) -> str:
        """Carries all buckets and returns once every server has loaded them.

        Args:
            buckets: the plan.
            weights: the tensors, by name.
            timer: what it takes is added to its step ``transfer``.

        Returns:
            The layout that was used.

        Raises:
            PushError: names the bucket, and the engine unless it was the trainer's end.
        """

    def drop(self) -> None:
        """Lets go at once, of servers that can't be trusted any more; harmless twice."""
        self._connected = False

    def close(self) -> None:
        """Lets go in order; harmless twice."""
        self.drop()
