"""Merges a PEFT model's adapters into the base model's weights as these are sent.

The model itself is left alone: merging in place and unmerging would round its weights each time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import WeightsError
from .checkpoint import saved_buffers
from .lazy import LazyWeights


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT has put adapters into a model."""
    return isinstance(getattr(module, "peft_config", None), dict)


def base_model(module: nn.Module) -> nn.Module:
    """The model that PEFT was given, with its adapters in it."""
    get = getattr(module, "get_base_model", None)
    base: nn.Module = get() if get is not None else module
    return base


def base_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's parameters, and buffers of its checkpoint, under its own names.

    What adapters add is left out.

    Where PEFT trains a copy of a whole module (``modules_to_save``), they are the copy's.

    Raises:
        WeightsError: an adapter has no weights to merge, such as a prompt's.
    """
    _check_kinds(module)
    parts = [*_parts(base_model(module))]
    named: dict[str, torch.Tensor] = {
        f"{prefix}{name}": parameter
        for prefix, part in parts
        for name, parameter in part.named_parameters(recurse=False)
    }
    saved = {id(buffer) for buffer in saved_buffers(module).values()}
    named |= {
        f"{prefix}{name}": buffer
        for prefix, part in parts
        for name, buffer in part.named_buffers(recurse=False)
        if id(buffer) in saved
    }
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    return {name: p for name, p in named.items() if first[id(p)] == name}  # tied ones once


def _check_kinds(module: nn.Module) -> None:
    for adapter, config in module.peft_config.items():  # type: ignore[operator,union-attr]
        if getattr(config, "is_prompt_learning", False):
            raise WeightsError(
                f"adapter {adapter!r} is of type {config.peft_type}, which changes prompts and not "
                "weights: SGLang has no place for it."
            )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold parameters of the base model, and the prefix of their names there."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, BaseTunerLayer):
            yield from walk(module.get_base_layer(), prefix)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield from walk(_saved(module), prefix)
        else:
            yield prefix, module
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}{name}.")

    return walk(model, "")


def _saved(wrapper: Any) -> nn.Module:
    """The module that is trained in place of another, or that other where none is active."""
    active = [name for name in wrapper.active_adapters if name in wrapper._adapters]
    saved = getattr(wrapper, "modules_to_save", None)
    original: nn.Module = wrapper.original_module
    if not active or wrapper.disable_adapters:
        return original
    if saved is None or active[0] not in saved:
        raise WeightsError(
            f"{type(wrapper).__name__} of PEFT is not known here: merge the adapters yourself "
            "(merge_and_unload on a copy), and push that."
        )
    module: nn.Module = saved[active[0]]
    return module


def tuned_layers(module: nn.Module) -> dict[int, Any]:
    """The layer with adapters that each base parameter is in, by the parameter's ``id``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        id(parameter): layer
        for layer in base_model(module).modules()
        if isinstance(layer, BaseTunerLayer)
        for name, parameter in layer.get_base_layer().named_parameters(recurse=False)
        # One that wraps a parameter, as of experts, merges into that alone; others wrap the rest.
        if getattr(layer, "parameter_name", name) == name
    }


def adapter_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of all adapters."""
    base = {id(parameter) for parameter in base_weights(module).values()}
    return {name: p for name, p in module.named_parameters() if id(p) not in base}


class MergedWeights(LazyWeights):
    """A base model's weights with the active adapters merged in, as PEFT itself merges them.

    Args:
        parts: base parameters, by name.
        layers: from `tuned_layers`.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor], layers: Mapping[int, Any]) -> None:
        super().__init__(parts)
        self._layers = layers

    def __getitem__(self, name: str) -> torch.Tensor:
        """One merged tensor; a copy of one layer is made for it."""
        part = self.parts[name]
        layer = self._layers.get(id(part))
        if layer is None or layer.merged or layer.disable_adapters:
            return part
        leaf = name.rpartition(".")[2]
        merged = copy.deepcopy(layer)
        with torch.no_grad():
            merged.merge()
        tensor: torch.Tensor = merged.get_base_layer().get_parameter(leaf)
        return tensor
