"""`RLSGLangEngine`: what TorchRL's training recipes call on an SGLang engine."""

from __future__ import annotations

import abc
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import NotConnectedError, UnsupportedOptionError
from .launch.ports import PortReservation

if TYPE_CHECKING:
    import torch

    from .weights.scheme import SGLangWeightSyncScheme


class RLSGLangEngine(abc.ABC):
    """Abstract base of an SGLang engine that takes weight updates.

    Source: the class of the same name in TorchRL, whose methods it keeps.
    """

    _master_port: int | None = None
    _pusher: SGLangWeightSyncScheme | None = None

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

        Leaves the one before, if there is one, also an `SGLangWeightSyncScheme`'s, with a warning.

        Args:
            master_address: address at which the servers reach this process.
            master_port: port of the rendezvous; a free one by default.

        Raises:
            AlreadyConnectedError: another weight sync of this process is in the middle of a push.
            TopologyError: a server can't take part.
            PushError: a server refused or did not come.
        """
        from .weights.scheme import SGLangWeightSyncScheme

        self.close_weight_update_group()
        engine: Any = self
        scheme = SGLangWeightSyncScheme(
            engine, master_address=master_address, master_port=master_port
        )
        scheme.connect()
        self._pusher = scheme

    def close_weight_update_group(self) -> None:
        """Leaves the collective; harmless without one."""
        if self._pusher is not None:
            self._pusher.close()
        self._pusher = None

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Pushes a whole model, under the number that follows the servers'.

        Args:
            weights: name and tensor of every parameter, in Hugging Face's names; an iterator may
                make them one by one, and is used up before anything is paused.

        Raises:
            NotConnectedError: before `init_weight_update_group`.
            WeightSyncError: as `SGLangWeightSyncScheme.send`.
        """
        if self._pusher is None or not self._pusher.synchronized_on_sender:
            raise NotConnectedError("call init_weight_update_group() before update_weights().")
        self._pusher.push(weights)

    def update_weights_from_distributed(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """Refuses: a push tells the servers of each tensor itself, when it broadcasts it.

        Args:
            name: not used.
            dtype: not used.
            shape: not used.

        Raises:
            UnsupportedOptionError: always.
        """
        raise UnsupportedOptionError(
            f"{name} is not announced by itself: a broadcast of yours would not be in the group "
            "that the servers joined. Call update_weights([(name, tensor), ...]), which announces "
            "and broadcasts, after init_weight_update_group()."
        )


def local_address(url: str) -> str:
    """Address of the interface over which this machine reaches ``url``."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
