"""Writes a model's parameters as its checkpoint has them, which is what servers load.

Transformers 5 holds some of them otherwise: the experts of a layer stacked in one tensor, for one,
of which a checkpoint has a tensor per expert. It knows the way back, since it also saves models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .lazy import LazyWeights, placeholders

Written = Mapping[str, torch.Tensor]


class Writer:
    """Makes of a parameter what a checkpoint has in its place.

    Args:
        model: the model, on any device; only what it is made of matters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.shapes: dict[str, dict[str, torch.Size]] = {}
        parameters = {**dict(model.named_parameters()), **saved_buffers(model)}
        whole = self._reverted(parameters)
        for name, parameter in parameters.items():
            if name not in whole or whole[name].shape != parameter.shape:
                made = self.written(name, parameter)
                # What a checkpoint joins with others can't be made of one alone: it keeps its name.
                if all(n in whole and whole[n].shape == part.shape for n, part in made.items()):
                    self.shapes[name] = {n: tensor.shape for n, tensor in made.items()}

    def written(self, name: str, tensor: torch.Tensor) -> Written:
        """What a checkpoint has instead of one parameter, by the checkpoint's names.

        Args:
            name: the parameter's name in the model.
            tensor: its values; any copies that are made are on its device, in its dtype.
        """
        return self._reverted({name: tensor.detach()})

    @torch.no_grad()
    def _reverted(self, tensors: Mapping[str, torch.Tensor]) -> Written:
        from transformers.core_model_loading import revert_weight_conversion

        made: Written = revert_weight_conversion(self._model, dict(tensors))
        return made


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a model's checkpoint has beside its parameters; those of integers left out.

    Some steer what is computed: the biases that balance experts, the scale of a layer.
    """
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    }


def as_written(weights: Mapping[str, torch.Tensor], writer: Writer) -> Mapping[str, torch.Tensor]:
    """A model's weights under its checkpoint's names; the same object where those are the same."""
    same = writer.shapes.keys().isdisjoint(weights)
    return weights if same else CheckpointWeights(weights, writer)


class CheckpointWeights(LazyWeights):
    """A model's weights under its checkpoint's names, made of one parameter at a time.

    Args:
        source: the weights by the model's names.
        writer: of that model.
    """

    def __init__(self, source: Mapping[str, torch.Tensor], writer: Writer) -> None:
        self.source = source
        self._writer = writer
        self._made_of: dict[str, str] = {}
        self._held: tuple[str, Written] = ("", {})
        parts: dict[str, torch.Tensor] = {}
        for name, part in placeholders(source).items():
            for written, shape in writer.shapes.get(name, {name: part.shape}).items():
                self._made_of[written] = name
                parts[written] = part if written == name else _of_shape(part, shape)
        super().__init__(parts)

    def announce(self, names: Sequence[str]) -> None:
        """Says which tensors will be looked up next, in this order."""
        if isinstance(self.source, LazyWeights):
            following = [self._made_of[name] for name in names]
            before = [self._held[0], *following]
            self.source.announce([n for n, b in zip(following, before, strict=False) if n != b])

    def drain(self) -> None:
        """Gives up what was announced and not looked up, and lets go of what it holds."""
        self._held = ("", {})
        if isinstance(self.source, LazyWeights):
            self.source.drain()

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor; what is made of the same parameter is held until another is asked for."""
        made_of = self._made_of[name]
        if self._held[0] != made_of:
            self._held = ("", {})
        if made_of not in self._writer.shapes:
            return self.source[made_of]
        if not self._held[0]:
            self._held = (made_of, self._writer.written(made_of, self.source[made_of]))
        return self._held[1][name]


def _of_shape(part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor that has no memory, on the same device."""
    return torch.empty((), dtype=part.dtype, device=part.device).expand(shape)
