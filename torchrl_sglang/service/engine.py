"""Defines `RLSGLangEngine`: what TorchRL's training recipes call on an SGLang engine."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class RLSGLangEngine(abc.ABC):
    """Abstract base of an SGLang engine that takes weight updates.

    Source: the class of the same name in TorchRL, whose methods it keeps.
    """

    @property
    @abc.abstractmethod
    def server_url(self) -> str:
        """URL that takes requests."""

    @property
    @abc.abstractmethod
    def model_path(self) -> str:
        """Folder or hub name of the model."""

    @abc.abstractmethod
    def generate(self, prompts: Any = None, sampling_params: Any = None, **options: Any) -> Any:
        """Completes one prompt or many."""

    @abc.abstractmethod
    def flush_cache(self) -> bool:
        """Empties the prefix caches; True once they are empty."""

    @abc.abstractmethod
    def shutdown(self) -> None:
        """Ends what the engine started."""

    @abc.abstractmethod
    def get_tp_size(self) -> int:
        """Tensor-parallel ranks per server."""

    @abc.abstractmethod
    def get_dp_size(self) -> int:
        """Data-parallel ranks per server."""

    @abc.abstractmethod
    def get_master_address(self) -> str:
        """Address at which servers reach this process for a weight update."""

    @abc.abstractmethod
    def get_master_port(self) -> int:
        """A port of this process for the weight updates' rendezvous; the same at every call."""

    @abc.abstractmethod
    def get_model_metadata(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Name, dtype and shape of each parameter that a push sends."""

    @abc.abstractmethod
    def init_weight_update_group(
        self, master_address: str | None = None, master_port: int | None = None
    ) -> None:
        """Joins this process and all ranks of all servers into one collective."""

    @abc.abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Pushes a whole model."""

    @abc.abstractmethod
    def update_weights_from_distributed(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """Announces one tensor of a broadcast."""
