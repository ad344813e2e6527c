"""Shares tensors with a server on the same machine, and writes the message that says so.

SGLang reads such a message with a pickle reader of its own that knows torch's ways of sharing. On a
CPU torch's default way, a file descriptor, ends the server: it can't be fetched from a process that
is not its parent. A name in shared memory can be opened by anybody. On a GPU it is CUDA's handle.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import pickle
import re
import select
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing import reductions

from ...errors import WeightsError
from ..buckets import TensorSpec

SHARED_MEMORY = "/dev/shm"
CUDA_DEVICE_ARGUMENT = 6  # of torch's rebuild_cuda_tensor
HELPER_S = 10.0  # bound on its start
EXPANDABLE = re.compile(r"expandable_segments\s*:\s*True")

_changing_allocator = threading.Lock()


def allocate_shared(num_bytes: int) -> torch.Tensor:
    """A buffer that other processes of this machine can map, 1-D uint8 on the CPU.

    Raises:
        WeightsError: the machine's shared memory has no room for it. Writing more than there is
            would end this process.
    """
    free = free_shared_bytes()
    if num_bytes > free:
        raise WeightsError(
            f"a buffer of {num_bytes} bytes does not fit into this machine's shared memory "
            f"({SHARED_MEMORY}), which has {free} bytes left: choose a smaller "
            "WeightSyncConfig(bucket_bytes=...), enlarge it (docker run --shm-size), or push with "
            "another method."
        )
    start_helper()
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    buffer.untyped_storage()._share_filename_cpu_()
    return buffer


def allocate_on_gpu(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A buffer that other processes of this machine can open, 1-D uint8 on a GPU.

    Raises:
        WeightsError: the GPU has no room for it.
    """
    try:
        with no_expandable_segments():
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise WeightsError(
            f"a buffer of {num_bytes} bytes does not fit into the memory of {device}: choose a "
            "smaller WeightSyncConfig(bucket_bytes=...), or push with another method."
        ) from error


@contextlib.contextmanager
def no_expandable_segments() -> Iterator[None]:
    """Allocates as without ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.

    Such memory is shared by a file descriptor that servers may not fetch. All settings are given
    again, since torch forgets some that are left out.
    """
    with _changing_allocator:
        settings = _allocator_settings()
        fixed = EXPANDABLE.sub("expandable_segments:False", settings)
        if fixed == settings:
            yield
            return
        change_allocator(fixed)
        try:
            yield
        finally:
            change_allocator(settings)


def change_allocator(settings: str) -> None:
    """Gives torch's allocator all its settings anew, as in ``PYTORCH_CUDA_ALLOC_CONF``."""
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    change = change or torch.cuda.memory._set_allocator_settings  # which newer releases warn of
    change(settings)


def _allocator_settings() -> str:
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if read is not None:
        return str(read())
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return next((os.environ[name] for name in names if name in os.environ), "")


@functools.cache
def start_helper() -> None:
    """Starts torch's helper process, which removes shared memory that nobody uses any more.

    Torch itself would start it with this process's standard error, and it lives for as long as a
    server that it has served: whoever reads that pipe to its end would wait for all that time.
    """
    program = os.path.join(os.path.dirname(torch.__file__), "bin", "torch_shm_manager")
    reader, writer = os.pipe()
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, writer, 1),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ]
    with open(reader, "rb") as said:
        try:
            os.posix_spawn(program, [program], os.environ, file_actions=streams)
        except OSError:
            return  # torch then looks for it by itself
        finally:
            os.close(writer)
        ready, _, _ = select.select([said], [], [], HELPER_S)
        address = said.readline().strip() if ready else b""
    if address:
        # What is asked for does not exist; but torch then knows this helper, and starts no other.
        with contextlib.suppress(RuntimeError):
            torch.UntypedStorage._new_shared_filename_cpu(address, b"/torch_none", 8)


def free_shared_bytes() -> int:
    """Bytes that are left in the machine's shared memory."""
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def shared_message(buffer: torch.Tensor, tensors: Sequence[TensorSpec]) -> str:
    """What tells one rank of a server where a bucket is; each rank needs one of its own.

    Args:
        buffer: the bucket, from `allocate_shared` or on a GPU.
        tensors: what is in it, end to end.

    Returns:
        An element of ``serialized_named_tensors`` of ``/update_weights_from_tensor``.
    """
    start, entries = 0, []
    for spec in tensors:
        entries.append(
            # Any object with these attributes will do; SGLang's own class is not needed here.
            types.SimpleNamespace(
                name=spec.name,
                shape=torch.Size(spec.shape),
                dtype=spec.dtype,
                start_idx=start,
                end_idx=start + spec.num_bytes,
                numel=spec.num_bytes,
            )
        )
        start += spec.num_bytes
    stream = io.BytesIO()
    _Pickler(stream, protocol=4).dump({"flattened_tensor": buffer[:start], "metadata": entries})
    return base64.b64encode(stream.getvalue()).decode()


class _Pickler(pickle.Pickler):
    """Shares storages by name, whatever torch's global strategy is."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _reduce_tensor(value)
        if isinstance(value, torch.storage.TypedStorage):
            return reductions.reduce_typed_storage(value)  # type: ignore[no-untyped-call]
        if isinstance(value, torch.UntypedStorage):
            return _reduce_storage(value)
        return NotImplemented


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    rebuild, arguments = reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    if not tensor.is_cuda:
        return rebuild, arguments
    # Processes may number their GPUs differently; SGLang takes a UUID in the number's place.
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    head, tail = arguments[:CUDA_DEVICE_ARGUMENT], arguments[CUDA_DEVICE_ARGUMENT + 1 :]
    return rebuild, (*head, uuid, *tail)


def _reduce_storage(storage: torch.UntypedStorage) -> Any:
    named = storage._share_filename_cpu_()
    # For the reader, who gives it back.
    storage._shared_incref()  # type: ignore[no-untyped-call]
    return reductions.rebuild_storage_filename, (type(storage), *named)
