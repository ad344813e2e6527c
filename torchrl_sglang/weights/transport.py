"""What TorchRL's weight-sync contract calls a transport, over a scheme's pusher."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ..errors import NotConnectedError
from .versions import bring_up, served_version

if TYPE_CHECKING:
    from .scheme import SGLangWeightSyncScheme

RECEIVERS = (
    "the receivers of an SGLang weight sync are the servers themselves: they join when the sender "
    "connects, and hold the weights when its push returns."
)


class SGLangTransport:
    """What TorchRL calls to connect and to send."""

    def __init__(self, scheme: SGLangWeightSyncScheme) -> None:
        self._scheme = scheme

    def setup_connection_and_weights_on_sender(self) -> None:
        """Joins the servers' group; they already hold the checkpoint's weights."""
        scheme = self._scheme
        scheme._check_process()
        _take_over(scheme)
        scheme.service.gate.claim(scheme)
        try:
            scheme.pusher.connect()
        except BaseException:
            scheme.service.gate.release(scheme)
            raise
        served = served_version(scheme.service)
        for collector in (scheme.context, *scheme.collectors):
            bring_up(collector, served)

    def send_weights(self, weights: Any) -> None:
        """Pushes."""
        self._scheme.push(weights, self._scheme.context)

    def setup_connection_and_weights_on_receiver(self, **kwargs: Any) -> Any:
        """Not for this process: the receivers are SGLang's own."""
        raise NotConnectedError(RECEIVERS)

    receive_weights = setup_connection_and_weights_on_receiver


def _take_over(scheme: SGLangWeightSyncScheme) -> None:
    """Closes the scheme before, as of a notebook's cell that is run again, if it can be."""
    first = scheme.service.gate.pusher
    if first is not None and first is not scheme and first.give_way(scheme):
        warnings.warn(
            f"{scheme!r} takes the place of {first!r}, which is closed: one weight sync pushes to "
            "a service at a time. close() the first one to avoid this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
