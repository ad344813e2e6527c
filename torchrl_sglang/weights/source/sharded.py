"""Gathers, one by one, weights that several ranks of a trainer hold in parts (FSDP2).

Rank 0 pushes. It says which tensor comes next, and the others, who are in `assist_push`, gather it
along with it and forget it. Nobody ever holds the whole model twice.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from ...errors import PushError, WeightsError
from .lazy import LazyWeights
from .named import PREFIXES, check_finite, named_weights, own_part, shown
from .ranks import gathered, hear, say, trainer_rank

DRAIN_S = 10.0


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one rank's part of a larger one (``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; all ranks of its mesh have to ask for it."""
    gathered: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


class ShardedWeights(LazyWeights):
    """Named tensors of which some are sharded; looking one up gathers it, on all ranks.

    All ranks have to gather in one order, so one thread at a time looks tensors up.

    Args:
        parts: the tensors as this rank has them.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__(parts)
        self._announced: list[str] = []
        self._announcer: threading.Thread | None = None
        self._gathering = threading.RLock()
        # Threads of broadcasts that failed: one can wake up when others gather already.
        self._retired: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    @property
    def sharded(self) -> list[str]:
        """Names of those that are sharded."""
        return [name for name, tensor in self.parts.items() if is_sharded(tensor)]

    def announce(self, names: Sequence[str]) -> None:
        """Says in one message which tensors will be looked up next, in this order."""
        with self._gathering:
            self._check_not_retired()
            sharded = [name for name in names if is_sharded(self.parts[name])]
            self._announced += sharded
            self._announcer = threading.current_thread()
            say(("gather", sharded))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.parts[name]
        if not is_sharded(tensor):
            return tensor
        with self._gathering:
            self._check_not_retired()
            if not self._announced:
                self.announce([name])
            if self._announced[0] != name:
                raise RuntimeError(f"{name} is looked up, but {self._announced[0]} was announced")
            self._announced.pop(0)
            return whole(tensor)

    def _check_not_retired(self) -> None:
        if threading.current_thread() in self._retired:
            raise RuntimeError("the broadcast that this thread made was given up")

    def drain(self) -> None:
        """Gathers what was announced and not looked up: the other ranks wait in it.

        Where another thread is to look it up, that one's present gather comes first, and then it
        can gather no more. One that does not end within `DRAIN_S` is left alone, with the other
        ranks: what they gather next would meet something else.
        """
        if not self._gathering.acquire(timeout=DRAIN_S):
            return
        try:
            if self._announcer not in (None, threading.current_thread()):
                self._retired.add(self._announcer)
            while self._announced:
                whole(self.parts[self._announced.pop(0)])
        finally:
            self._gathering.release()

    def compare(self, tied: Mapping[str, str], *, finite: bool) -> None:
        """Has all ranks look at their parts, each of which alone knows whether it is as it must be.

        Args:
            tied: names that have to equal another, and which.
            finite: whether NaN and infinity are refused.

        Raises:
            WeightsError: a rank lacks a name, or a part is not as it must be.
        """
        check = Check(names=self.sharded, tied=dict(tied), finite=finite)
        say(("check", check))
        faults = gathered(check.fault(self.parts))
        found = [f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault]
        if found:
            raise WeightsError(" ".join(found))


@dataclass(frozen=True, kw_only=True)
class Check:
    """What every rank of the trainer has to find in its parts.

    Attributes:
        names: the sharded tensors, in the served model's names.
        tied: names that have to equal another, and which.
        finite: whether NaN and infinity are refused.
    """

    names: list[str]
    tied: dict[str, str]
    finite: bool

    def fault(self, parts: Mapping[str, torch.Tensor]) -> str | None:
        """What is wrong with the parts of this rank; never raises, since others wait for it."""
        try:
            return self._fault(parts)
        except WeightsError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"

    def _fault(self, parts: Mapping[str, torch.Tensor]) -> str | None:
        missing = [name for name in self.names if name not in parts]
        if missing:
            return f"it has no {shown(missing)}, which rank 0 pushes."
        pairs = [(name, other) for name, other in self.tied.items() if {name, other} <= {*parts}]
        differing = [n for n, o in pairs if not torch.equal(own_part(parts[n]), own_part(parts[o]))]
        if differing:
            return f"{shown(differing)} differs from what the served model ties it to."
        held = {name: parts[name] for name in self.names if own_part(parts[name]).numel()}
        if self.finite and held:
            check_finite(held)
        return None


@contextlib.contextmanager
def leading(source: Any) -> Iterator[None]:
    """A push of weights that may be sharded: when it is over, the other ranks are let go.

    Raises:
        WeightsError: this rank is not the one that pushes.
    """
    if not any(map(is_sharded, _tensors(source))):
        yield
        return
    check_leader()
    try:
        yield
    except BaseException as error:
        say(("done", f"{type(error).__name__}: {error}"))
        raise
    say(("done", None))


def _tensors(source: Any) -> Iterable[Any]:
    if isinstance(source, nn.Module):
        return source.parameters()
    if isinstance(source, TensorDictBase):
        leaves: Iterable[Any] = source.values(include_nested=True, leaves_only=True)
        return leaves
    return source.values() if isinstance(source, Mapping) else ()


def check_leader() -> None:
    """Raises `WeightsError` on a rank other than 0 that tries to push sharded weights."""
    if trainer_rank() != 0:
        raise WeightsError(
            f"rank {trainer_rank()} pushes sharded weights: rank 0 pushes, the others call "
            "assist_push(model) at the same time."
        )


def assist_push(source: Any) -> None:
    """Gathers sharded weights along with rank 0, which pushes them at the same time.

    Every rank of the trainer but 0 calls this where rank 0 calls ``send``.

    Args:
        source: the same model, or state dict, as on rank 0, with this rank's parts.

    Raises:
        WeightsError: this rank has other names than rank 0.
        PushError: the push failed on rank 0; says how.
    """
    weights = named_weights(source)
    while True:
        kind, *said = hear()
        if kind == "done":
            [error] = said
            if error is not None:
                raise PushError(f"rank 0 said: {error}", step="push")
            return
        [what] = said
        if kind == "check":
            weights = _renamed(weights, what.names)
            if any(gathered(fault := what.fault(weights))) and fault:
                _hear_the_end()
                raise WeightsError(f"rank {trainer_rank()}: {fault}")
        else:
            for name in what:
                whole(weights[name])


def _hear_the_end() -> None:
    """Rank 0 has learnt what is wrong, gathers nothing and says so."""
    hear()


def _renamed(weights: dict[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Under the names that rank 0 uses, which leaves out the prefixes of wrappers."""
    tried = weights
    while not tried.keys() >= {*names}:
        prefix = next((p for p in PREFIXES if all(n.startswith(p) for n in tried)), None)
        if prefix is None:
            return weights
        tried = {name.removeprefix(prefix): tensor for name, tensor in tried.items()}
    return tried
