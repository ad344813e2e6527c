"""What TorchRL's weight-sync contract calls a transport, over a scheme's pusher."""

from __future__ import annotations

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
        scheme.service.gate.claim(scheme)
        try:
            scheme.pusher.connect()
        except BaseException:
            scheme.service.gate.release(scheme)
            raise
        bring_up(scheme.context, served_version(scheme.service))

    def send_weights(self, weights: Any) -> None:
        """Pushes."""
        self._scheme.push(weights, self._scheme.context)

    def setup_connection_and_weights_on_receiver(self, **kwargs: Any) -> Any:
        """Not for this process: the receivers are SGLang's own."""
        raise NotConnectedError(RECEIVERS)

    receive_weights = setup_connection_and_weights_on_receiver
