"""Turns to TorchRL the two inner faces of a weight sync: the transport, and the older updater."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torchrl.collectors.weight_update import WeightUpdaterBase

from ..config import WeightSyncConfig
from ..errors import NotConnectedError
from ..service.service import AsyncSGLang
from ..weights.push import Pusher
from ..weights.result import PushResult
from .counters import bring_up

RECEIVERS = (
    "the receivers of an SGLang weight sync are the servers themselves: they join when the sender "
    "connects, and hold the weights when its push returns."
)


class Sync(Protocol):
    """What the faces ask of a weight sync; `SGLangWeightSyncScheme` is one."""

    config: WeightSyncConfig
    context: Any
    collectors: list[Any]
    model_path: str | None
    synchronized_on_sender: bool

    @property
    def service(self) -> AsyncSGLang:
        """The servers."""

    @property
    def pusher(self) -> Pusher:
        """What pushes to them."""

    def check_process(self) -> None:
        """Raises in a forked copy."""

    def check_sendable(self, worker_ids: Any) -> None:
        """Raises where nothing can be pushed, or not to those alone."""

    def register_model(self, model: nn.Module) -> None:
        """Names the model that a push without weights takes them from."""

    def push_to(self, engine: Any) -> None:
        """Names the servers."""

    def connect(self) -> None:
        """Joins them."""

    def push(
        self,
        weights: Any = None,
        collector: Any = None,
        *,
        version: int | None = None,
        label: str | None = None,
        partial: bool = False,
    ) -> PushResult | None:
        """Pushes."""

    def close(self) -> None:
        """Leaves them."""


class SGLangTransport:
    """What TorchRL calls to connect and to send."""

    def __init__(self, scheme: Sync) -> None:
        self._scheme = scheme

    def setup_connection_and_weights_on_sender(self) -> None:
        """Joins the servers' group; they already hold the checkpoint's weights."""
        scheme = self._scheme
        scheme.check_process()
        scheme.service.gate.take(scheme)
        try:
            scheme.pusher.connect()
        except BaseException:
            scheme.service.gate.release(scheme)
            raise
        served = scheme.service.servers.highest_version()
        for collector in (scheme.context, *scheme.collectors):
            bring_up(collector, served)

    def send_weights(self, weights: Any) -> None:
        """Pushes."""
        self._scheme.push(weights, self._scheme.context)

    def setup_connection_and_weights_on_receiver(self, **kwargs: Any) -> Any:
        """Not for this process: the receivers are SGLang's own."""
        raise NotConnectedError(RECEIVERS)

    receive_weights = setup_connection_and_weights_on_receiver


def _without_deprecation(make: Callable[[], type]) -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def _make_updater() -> type:
    class SGLangWeightUpdater(WeightUpdaterBase):
        """TorchRL's older face of the scheme, the only one that ``LLMCollector`` takes."""

        def __init__(self, scheme: Sync) -> None:
            self.scheme = scheme

        def _push_weights(self, *, policy_or_weights: Any = None, worker_ids: Any = None) -> None:
            self.scheme.check_sendable(worker_ids)
            self.scheme.push(policy_or_weights, self.collector)

        def _sync_weights_with_worker(
            self, *, worker_id: Any = None, server_weights: Any = None
        ) -> None:
            raise NotImplementedError("all servers are updated together, by push_weights.")

    return SGLangWeightUpdater


SGLangWeightUpdater = _without_deprecation(_make_updater)
