"""Carries weights through memory that trainer and servers share, on one machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar

import torch

from ...config import Timeouts
from ...errors import TopologyError
from ...servers.control import ControlClient
from ...servers.hosts import is_here
from ...servers.together import push_error, watch
from ..buckets import FLATTENED, Bucket
from ..result import StepTimer
from ..targets import Targets
from .carrier import Carrier
from .payload import NUM_BUFFERS, Payloads
from .shared_memory import allocate_on_gpu, allocate_shared, shared_message
from .topology import plan_ranks

Call = Callable[[ControlClient], None]


class TensorCarrier(Carrier):
    """Lets servers of this machine read buckets from the trainer's memory: a GPU's, or the CPU's.

    A bucket is filled while servers load the one before. Servers need no memory of their own: torch
    gives up a handle only once what was read through it has been copied, and so a server answers.

    Args:
        targets: the servers.
        device: where buckets are laid out; a GPU that the servers see, or the CPU.
        timeouts: bounds on waiting.

    Raises:
        TopologyError: a server is on another machine, or has data- or pipeline-parallel ranks.
    """

    method: ClassVar[str] = "tensor"
    order = "load_tensors"

    def __init__(self, targets: Targets, *, device: torch.device, timeouts: Timeouts) -> None:
        plan_ranks(targets.infos)
        far = [server.url for server in targets.workers if not is_here(server.url)]
        if far:
            raise TopologyError(
                f"method='tensor' shares memory with the servers, but {', '.join(far)} is not on "
                "this machine: push with method='broadcast' or 'disk'."
            )
        if targets.infos[0].device != "cpu" and device.type != "cuda":
            raise TopologyError(
                "method='tensor' shares a GPU's memory with servers on GPUs, and the weight sync "
                f"was given device={str(device)!r}: name a GPU, or push with method='disk'."
            )
        super().__init__()
        self._targets = targets
        self._device = device
        self._timeouts = timeouts
        self._buffers: list[torch.Tensor] = []
        # Of a GPU's memory torch remembers each time that it was shared until it is given back, and
        # the trainer's step has a use for it meanwhile.
        self._keeps_buffers = device.type != "cuda"
        # Also at the interpreter's exit, which frees no shared memory by itself.
        weakref.finalize(self, self._buffers.clear)

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Makes the buffers; see `Carrier.prepare`. Those on a CPU serve later pushes too."""
        size = max(bucket.num_bytes for bucket in buckets)
        count = min(NUM_BUFFERS, len(buckets))
        if len(self._buffers) >= count and self._buffers[0].numel() >= size:
            return
        self._buffers.clear()
        self._buffers += [self._allocate(size) for _ in range(count)]

    def transfer(
        self,
        buckets: list[Bucket],
        weights: Mapping[str, torch.Tensor],
        timer: StepTimer,
    ) -> str:
        """Carries all buckets; see `Carrier.transfer`."""
        payloads = Payloads(
            buckets,
            weights,
            device=self._device,
            layout="flattened",
            buffers=self._buffers,
        )
        asked: Mapping[Future[Any], str | None] = {}
        with timer.measure("transfer"):
            made = payloads(lambda _: None)  # a buffer is free once the next bucket is announced
            for index, bucket in enumerate(buckets):
                try:
                    [buffer] = next(made)
                    calls = self._announcements(buffer, bucket)
                except Exception as error:
                    raise push_error(error, "transfer", None, index) from error
                if index:
                    self._wait(asked, buckets, index - 1)
                asked = self._targets.ask(partial(_call_own, calls))
            self._wait(asked, buckets, len(buckets) - 1)
        if not self._keeps_buffers:
            self._buffers.clear()
        return "flattened"

    def _wait(
        self, asked: Mapping[Future[Any], str | None], buckets: Sequence[Bucket], index: int
    ) -> None:
        timeout_s = self._timeouts.bucket_s(buckets[index].num_bytes)
        watch(asked, step="transfer", timeout_s=timeout_s, bucket=index)

    def _announcements(self, buffer: torch.Tensor, bucket: Bucket) -> dict[str, Call]:
        """For each server what tells it of a bucket, with a message for each of its ranks."""
        if buffer.is_cuda:
            torch.cuda.current_stream(buffer.device).synchronize()
        return {
            info.url: _announcement(
                [shared_message(buffer, bucket.tensors) for _ in range(info.tp_size)],
                self._timeouts.bucket_s(bucket.num_bytes),
            )
            for info in self._targets.infos
        }

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return allocate_on_gpu(num_bytes, self._device)
        return allocate_shared(num_bytes)

    def drop(self) -> None:
        """Lets go at once; harmless twice."""
        super().drop()
        self._buffers.clear()


def _call_own(calls: Mapping[str, Call], server: ControlClient) -> None:
    calls[server.url](server)


def _announcement(messages: Sequence[str], timeout_s: float) -> Call:
    body = {
        "serialized_named_tensors": list(messages),
        "load_format": FLATTENED,
        # As in a broadcast: what is sent along by default is not safe in the middle of a push.
        "flush_cache": False,
        "abort_all_requests": False,
        "weight_version": None,
    }

    def announce(server: ControlClient) -> None:
        server.load_tensors(body, timeout_s)

    return announce
