"""Tells the served model's parameters from its config alone: names, shapes and dtypes."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import WeightsError
from ...servers.info import WorkerInfo
from .checkpoint import Writer, saved_buffers


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The parameters of a model.

    Attributes:
        model_path: where its config is.
        parameters: dtype and shape of each, tied ones once, in the model's order, and then of each
            buffer that a checkpoint has, such as the biases that balance experts.
        tied: names that share their memory with one of these, and which one.
        optional: names of those buffers, the model's and the checkpoint's; not every trainer has
            them.
        buffers: names of the other buffers, which the servers compute themselves.
        wide: names, the model's and the checkpoint's, of what stays float32 in every checkpoint.
        dtype: dtype of the checkpoint.
        writer: makes of a parameter what the checkpoint has in its place.
    """

    model_path: str
    parameters: dict[str, tuple[torch.dtype, torch.Size]]
    tied: dict[str, str]
    optional: frozenset[str]
    buffers: frozenset[str]
    wide: set[str]
    dtype: torch.dtype
    writer: Writer

    @functools.cached_property
    def written(self) -> dict[str, torch.Size]:
        """Shapes by the checkpoint's names, of what it has in place of some of the parameters."""
        return {name: size for sizes in self.writer.shapes.values() for name, size in sizes.items()}

    @property
    def names(self) -> set[str]:
        """Names of all parameters as the checkpoint has them."""
        return (self.parameters.keys() - self.writer.shapes.keys()) | self.written.keys()

    def shape_of(self, name: str) -> torch.Size:
        """Shape of a parameter, or of what the checkpoint has in its place; either by its name."""
        found = self.parameters.get(self.tied.get(name, name))
        return self.written[name] if found is None else found[1]


@functools.lru_cache(maxsize=8)
def expected_model(model_path: str) -> Expected:
    """Builds the model on the meta device and lists its parameters.

    Raises:
        WeightsError: its config can't be loaded on this machine.
    """
    model = meta_model(model_path)
    saved = saved_buffers(model)
    sent = {**dict(model.named_parameters()), **saved}
    parameters = {name: (tensor.dtype, tensor.shape) for name, tensor in sent.items()}
    everything = dict(model.named_parameters(remove_duplicate=False))
    writer = Writer(model)
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    wide = {*saved, *(n for n in parameters if any(f".{part}." in f".{n}." for part in kept))}
    return Expected(
        model_path=model_path,
        parameters=parameters,
        tied={
            name: next(first for first, q in model.named_parameters() if q is p)
            for name, p in everything.items()
            if name not in parameters
        },
        optional=frozenset(saved).union(*(writer.shapes.get(name, ()) for name in saved)),
        buffers=frozenset(name for name, _ in model.named_buffers()) - saved.keys(),
        wide=wide.union(*(writer.shapes.get(name, ()) for name in wide)),
        dtype=model.config.dtype or next(model.parameters()).dtype,
        writer=writer,
    )


@functools.lru_cache(maxsize=8)
def model_config(model_path: str) -> Any | None:
    """A model's config; None where it can't be loaded on this machine."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def meta_model(model_path: str) -> Any:
    """The model without any weights; errors as in `expected_model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model_path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WeightsError(
            f"the config of the served model {model_path!r} can't be loaded here "
            f"({type(error).__name__}: {error}), so its parameters aren't known. Make the same "
            "path available to the trainer, or pass model_path= to the weight sync scheme."
        ) from error


def expected_parameters(model_path: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Dtype and shape of each parameter that a push sends; errors as in `expected_model`."""
    return dict(expected_model(model_path).parameters)


NAMED = {"half": torch.float16, "float": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """The dtypes in which weights travel.

    Attributes:
        served: the servers' dtype.
        wide: names of what goes in float32 to all servers; see `Expected.wide`.
    """

    served: torch.dtype
    wide: Collection[str] = ()

    def of(self, name: str) -> torch.dtype:
        """The dtype of one of them."""
        return torch.float32 if name in self.wide else self.served


def served_dtype(info: WorkerInfo, expected: Expected) -> torch.dtype:
    """The dtype of a server's weights.

    Source: SGLang's ``configs/model_config.py``: ``auto`` is the config's dtype, but float32
    becomes float16, and bfloat16 for Gemma.
    """
    if info.dtype != "auto":
        named = NAMED.get(info.dtype) or getattr(torch, info.dtype, None)
        if not isinstance(named, torch.dtype):
            raise WeightsError(f"{info.url} serves dtype {info.dtype!r}, which torch lacks.")
        return named
    if expected.dtype is not torch.float32:
        return expected.dtype
    is_gemma = (info.model_type or "").startswith("gemma")
    return torch.bfloat16 if is_gemma else torch.float16
