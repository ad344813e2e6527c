"""Ids that rows can not have."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang.errors import InputError
from torchrl_sglang.policy.requests.rows import given_rids


@pytest.mark.parametrize(
    "rids", [["a", "a"], ["a", None, "a"], ["a-1", "b", "a-10"], [""], [7]], ids=str
)
def test_ids_that_rows_can_not_have(rids: list[Any]) -> None:
    with pytest.raises(InputError, match="rid="):
        given_rids([{} if rid is None else {"rid": rid} for rid in rids])
    assert given_rids([{"rid": "a"}, {}, {"rid": "b"}]) == [{"rid": "a"}, {}, {"rid": "b"}]
