"""`RLSGLangEngine`: what TorchRL's training recipes call on an SGLang engine."""

from __future__ import annotations

import abc
import socket
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import NotConnectedError
from .launch.ports import PortReservation

if TYPE_CHECKING:
    import torch

    from .weights.update import WeightPusher


class RLSGLangEngine(abc.ABC):
    """Abstract base of an SGLang engine that takes weight updates.

    Source: the class of the same name in TorchRL, whose methods it keeps.
    """

    _master_port: int | None = None
    _pusher: WeightPusher | None = None

    @property
    @abc.abstractmethod
    def server_url(self) -> str:
        """URL that takes requests."""

    @property
    @abc.abstractmethod
    def model_path(self) -> str:
        """Folder or hub name of the model."""

    @abc.abstractmethod
    def generate(self, prompts: Any, sampling_params: Any = None) -> Any:
        """Completes one prompt or many."""

    @abc.abstractmethod
    def flush_cache(self) -> None:
        """Empties the prefix caches."""

    @abc.abstractmethod
    def shutdown(self) -> None:
        """Ends what the engine started."""

    @abc.abstractmethod
    def get_tp_size(self) -> int:
        """Tensor-parallel ranks per server."""

    @abc.abstractmethod
    def get_dp_size(self) -> int:
        """Data-parallel ranks per server."""

    def get_master_address(self) -> str:
        """Address at which servers reach this process for a weight update."""
        return local_address(self.server_url)

    def get_master_port(self) -> int:
        """A port of this process for the weight updates' rendezvous; the same at every call."""
        if self._master_port is None:
            with PortReservation("0.0.0.0") as free:
                self._master_port = free.port
        return self._master_port

    def get_model_metadata(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Name, dtype and shape of each parameter that a push sends, from the model's config.

        Raises:
            WeightsError: the model's config can't be loaded here.
        """
        from .weights.expected import expected_parameters

        return expected_parameters(self.model_path)

    def init_weight_update_group(
        self, master_address: str | None = None, master_port: int | None = None
    ) -> None:
        """Joins this process and all ranks of all servers into one collective.

        Args:
            master_address: address at which the servers reach this process.
            master_port: port of the rendezvous; a free one by default.
        """
        from .weights.update import WeightPusher

        self._pusher = WeightPusher(self, master_address=master_address, master_port=master_port)
        self._pusher.connect()

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Pushes a whole model.

        Args:
            weights: name and tensor of every parameter, in Hugging Face's names.

        Raises:
            NotConnectedError: before `init_weight_update_group`.
            WeightSyncError: as `SGLangWeightSyncScheme.send`.
        """
        if self._pusher is None:
            raise NotConnectedError("call init_weight_update_group() before update_weights().")
        self._pusher.push(dict(iter_pairs(weights)))


def iter_pairs(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs of a mapping or of an iterator."""
    items = getattr(weights, "items", None)
    return iter(items() if items is not None else weights)


def local_address(url: str) -> str:
    """Address of the interface over which this machine reaches ``url``."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
