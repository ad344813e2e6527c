"""Reads a LoRA adapter's configuration and tensors from what a trainer holds, and checks them."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from ...errors import UnsupportedOptionError, WeightsError
from ...servers.lora_folder import LORA_WEIGHT, adapter_path, find_problem, find_unread
from ..source.named import are, check_dtypes, check_finite, plain_name, shown, unwrap
from ..source.sharded import is_sharded

WORKS = (
    "push a PEFT model, the path of an adapter's folder, or a mapping of LoRA tensors with the "
    "PEFT model that they belong to as the registered one."
)
# What PEFT trains beside the two matrices, and the values at which it trains nothing.
NOT_LORA: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_dora": (None, False),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter to push.

    Attributes:
        folder: where the servers find it; None: they get the tensors.
        config: its configuration, fit for JSON.
        tensors: its weights, by PEFT's names for files.
        parameters: the same, by the names of the model's parameters.
        model: the PEFT model; None where only the folder is known.
    """

    folder: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    model: nn.Module | None = None


def read_adapter(
    source: Any, reference: Any, *, server_urls: Sequence[str], finite: bool
) -> AdapterSource:
    """Reads and checks an adapter; nothing is copied.

    Args:
        source: PEFT model, also in a wrapper; path of a PEFT folder, or hub name; or LoRA tensors
            by name.
        reference: PEFT model that ``source`` belongs to, if it is a mapping.
        server_urls: where the servers are.
        finite: refuse NaN and infinity.

    Raises:
        WeightsError: there is none, or it is no such thing, or its names, shapes, dtypes or values
            are wrong.
        UnsupportedOptionError: an adapter that SGLang would compute wrongly.
        ConfigError: a folder with no adapter, or with a damaged one.
    """
    if source is None:
        raise WeightsError(f"there is no adapter to push: {WORKS}")
    if isinstance(source, str | os.PathLike):
        return AdapterSource(folder=adapter_path(source, server_urls))
    is_mapping = isinstance(source, Mapping | TensorDictBase)
    model, name = _peft_model(reference if is_mapping else source, source)
    config = plain_config(model.peft_config[name].to_dict())
    check_config(config)
    tensors = adapter_tensors(model, name)
    if is_mapping:
        tensors = _given_tensors(source, tensors, model, name)
    check_tensors(tensors, config["r"], finite=finite)
    modules = {m["module"].rpartition(".")[2] for m in map(LORA_WEIGHT.fullmatch, tensors) if m}
    return AdapterSource(
        # As names: SGLang knows no patterns, which PEFT takes too.
        config={**config, "target_modules": sorted(modules)},
        tensors=tensors,
        parameters={_parameter_name(each, name): tensor for each, tensor in tensors.items()},
        model=model,
    )


def _peft_model(module: Any, source: Any) -> tuple[Any, str]:
    """The PEFT model in whatever it is wrapped in, and the name of its active adapter."""
    model = unwrap(module) if isinstance(module, nn.Module) else None
    if not getattr(model, "peft_config", None):
        given = f"a {type(source).__name__}"
        if module is not source:
            given += (
                " without a PEFT model that it belongs to"
                if module is None
                else (f" that belongs to a {type(module).__name__}, which is no PEFT model,")
            )
        raise WeightsError(f"can't push an adapter from {given}: {WORKS}")
    active: Any = model.active_adapters  # type: ignore[union-attr]
    names = list(active() if callable(active) else active)
    if len(names) != 1:
        raise WeightsError(
            f"the PEFT model has {len(names)} active adapters, {names}: choose the one to push "
            "with model.set_adapter(name)."
        )
    return model, names[0]


def adapter_tensors(model: Any, name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights, by the names that PEFT's ``save_pretrained`` gives them."""
    from peft import get_peft_model_state_dict

    # Embeddings are the base model's own: PEFT would ask a hub whether they have grown.
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {plain_name(each): tensor for each, tensor in found.items()}


def _given_tensors(
    source: Any, known: Mapping[str, torch.Tensor], model: nn.Module, adapter: str
) -> dict[str, torch.Tensor]:
    """The adapter's tensors out of a mapping, which may hold the base model's too."""
    found = dict(source.flatten_keys(".").items()) if hasattr(source, "flatten_keys") else source
    given = {_file_name(each, adapter): tensor for each, tensor in found.items()}
    missing = [each for each in known if each not in given]
    if missing:
        raise WeightsError(
            f"of the adapter's {len(known)} tensors, {len(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {shown(missing)}."
        )
    others = given.keys() - known.keys()
    if others:
        whole = {**model.state_dict(), **dict(model.named_buffers())}
        base = {_file_name(each, adapter) for each in whole}
        unknown = sorted(others - base)
        if unknown:
            raise WeightsError(
                f"{are(len(unknown), 'name')} not of the adapter: {shown(unknown)}. It has "
                f"names like {shown(list(known))}."
            )
    for each, tensor in known.items():
        if not isinstance(given[each], torch.Tensor) or given[each].shape != tensor.shape:
            what = getattr(given[each], "shape", type(given[each]).__name__)
            raise WeightsError(f"{each} is {what}; the PEFT model has {tuple(tensor.shape)}.")
    return {each: given[each] for each in known}


def _file_name(parameter: str, adapter: str) -> str:
    """``x.lora_A.default.weight`` as PEFT writes it to files: ``x.lora_A.weight``.

    Without what wrappers put before it, either.
    """
    parameter = re.sub(r"^.*?(?=base_model\.)", "", plain_name(parameter))
    return re.sub(rf"(\.lora_(?:embedding_)?[AB])\.{re.escape(adapter)}(?=\.|$)", r"\1", parameter)


def _parameter_name(file_name: str, adapter: str) -> str:
    """The other way round."""
    return re.sub(r"(\.lora_(?:embedding_)?[AB])(?=\.|$)", rf"\1.{adapter}", file_name)


def check_config(config: Mapping[str, Any]) -> None:
    """Raises for a configuration that SGLang does not read, or reads as another."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise UnsupportedOptionError(
            f"the adapter is of the type {config.get('peft_type')}: SGLang serves LORA alone."
        )
    unread = find_unread(config) or find_unread(config, NOT_LORA)
    if unread is not None:
        raise UnsupportedOptionError(
            f"the adapter has {unread}={config[unread]!r}, which SGLang does not read: it would "
            "generate as if it were not there. Push the whole model instead, merged "
            "(merge_and_unload()), with WeightSyncConfig(method='broadcast')."
        )


def check_tensors(tensors: Mapping[str, torch.Tensor], rank: int, *, finite: bool) -> None:
    """Raises `WeightsError` for an adapter that SGLang can't compute with, or that is not whole."""
    if not tensors:
        raise WeightsError("the adapter is empty: it has no LoRA tensors.")
    sharded = [name for name, tensor in tensors.items() if is_sharded(tensor)]
    if sharded:
        raise WeightsError(
            f"{are(len(sharded), 'tensor')} sharded: {shown(sharded)}. Gather the adapter first, "
            "and push its tensors by name (torch.distributed.checkpoint.state_dict does it)."
        )
    problem = find_problem({name: list(tensor.shape) for name, tensor in tensors.items()}, rank)
    if problem is not None:
        raise WeightsError(f"the adapter can't be served: {problem}.")
    check_dtypes(tensors)
    if finite:
        check_finite(tensors)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration as JSON takes it: lists for sets, values for enums."""
    return {key: _plain(value) for key, value in config.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
