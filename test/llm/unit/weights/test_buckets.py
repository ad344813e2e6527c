"""Buckets and ranks: pure functions over names, sizes and ranks."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.worker_infos import worker_info
from torchrl_sglang.errors import TopologyError
from torchrl_sglang.servers.info import WorkerInfo
from torchrl_sglang.weights.buckets import Bucket, TensorSpec, plan_buckets
from torchrl_sglang.weights.carry.topology import Ranks, plan_ranks

DTYPES = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16, 1: torch.float8_e4m3fn}


def spec(name: str, *shape: int, item_bytes: int = 2) -> TensorSpec:
    return TensorSpec(name=name, dtype=DTYPES[item_bytes], shape=shape)


def names(buckets: list[Bucket]) -> list[list[str]]:
    return [[tensor.name for tensor in bucket.tensors] for bucket in buckets]


# Buckets


@pytest.mark.parametrize(
    ("shape", "item_bytes", "expected"),
    [((), 4, 4), ((3,), 2, 6), ((3, 5), 2, 30), ((0, 5), 4, 0)],
)
def test_bytes_of_a_tensor(shape: tuple[int, ...], item_bytes: int, expected: int) -> None:
    assert spec("a", *shape, item_bytes=item_bytes).num_bytes == expected


@pytest.mark.parametrize(
    ("sizes", "bucket_bytes", "expected"),
    [
        ([], 8, []),
        ([1], 8, [["0"]]),
        ([2, 2], 8, [["0", "1"]]),
        ([2, 2, 1], 8, [["0", "1"], ["2"]]),
        ([5], 8, [["0"]]),  # larger than a bucket: alone
        ([1, 5, 1], 8, [["0"], ["1"], ["2"]]),
        ([1, 1], 1, [["0"], ["1"]]),
        ([0, 0], 8, [["0", "1"]]),
    ],
)
def test_buckets(sizes: list[int], bucket_bytes: int, expected: list[list[str]]) -> None:
    tensors = [spec(str(index), size) for index, size in enumerate(sizes)]
    assert names(plan_buckets(tensors, bucket_bytes)) == expected


def test_wider_elements_come_first_and_the_order_stays_otherwise() -> None:
    tensors = [spec("a", 1), spec("b", 1, item_bytes=4), spec("c", 1), spec("d", 1, item_bytes=4)]
    assert names(plan_buckets(tensors, 100)) == [["b", "d", "a", "c"]]


SPECS = st.lists(
    st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from([*DTYPES])), max_size=25
).map(
    lambda made: [
        spec(str(index), *shape, item_bytes=width) for index, (shape, width) in enumerate(made)
    ]
)

BUCKET_BYTES = st.integers(1, 5000)


@given(SPECS, BUCKET_BYTES)
def test_every_tensor_travels_exactly_once(specs: list[TensorSpec], bucket_bytes: int) -> None:
    sent = [
        tensor for bucket in plan_buckets(iter(specs), bucket_bytes) for tensor in bucket.tensors
    ]
    assert sorted(sent, key=lambda t: int(t.name)) == specs


@given(SPECS, BUCKET_BYTES)
def test_a_bucket_is_bounded_unless_one_tensor_alone_is_larger(
    specs: list[TensorSpec], bucket_bytes: int
) -> None:
    for bucket in plan_buckets(specs, bucket_bytes):
        assert bucket.tensors
        assert bucket.num_bytes == sum(tensor.num_bytes for tensor in bucket.tensors)
        assert bucket.num_bytes <= bucket_bytes or len(bucket.tensors) == 1


@given(SPECS, BUCKET_BYTES)
def test_every_offset_is_a_multiple_of_the_element(
    specs: list[TensorSpec], bucket_bytes: int
) -> None:
    for bucket in plan_buckets(specs, bucket_bytes):
        offset = 0
        for tensor in bucket.tensors:
            assert offset % tensor.item_bytes == 0
            offset += tensor.num_bytes


@given(SPECS, BUCKET_BYTES)
def test_no_two_neighbours_would_fit_into_one(specs: list[TensorSpec], bucket_bytes: int) -> None:
    buckets = plan_buckets(specs, bucket_bytes)
    for bucket, following in itertools.pairwise(buckets):
        assert bucket.num_bytes + following.tensors[0].num_bytes > bucket_bytes


def test_the_announcement() -> None:
    bucket = Bucket(tensors=(spec("a", 2, 3, item_bytes=4), spec("b", 4)))
    body = bucket.announcement("group")
    assert json.loads(json.dumps(body)) == body
    assert (body["names"], body["shapes"]) == (["a", "b"], [[2, 3], [4]])
    assert body["dtypes"] == ["float32", "bfloat16"]
    assert (body["group_name"], body["load_format"]) == ("group", "flattened_bucket")
    # SGLang's own defaults flush and abort while it updates.
    assert (body["flush_cache"], body["abort_all_requests"]) == (False, False)
    assert body["weight_version"] is None


# Ranks


LAYER = "model.layers.3.self_attn."


@pytest.mark.parametrize("bucket_bytes", [1, 20, 30, 1 << 20])
def test_what_a_server_loads_together_is_not_divided(bucket_bytes: int) -> None:
    """SGLang fuses and derives them within one call; in two they would be lost."""
    mla = [
        spec(LAYER + "q_a_proj.weight", 4),
        spec("model.layers.3.input_layernorm.weight", 4),
        spec(LAYER + "q_b_proj.weight", 4),
        spec(LAYER + "kv_a_proj_with_mqa.weight", 4),
        spec(LAYER + "kv_b_proj.weight", 4, item_bytes=1),
        spec("model.layers.4.self_attn.q_a_proj.weight", 4),
        spec(LAYER + "kv_b_proj.weight_scale_inv", 1, item_bytes=4),
    ]
    buckets = plan_buckets(mla, bucket_bytes)
    together = {LAYER + name for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
    holding = [b for b in names(buckets) if any(n.rpartition(".")[0] in together for n in b)]
    assert len(holding) == 1
    assert sorted(itertools.chain(*names(buckets))) == sorted(t.name for t in mla)
    for bucket in buckets:
        widths = [tensor.item_bytes for tensor in bucket.tensors]
        assert widths == sorted(widths, reverse=True)
    if bucket_bytes == 1:
        assert [len(b) for b in names(buckets)] == [4, 1, 1, 1]


@pytest.mark.parametrize(
    ("workers", "world_size", "offsets"),
    [
        ([], 1, ()),
        ([worker_info()], 2, (1,)),
        ([worker_info(tp_size=4)], 5, (1,)),
        ([worker_info(), worker_info(), worker_info()], 4, (1, 2, 3)),
        ([worker_info(tp_size=2), worker_info(tp_size=1), worker_info(tp_size=4)], 8, (1, 3, 4)),
        # DP attention divides the TP ranks and adds none.
        ([worker_info(tp_size=4, dp_size=4, dp_attention=True), worker_info()], 6, (1, 5)),
    ],
)
def test_ranks(workers: list[WorkerInfo], world_size: int, offsets: tuple[int, ...]) -> None:
    assert plan_ranks(workers) == Ranks(world_size=world_size, offsets=offsets)


@given(st.lists(st.integers(1, 8), max_size=6))
def test_every_rank_belongs_to_one_server_and_rank_0_to_the_trainer(tp_sizes: list[int]) -> None:
    ranks = plan_ranks([worker_info(tp_size=size) for size in tp_sizes])
    taken = [0]
    for offset, size in zip(ranks.offsets, tp_sizes, strict=True):
        taken += range(offset, offset + size)
    assert taken == list(range(ranks.world_size))


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"pp_size": 2}, "http://bad runs with pp_size=2.*Use tp_size instead, or more replicas"),
        ({"dp_size": 2}, "http://bad runs with dp_size=2.*Use num_replicas instead"),
    ],
    ids=str,
)
def test_layouts_that_a_broadcast_can_not_reach(layout: dict[str, int], says: str) -> None:
    with pytest.raises(TopologyError, match=says):
        plan_ranks([worker_info(), worker_info(url="http://bad", **layout)])
