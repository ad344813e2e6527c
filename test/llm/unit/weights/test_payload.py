"""What is sent is what the plan says, in its order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang.weights.buckets import Bucket, plan_buckets, spec_of
from torchrl_sglang.weights.carry.payload import Payloads
from torchrl_sglang.weights.source.expected import Dtypes

WIDE = {"2", "5"}  # names of what travels in float32

BUCKET_BYTES = st.integers(1, 5000)


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
