"""Names the tensors of whatever a trainer holds as Hugging Face does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from ...errors import WeightsError, count_of
from .expected import Expected
from .merged import base_weights, has_adapters

# Wrappers that a training script puts around its model: the attribute that holds the model.
WRAPPER_ATTRIBUTES = ("_orig_mod", "module", "model")
# What the same wrappers leave in the names of a state dict.
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PREFIXES = ("module.", "model.")
MAX_NAMES_SHOWN = 5


Translation = Callable[[Mapping[str, Any]], Mapping[str, Any] | Iterable[tuple[str, Any]]]


def named_weights(source: Any, translate: Translation | None = None) -> dict[str, torch.Tensor]:
    """Names and tensors of a module, a wrapper, a TensorDict or a state dict; nothing is copied.

    Of tensors that share their memory (tied embeddings) only the first is kept. Of a PEFT model
    these are the base model's; `merged` tells what is merged into them.

    Args:
        source: what to take them from.
        translate: from the trainer's entries, by name, to Hugging Face's names and tensors.

    Raises:
        WeightsError: ``source`` is None, or something else, or holds no tensor.
    """
    if source is None:
        raise WeightsError(
            "there are no weights to push: pass the model, as push(model) or "
            "update_policy_weights_(model), or register it once with register_model(model)."
        )
    if isinstance(source, nn.Module):
        refuse_fsdp1(source)
        inner = unwrap(source)
        found: Mapping[str, Any] = (
            base_weights(inner) if has_adapters(inner) else inner.state_dict()
        )
    elif isinstance(source, TensorDictBase):
        found = dict(source.flatten_keys(".").items())
    elif isinstance(source, Mapping):
        found = source
    else:
        raise WeightsError(
            f"can't take weights from a {type(source).__name__}: pass a module, a TensorDict, a "
            "state dict, or pairs of name and tensor."
        )
    tensors: dict[str, Any] = {plain_name(name): value for name, value in found.items()}
    if translate is not None:
        tensors = _translated(tensors, translate)
    wrong = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if wrong or not tensors:
        raise WeightsError(
            f"these entries are no tensors: {shown(wrong)}." if wrong else "the weights are empty."
        )
    return untied(tensors)


def taken_in(source: Any) -> Any:
    """Pairs of name and tensor as a mapping, which uses up an iterator; all else as it is.

    Raises:
        WeightsError: a name comes twice, or something is no pair.
    """
    is_one = isinstance(source, nn.Module | TensorDictBase | Mapping | torch.Tensor | str)
    return source if is_one or not isinstance(source, Iterable) else named_once(source)


def named_once(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What an iterator, or a mapping, names.

    Raises:
        WeightsError: a name comes twice, or something is no pair.
    """
    items = getattr(weights, "items", None)
    named: dict[str, torch.Tensor] = {}
    for pair in items() if items is not None else weights:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise WeightsError(f"weights come as pairs of name and tensor, not {type(pair)}.")
        name, tensor = pair
        if name in named:
            raise WeightsError(f"the weights name {name} twice.")
        named[name] = tensor
    return named


def refuse_fsdp1(module: nn.Module) -> None:
    """Raises `WeightsError` for a module that only all ranks together can read."""
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise WeightsError(
            "this module is wrapped by FullyShardedDataParallel (FSDP1), whose ranks have to "
            "gather it together: shard with fully_shard (FSDP2) and call assist_push, or let all "
            "ranks call get_model_state_dict of torch.distributed.checkpoint, with "
            "full_state_dict=True, and push what rank 0 gets."
        )


def _translated(entries: Mapping[str, Any], translate: Translation) -> dict[str, Any]:
    if any(hasattr(entry, "full_tensor") for entry in entries.values()):
        raise WeightsError(
            "these weights are sharded, and a translation of names can't be applied to the parts "
            "that one rank has: leave WeightSyncConfig(translate=...) out, or push a whole state "
            "dict."
        )
    given = translate(entries)
    pairs = given.items() if isinstance(given, Mapping) else given
    made: dict[str, Any] = {}
    for name, tensor in pairs:
        if name in made:
            raise WeightsError(f"the translation of the weights names {name} twice.")
        made[name] = tensor
    return made


def unwrap(module: nn.Module) -> nn.Module:
    """The Hugging Face model inside TorchRL's, DDP's and ``torch.compile``'s wrappers."""
    while not hasattr(module, "config"):
        inner = next(
            (
                candidate
                for name in WRAPPER_ATTRIBUTES
                if isinstance(candidate := getattr(module, name, None), nn.Module)
            ),
            None,
        )
        if inner is None:
            return module
        module = inner
    return getattr(module, "_orig_mod", module)


def plain_name(name: str) -> str:
    """The name without what compilers and sharders put in."""
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name


def untied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without those that are the same memory under another name."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        identity = (own_part(tensor).data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        # The empty part of a sharded tensor has no address that could tell.
        if own_part(tensor).numel() and not tensor.is_meta and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor
    return kept


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def matched(
    weights: Mapping[str, torch.Tensor], expected: Expected, *, partial: bool = False
) -> dict[str, torch.Tensor]:
    """The weights under the served model's names, or its checkpoint's, checked to be it, whole.

    Args:
        weights: under the trainer's names.
        expected: the served model.
        partial: a part of the model will do.

    Raises:
        WeightsError: a name is unknown or missing, a shape is another, a dtype is not floating.
    """
    names = served_names(weights, expected, partial=partial)
    named = {names[name]: tensor for name, tensor in weights.items()}
    check_dtypes({n: t for n, t in named.items() if n not in expected.buffers})
    check_tied(named, expected)
    if partial:  # a tied name alone means its partner
        named = {
            partner: named[name] for name, partner in expected.tied.items() if name in named
        } | named
    pushed = {**expected.parameters, **expected.written}
    named = {name: tensor for name, tensor in named.items() if name in pushed}
    if not named:
        raise WeightsError("these weights are buffers only, which servers compute themselves.")
    check_shapes(named, expected)
    return named


