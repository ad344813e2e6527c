"""What is sent is JSON, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang.errors import InputError
from torchrl_sglang.generate.client import Body
from torchrl_sglang.servers.gate import UpdateGate


@pytest.mark.parametrize("value", [{1}, 2**80, object()], ids=["set", "large", "object"])
def test_what_json_can_not_say(value: Any) -> None:
    with pytest.raises(InputError, match="request 'r1' can't be sent"):
        Body({"rid": "r1", "input_ids": [value]}, UpdateGate(), 0)
