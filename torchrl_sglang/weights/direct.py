"""Pushes by a script's own call, under the names of TorchRL's abstract engine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import NotConnectedError, UnsupportedOptionError
from ..launch.ports import PortReservation
from ..servers.members import Servers
from .connection import Link
from .push import FullPusher, abandon_with
from .source.expected import expected_parameters
from .source.named import taken_in
from .source.sharded import leading

NOT_JOINED = "call init_weight_update_group() before update_weights()."


class DirectSync:
    """A weight sync without a collector: each push has the number that follows the servers'.

    Args:
        servers: whom it pushes to.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._master_port: int | None = None
        self._pusher: FullPusher | None = None
        self._abandon: weakref.finalize[..., object] | None = None
        self._left = NOT_JOINED

    def get_master_address(self) -> str:
        """Address at which servers reach this process for a weight update."""
        return self._servers.master_address

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
        return expected_parameters(self._servers.model_path)

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
        self.close_weight_update_group()
        pusher = FullPusher(
            Link(self._servers, master_address=master_address, master_port=master_port)
        )
        self._servers.gate.take(self)
        self._pusher, self._left = pusher, NOT_JOINED  # so that it gives no way while it joins
        self._abandon = abandon_with(self, pusher)
        try:
            pusher.connect()
        except BaseException:
            self._leave()
            raise

    def close_weight_update_group(self) -> None:
        """Leaves the collective; harmless without one."""
        if self._pusher is not None:
            self._pusher.close()
            self._leave()

    def _leave(self) -> None:
        self._servers.gate.release(self)
        self._pusher = None
        if self._abandon is not None:
            self._abandon.detach()

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Pushes a whole model, under the number that follows the servers'.

        Args:
            weights: name and tensor of every parameter, in Hugging Face's names; an iterator may
                make them one by one, and is used up before anything is paused.

        Raises:
            NotConnectedError: before `init_weight_update_group`.
            WeightSyncError: as `SGLangWeightSyncScheme.send`.
        """
        if self._pusher is None:
            raise NotConnectedError(self._left)
        source = taken_in(weights)
        with leading(source):
            self._pusher.push(source)

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

    def give_way(self, other: Any) -> bool:
        """Leaves the collective for ``other``, which is to push from now on; whether it could."""
        if self._pusher is not None and self._pusher.is_busy:
            return False
        self.close_weight_update_group()
        self._left = (
            f"{other!r} has taken the place of this weight sync: push with that one, or call "
            "init_weight_update_group(), which takes its place in turn."
        )
        return True

    def __repr__(self) -> str:
        return f"<weight update group of {self._servers.url} at {id(self):#x}>"
