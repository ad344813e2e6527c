"""Buckets and ranks: pure functions over names, sizes and ranks."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from helpers.worker_infos import worker_info

from torchrl_sglang.errors import TopologyError, WeightsError
from torchrl_sglang.servers.info import WorkerInfo
from torchrl_sglang.weights.buckets import (
    Bucket,
    Ranks,
    TensorSpec,
    plan_buckets,
    plan_ranks,
    spec_of,
)
from torchrl_sglang.weights.carry.payload import Payloads
from torchrl_sglang.weights.source.checkpoint import Writer
from torchrl_sglang.weights.source.expected import Dtypes, Expected, served_dtype

DTYPES = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16, 1: torch.float8_e4m3fn}

WIDE = {"2", "5"}  # names of what travels in float32


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


# Bytes


def cut(payload: torch.Tensor, bucket: Bucket) -> dict[str, torch.Tensor]:
    """Takes a broadcast apart as a server does."""
    tensors, offset = {}, 0
    for made in bucket.tensors:
        raw = payload[offset : offset + made.num_bytes]
        tensors[made.name] = raw.view(made.dtype).view(made.shape)
        offset += made.num_bytes
    assert offset == payload.numel()
    return tensors


def payloads_of(buckets: list[Bucket], weights: dict[str, torch.Tensor], layout: Any) -> Payloads:
    return Payloads(buckets, weights, device=torch.device("cpu"), layout=layout)


def flattened(bucket: Bucket, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    [[payload]] = payloads_of([bucket], weights, "flattened")(lambda index: None)
    return payload


@pytest.mark.parametrize("layout", ["flattened", "tensors"])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_payloads_in_the_order_of_the_plan(layout: str, bucket_bytes: int) -> None:
    """A buffer is written again only after what was in it has been sent."""
    weights = {str(i): torch.randn(3, i + 1) for i in range(9)}
    dtypes = Dtypes(served=torch.bfloat16, wide=WIDE)
    specs = [spec_of(name, tensor, dtypes.of(name)) for name, tensor in weights.items()]
    buckets = plan_buckets(specs, bucket_bytes)
    made: list[list[torch.Tensor]] = []
    read: dict[str, torch.Tensor] = {}

    def after(index: int) -> None:
        """What a receiver does that reads as late as it may."""
        for spec, tensor in zip(buckets[index].tensors, take(index), strict=True):
            read[spec.name] = tensor.clone()

    def take(index: int) -> list[torch.Tensor]:
        if layout == "tensors":
            return made[index]
        return list(cut(made[index][0], buckets[index]).values())

    payloads = payloads_of(buckets, weights, layout)
    for tensors in payloads(after):
        made.append(tensors)
    for index in range(len(buckets)):
        if not {spec.name for spec in buckets[index].tensors} <= read.keys():
            after(index)
    assert len(made) == len(buckets)
    for name, tensor in weights.items():
        assert torch.equal(read[name], tensor.to(dtypes.of(name)))


def test_large_tensors_that_need_no_copy_are_sent_from_where_they_are() -> None:
    large = {str(i): torch.zeros(2048, 2048, dtype=torch.bfloat16) for i in range(3)}

    def layout_of(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> bool:
        specs = [spec_of(name, tensor, dtype) for name, tensor in weights.items()]
        return payloads_of(plan_buckets(specs, 1 << 24), weights, "auto").flattened

    assert not layout_of(large)
    assert layout_of(large, torch.float16)
    assert layout_of({**large, "3": large["0"].t()})
    assert layout_of({str(i): torch.zeros(8, dtype=torch.bfloat16) for i in range(3)})
    specs = [spec_of(name, tensor, torch.bfloat16) for name, tensor in large.items()]
    payloads = payloads_of(plan_buckets(specs, 1 << 30), large, "auto")
    [sent] = payloads(lambda index: None)
    assert [t.data_ptr() for t in sent] == [t.data_ptr() for t in large.values()]


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8), BUCKET_BYTES)
def test_what_is_sent_can_be_taken_apart_again(shapes: list[list[int]], bucket_bytes: int) -> None:
    weights = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    dtypes = Dtypes(served=torch.bfloat16, wide=WIDE)
    specs = [spec_of(name, tensor, dtypes.of(name)) for name, tensor in weights.items()]
    received: dict[str, torch.Tensor] = {}
    for bucket in plan_buckets(specs, bucket_bytes):
        payload = flattened(bucket, weights)
        assert (payload.dtype, payload.ndim) == (torch.uint8, 1)
        received |= cut(payload, bucket)
    assert received.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(received[name], tensor.to(dtypes.of(name)))


def test_a_transposed_weight_is_sent_in_its_own_order() -> None:
    weight = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    bucket = Bucket(tensors=(spec_of("a", weight, torch.float32),))
    payload = flattened(bucket, {"a": weight})
    assert not payload.requires_grad
    assert torch.equal(cut(payload, bucket)["a"], weight.detach())


def expected(dtype: torch.dtype) -> Expected:
    none: frozenset[str] = frozenset()
    writer = Writer(torch.nn.Module())
    return Expected(
        model_path="/m",
        parameters={},
        tied={},
        optional=none,
        buffers=none,
        wide=none,
        dtype=dtype,
        writer=writer,
    )


@pytest.mark.parametrize(
    ("served", "model_type", "checkpoint", "result"),
    [
        ("auto", "qwen2", torch.bfloat16, torch.bfloat16),
        ("auto", "qwen2", torch.float16, torch.float16),
        ("auto", "qwen2", torch.float32, torch.float16),
        ("auto", None, torch.float32, torch.float16),
        ("auto", "gemma3_text", torch.float32, torch.bfloat16),
        ("bfloat16", "qwen2", torch.float32, torch.bfloat16),
        ("half", "qwen2", torch.bfloat16, torch.float16),
        ("float", "qwen2", torch.bfloat16, torch.float32),
        ("float32", "qwen2", torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_the_servers_weights(
    served: str, model_type: str | None, checkpoint: torch.dtype, result: torch.dtype
) -> None:
    assert (
        served_dtype(worker_info(dtype=served, model_type=model_type), expected(checkpoint))
        is result
    )


@pytest.mark.parametrize("served", ["int77", "nn", "Tensor"])
def test_a_dtype_that_torch_lacks(served: str) -> None:
    with pytest.raises(WeightsError, match=f"serves dtype '{served}'"):
        served_dtype(worker_info(dtype=served), expected(torch.bfloat16))


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