def served_names(
    given: Iterable[str], expected: Expected, *, partial: bool = False
) -> dict[str, str]:
    """What the served model calls each of these names, without the wrappers' prefixes.

    Where its checkpoint has other names, they are understood too, and stay.

    Args:
        given: the trainer's names.
        expected: the served model.
        partial: a part of the model's names will do.

    Raises:
        WeightsError: a name is unknown, or one of the model's is missing.
    """
    known = {*expected.parameters, *expected.tied, *expected.buffers, *expected.written}
    named = {name: name for name in given}
    while not known.issuperset(named.values()):
        prefix = next(
            (p for p in PREFIXES if all(name.startswith(p) for name in named.values())), None
        )
        if prefix is None:
            break
        named = {name: stripped.removeprefix(prefix) for name, stripped in named.items()}
    unknown = [name for name, stripped in named.items() if stripped not in known]
    if unknown:
        # Judged by the names as they were given, which the caller recognises.
        unknown = [name for name in named if name not in known] or unknown
        raise WeightsError(
            f"{are(len(unknown), 'name')} not of the served model {expected.model_path}: "
            f"{shown(unknown)}. It has names like {shown(list(expected.parameters))}."
        )
    found = set(named.values())
    missing = []
    for name in expected.parameters:
        written = expected.writer.shapes.get(name, {})
        if name in found:
            if twice := [w for w in written if w in found]:
                raise WeightsError(f"the weights have {name}, and parts of it too: {shown(twice)}.")
        elif name not in expected.optional:
            missing += [w for w in written if w not in found] or ([] if written else [name])
    if missing and not partial:
        raise WeightsError(
            f"of {len(expected.parameters)} parameters of {expected.model_path}, {len(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {shown(missing)}. A push takes the "
            "whole model, unless it is told partial=True."
        )
    return named


def check_tied(weights: Mapping[str, torch.Tensor], expected: Expected) -> None:
    """Raises `WeightsError` where two tied parameters differ: the servers hold only one of them."""
    for name, partner in expected.tied.items():
        if not {name, partner} <= weights.keys():
            continue
        if not torch.equal(own_part(weights[name]), own_part(weights[partner])):
            raise WeightsError(
                f"{name} differs from {partner}, but {expected.model_path} ties them: tie "
                "them in training too, or set tie_word_embeddings to false in its config."
            )


def check_shapes(weights: Mapping[str, torch.Tensor], expected: Expected) -> None:
    """Raises `WeightsError` for a tensor of another shape than the served model's."""
    for name, tensor in weights.items():
        shape = expected.shape_of(name)
        if tensor.shape != shape:
            raise WeightsError(
                f"{name} has shape {tuple(tensor.shape)}; {expected.model_path} has {tuple(shape)}:"
                " is it the same model?"
            )


def check_dtypes(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises `WeightsError` for a tensor that can't be cast to the served model's dtype."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise WeightsError(
                f"{name} has dtype {tensor.dtype}: weights are pushed as float16, bfloat16, "
                "float32 or float64, which are cast to the served model's dtype."
            )
        if tensor.is_meta:
            raise WeightsError(f"{name} is on the meta device: it has no values to push.")


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises `WeightsError` for weights that are NaN or infinite."""
    parts = {name: own_part(tensor.detach()) for name, tensor in weights.items()}
    held = {name: part for name, part in parts.items() if part.numel()}
    wrong = [
        name for name, good in zip(held, _are_finite([*held.values()]), strict=True) if not good
    ]
    if wrong:
        raise WeightsError(
            f"NaN or infinity in {len(wrong)} of the {len(weights)} tensors: {shown(wrong)}. The "
            f"servers still run their old weights. (A push of such weights on "
            "purpose takes WeightSyncConfig(check_finite=False).)"
        )


def check_no_nan(buffers: Mapping[str, torch.Tensor]) -> None:
    """Raises `WeightsError` for buffers that are NaN; some are infinite for good."""
    wrong = [name for name, tensor in buffers.items() if bool(own_part(tensor).isnan().any())]
    if wrong:
        raise WeightsError(
            f"NaN in {count_of(len(wrong), 'buffer')}: {shown(wrong)}. The servers still run their "
            "old weights. (A push of such weights on purpose takes "
            "WeightSyncConfig(check_finite=False).)"
        )


def _are_finite(tensors: list[torch.Tensor]) -> list[bool]:
    """Whether tensors hold no NaN and no infinity, read once and waited for once."""
    if not tensors:
        return []
    if all(tensor.is_cuda for tensor in tensors):
        ends = [*torch._foreach_norm(tensors, math.inf)]  # one kernel for many tensors
    else:  # on a CPU the smallest and the largest are found several times as fast as a norm
        ends = [torch.stack(tensor.aminmax()).abs().amax() for tensor in tensors]
    finite: list[bool] = torch.stack([end.float().cpu() for end in ends]).isfinite().tolist()
    return finite


def are(number: int, thing: str) -> str:
    """A number of things, and the verb: "1 name is", "2 names are"."""
    return f"{count_of(number, thing)} {'is' if number == 1 else 'are'}"


def shown(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more
