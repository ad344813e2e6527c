"""TorchRL's older face of a weight sync, the only one that ``LLMCollector`` takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchrl.collectors.weight_update import WeightUpdaterBase

if TYPE_CHECKING:
    from .scheme import SGLangWeightSyncScheme


def _without_deprecation(make: Callable[[], type]) -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def _make_updater() -> type:
    class SGLangWeightUpdater(WeightUpdaterBase):
        """TorchRL's older face of the scheme, the only one that ``LLMCollector`` takes."""

        def __init__(self, scheme: SGLangWeightSyncScheme) -> None:
            self.scheme = scheme

        def _push_weights(self, *, policy_or_weights: Any = None, worker_ids: Any = None) -> None:
            self.scheme._check_sendable(worker_ids)
            self.scheme.push(policy_or_weights, self.collector)

        def _sync_weights_with_worker(
            self, *, worker_id: Any = None, server_weights: Any = None
        ) -> None:
            raise NotImplementedError("all servers are updated together, by push_weights.")

    return SGLangWeightUpdater


SGLangWeightUpdater = _without_deprecation(_make_updater)
