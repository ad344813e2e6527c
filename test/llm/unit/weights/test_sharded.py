"""Two ranks gather what is the same, without a server."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.two_ranks import in_ranks
from torchrl_sglang.weights.source.sharded import ShardedWeights

PLAIN = """
import json, sys, threading, time
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard
from torchrl_sglang import assist_push
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.weights.source.sharded import ShardedWeights, leading

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

def parts(*names, rows=4):
    return {name: distribute_tensor(torch.ones(rows, 3), mesh, [Shard(0)]) for name in names}

def push(names, *, tied=None, finite=False, source=None, spoil=lambda given: None, fails=False):
    given = parts(*names)
    spoil(given)
    try:
        if rank:
            assist_push(given if source is None else source(given))
            return None
        with leading(given if source is None else source(given)):
            weights = ShardedWeights(given)
            weights.compare(tied or {}, finite=finite)
            if fails:
                fail(weights)
            weights.announce(list(given))
            return [weights[name].shape[0] for name in given]
    except SGLangError as error:
        return f"{type(error).__name__}: {error}"

def fail(weights):
    '''A thread looks up two of four, and wakes up again when others have taken its place.'''
    two, drained, late = threading.Event(), threading.Event(), []
    def look_up():
        weights.announce(list("abcd"))
        for name in "abcd":
            if name == "c":
                two.set()
                drained.wait(10.0)
            try:
                weights[name]
            except RuntimeError as error:
                late.append(str(error))
    thread = threading.Thread(target=look_up)
    thread.start()
    assert two.wait(10.0)
    weights.drain()
    drained.set()
    thread.join(10.0)
    assert late == ["the broadcast that this thread made was given up"] * 2, late

def lose(given):
    if rank:
        del given["b"]

def nan(given):
    if rank:
        given["b"].to_local().fill_(float("nan"))

def differ(given):
    if rank:
        given["b"].to_local().fill_(2.0)

said = {
    "good": push("ab"),
    "lost": push("ab", spoil=lose),
    "nan": push("ab", spoil=nan, finite=True),
    "nan unasked": push("ab", spoil=nan),
    "tied": push("ab", spoil=differ, tied={"b": "a"}),
    "nested": push("ab", source=lambda given: TensorDict({"model": given}, batch_size=[])),
    "failed": push("abcd", fails=True),
    "again": push("ab"),
}
small = parts("a", "b", "c", rows=1)
from torchrl_sglang.weights.source.named import untied
said["untied"] = sorted(untied(small))
print(json.dumps(said), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def plain() -> list[dict[str, Any]]:
    """What two ranks said that gather without a server."""
    return in_ranks(PLAIN)


def test_ranks_gather_what_is_the_same(plain: list[dict[str, Any]]) -> None:
    for case in ("good", "again", "nan unasked"):
        assert [said[case] for said in plain] == [[4, 4], None]


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("lost", "rank 1: it has no b, which rank 0 pushes."),
        ("nan", "rank 1: NaN or infinity in 1 of the 2 tensors: b."),
        ("tied", "rank 1: b differs from what the served model ties it to."),
    ],
)
def test_a_rank_that_holds_something_wrong_is_named_on_both(
    plain: list[dict[str, Any]], case: str, match: str
) -> None:
    for said in plain:
        assert said[case].startswith("WeightsError: rank 1")
        assert match in said[case]


def test_sharded_tensors_in_a_nested_tensordict_are_seen(plain: list[dict[str, Any]]) -> None:
    first, second = plain
    assert (first["nested"], second["nested"]) == ([4, 4], None)


def test_a_broadcast_that_failed_gathers_in_order_and_then_no_more(
    plain: list[dict[str, Any]],
) -> None:
    assert [said["failed"] for said in plain] == [[4, 4, 4, 4], None]


def test_empty_parts_are_not_taken_for_tied(plain: list[dict[str, Any]]) -> None:
    """On the second rank three tensors of one row have no memory at all."""
    assert [said["untied"] for said in plain] == [["a", "b", "c"]] * 2


class Lookups(torch.Tensor):
    """A tensor that counts how often it is gathered."""

    gathered = 0

    def full_tensor(self) -> torch.Tensor:
        type(self).gathered += 1
        return self.as_subclass(torch.Tensor)


def test_lookups_follow_what_was_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr("torchrl_sglang.weights.source.sharded.say", said.append)
    parts = {name: torch.zeros(2).as_subclass(Lookups) for name in "abc"}
    weights = ShardedWeights({**parts, "plain": torch.ones(3)})
    weights.announce(["a", "plain", "b", "c"])
    assert said == [("gather", ["a", "b", "c"])]
    assert torch.equal(weights["a"], torch.zeros(2))
    assert torch.equal(weights["plain"], torch.ones(3))
    with pytest.raises(RuntimeError, match="c is looked up, but b was announced"):
        weights["c"]
    weights.drain()
    assert Lookups.gathered == 3
    weights["c"]
    assert said[1:] == [("gather", ["c"])]
