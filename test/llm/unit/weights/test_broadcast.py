"""How long a broadcast may take."""

from __future__ import annotations

import pytest

from torchrl_sglang.config import Timeouts
from torchrl_sglang.weights.carry.broadcast import operation_s


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_no_wait_of_ours_is_longer_than_a_broadcast_may_take(backend: str) -> None:
    for timeouts in (Timeouts(), Timeouts(transfer_s=9e6), Timeouts(group_s=1e3, probe_s=2e3)):
        waits = (timeouts.group_s, timeouts.probe_s, 2 * timeouts.bucket_s(1 << 60))
        assert operation_s(backend, timeouts) > max(waits)
    assert operation_s("nccl", Timeouts()) > 24 * 3600
