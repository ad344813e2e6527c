"""Carries weights through files that every server reads: this reaches every layout of ranks."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

from ...config import Timeouts
from ...errors import TopologyError, WeightsError
from ...servers.control import ControlClient
from ...servers.hosts import is_here
from ...servers.together import push_error, watch
from ..buckets import Bucket
from ..result import StepTimer
from ..source.lazy import LazyWeights
from ..targets import Targets
from .carrier import Carrier

INDEX = "model.safetensors.index.json"
PROCESS = uuid.uuid4().hex[:8]  # several trainers may write into one folder
COPIED = (".json", ".jinja", ".model", ".txt", ".py")  # config, tokenizer, chat template, code


class DiskCarrier(Carrier):
    """Writes a checkpoint once, and has every server load it.

    The last checkpoint stays: a server that loaded one names its folder in its ``/model_info``.
    That of a push that failed, which a server may still be reading, stays until the next push.

    Args:
        targets: the servers.
        folder: where to write, as trainer and servers see it; None for a temporary folder.
        model_path: where the served model's config is, which goes beside the weights.
        timeouts: bounds on waiting.
        owner: lives as long as a temporary folder is needed.

    Raises:
        TopologyError: a server is on another machine, and no folder is given.
        WeightsError: the folder can't be written to.
    """

    method: ClassVar[str] = "disk"
    order = "load_files"
    begins_and_ends: ClassVar[bool] = False

    def __init__(
        self,
        targets: Targets,
        *,
        folder: str | None,
        model_path: str,
        timeouts: Timeouts,
        owner: object,
    ) -> None:
        far = [server.url for server in targets.workers if not is_here(server.url)]
        if far and folder is None:
            raise TopologyError(
                f"method='disk' writes where servers can read, but {', '.join(far)} is on another "
                "machine: name a folder that both see, WeightSyncConfig(folder=...)."
            )
        super().__init__()
        self._targets = targets
        self._folder = _made(folder, owner)
        self._prefix = f"weights-{PROCESS}-{id(owner):x}-"
        self._model_path = model_path
        self._timeouts = timeouts

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Looks for room; see `Carrier.prepare`."""
        needed, free = sum(b.num_bytes for b in buckets), shutil.disk_usage(self._folder).free
        if needed > free:
            raise WeightsError(
                f"a checkpoint of {needed} bytes does not fit into {self._folder}, which has "
                f"{free} bytes left: name another WeightSyncConfig(folder=...)."
            )

    def transfer(
        self,
        buckets: list[Bucket],
        weights: Mapping[str, torch.Tensor],
        timer: StepTimer,
    ) -> str:
        """Writes, then has all servers load; see `Carrier.transfer`."""
        checkpoint = self._folder / f"{self._prefix}{uuid.uuid4().hex[:8]}"
        with timer.measure("write"):
            try:
                write_checkpoint(checkpoint, buckets, weights, self._model_path)
            except Exception as error:
                shutil.rmtree(checkpoint, ignore_errors=True)
                raise push_error(error, "transfer", None) from error
        with timer.measure("transfer"):
            timeout_s = self._timeouts.bucket_s(sum(bucket.num_bytes for bucket in buckets))
            asked = self._targets.ask(partial(_load, checkpoint, timeout_s))
            watch(asked, step="transfer", timeout_s=timeout_s)
        for other in self._folder.glob(f"{self._prefix}*"):
            if other != checkpoint:  # the last, and those of pushes that failed
                shutil.rmtree(other, ignore_errors=True)
        return "files"


def _load(checkpoint: Path, timeout_s: float, server: ControlClient) -> None:
    body = {
        "model_path": str(checkpoint),
        "load_format": "safetensors",
        # As in a broadcast: a flush can fail after the weights changed.
        "flush_cache": False,
        "abort_all_requests": False,
        "weight_version": None,
    }
    server.load_files(body, timeout_s)


def _made(folder: str | None, owner: object) -> Path:
    if folder is None:
        made = Path(tempfile.mkdtemp(prefix="torchrl_sglang-weights-"))
        weakref.finalize(owner, shutil.rmtree, made, ignore_errors=True)
        return made
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # leaves nothing behind
    except OSError as error:
        raise WeightsError(
            f"WeightSyncConfig(folder={folder!r}) can't be written to: {error}."
        ) from error
    return path


def write_checkpoint(
    folder: Path,
    buckets: Sequence[Bucket],
    weights: Mapping[str, torch.Tensor],
    model_path: str,
) -> None:
    """Writes a checkpoint as Hugging Face does: one file for each bucket, an index, the config.

    Args:
        folder: where; must not exist.
        buckets: which tensors go into one file.
        weights: the tensors.
        model_path: whose config, tokenizer and the like are copied along, if it is a folder here.
    """
    folder.mkdir()
    files: dict[str, str] = {}
    announced = [spec.name for bucket in buckets for spec in bucket.tensors]
    if isinstance(weights, LazyWeights):
        weights.announce(announced)
    for number, bucket in enumerate(buckets, 1):
        file = f"model-{number:05}-of-{len(buckets):05}.safetensors"
        tensors = {s.name: weights[s.name].detach().to("cpu", s.dtype) for s in bucket.tensors}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    size = sum(bucket.num_bytes for bucket in buckets)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for other in Path(model_path).iterdir():
            if other.suffix in COPIED and other.name != INDEX:
                shutil.copy(other, folder)
