"""What a step is put down to, when a wire breaks beside it."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from torchrl_sglang.errors import PushError, RequestRefusedError
from torchrl_sglang.servers import together as watch_module
from torchrl_sglang.servers.together import watch
from torchrl_sglang.weights.carry.group import WireError

REFUSED = RequestRefusedError("400: failed to receive weights", status=400)

WIRE = WireError("connection closed by peer")


def failing(after_s: float, error: Exception) -> Future[None]:
    future: Future[None] = Future()
    threading.Timer(after_s, future.set_exception, [error]).start()
    return future


def test_which_bucket_a_broken_wire_is_put_down_to() -> None:
    waiting: Future[None] = Future()
    wire = failing(0.1, WIRE)
    with pytest.raises(PushError, match="connection closed") as caught:
        watch(
            {waiting: "http://a"},
            step="transfer",
            timeout_s=5.0,
            bucket=4,
            beside=wire,
            bucket_beside=lambda: 1,
        )
    assert (caught.value.engine, caught.value.bucket) == (None, 1)


def test_an_answer_explains_the_wire_that_broke_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "ENGINE_LAG_S", 5.0)
    answer, wire = failing(0.12, REFUSED), failing(0.1, WIRE)
    with pytest.raises(PushError) as caught:
        watch({answer: "http://a"}, step="transfer", timeout_s=5.0, bucket=4, beside=wire)
    assert (caught.value.engine, caught.value.bucket) == ("http://a", 4)
