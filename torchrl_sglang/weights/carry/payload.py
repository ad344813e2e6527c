"""Makes the bytes of each broadcast while the one before is on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ...config import SyncLayout
from ..buckets import Bucket, TensorSpec
from ..source.lazy import LazyWeights

NUM_BUFFERS = 2
# From here on a broadcast per tensor costs less than the copy into one buffer.
LARGE_TENSOR_BYTES = 8 << 20


class Payloads:
    """Makes the payloads of one push.

    ``"flattened"``: a bucket travels as one tensor of raw bytes, which is copied together into one
    of two buffers, so that a bucket is made while the one before is sent. ``"tensors"``: each
    tensor travels by itself, from where it is; nothing is copied unless it has another dtype, is
    elsewhere, or is not contiguous. ``"auto"``: the second where tensors are large on average and
    need no copy.

    Args:
        buckets: the plan.
        weights: the tensors, by name; those of `LazyWeights` are made as they are needed.
        device: device that sends.
        layout: see above.
        buffers: where to copy buckets together, 1-D uint8; made here by default.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        layout: SyncLayout = "auto",
        buffers: Sequence[torch.Tensor] = (),
    ) -> None:
        self._buckets = buckets
        self._weights = weights
        self._device = device
        self.flattened = self._is_flattened(layout)
        self._buffers = list(buffers)

    def _is_flattened(self, layout: SyncLayout) -> bool:
        if layout != "auto":
            return layout == "flattened"
        total = sum(bucket.num_bytes for bucket in self._buckets)
        large = total >= LARGE_TENSOR_BYTES * sum(len(b.tensors) for b in self._buckets)
        if isinstance(self._weights, LazyWeights) or not large:
            return True
        return not all(self._is_ready(spec) for b in self._buckets for spec in b.tensors)

    def _is_ready(self, spec: TensorSpec) -> bool:
        tensor = self._weights[spec.name]
        return (
            tensor.dtype is spec.dtype and tensor.device == self._device and tensor.is_contiguous()
        )

    def __call__(self, after: Callable[[int], None]) -> Iterator[list[torch.Tensor]]:
        """Yields the tensors of one bucket after another.

        Args:
            after: returns once the payload of that number was sent.
        """
        if isinstance(self._weights, LazyWeights):
            self._weights.announce([spec.name for b in self._buckets for spec in b.tensors])
        for index, bucket in enumerate(self._buckets):
            if self.flattened:
                if index >= NUM_BUFFERS:
                    after(index - NUM_BUFFERS)
                yield [self._flattened(index, bucket)]
            else:
                yield [self._travelling(spec) for spec in bucket.tensors]

    def _travelling(self, spec: TensorSpec) -> torch.Tensor:
        whole = self._weights[spec.name].detach()
        return whole.to(self._device, spec.dtype).contiguous()

    def _flattened(self, index: int, bucket: Bucket) -> torch.Tensor:
        buffer = self._buffer(index)[: bucket.num_bytes]
        sources = [self._weights[spec.name].detach() for spec in bucket.tensors]
        places, start = [], 0
        for spec, source in zip(bucket.tensors, sources, strict=True):
            place = buffer[start : start + spec.num_bytes].view(spec.dtype)
            places.append(place.view(source.shape))
            start += spec.num_bytes
        torch._foreach_copy_(places, sources)
        return buffer

    def _buffer(self, index: int) -> torch.Tensor:
        if len(self._buffers) <= index % NUM_BUFFERS:
            size = max(bucket.num_bytes for bucket in self._buckets)
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device=self._device))
        return self._buffers[index % NUM_BUFFERS]
