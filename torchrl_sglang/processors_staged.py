"""What a logit processor is made of: changes to the logits, one after the other."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Self

from .errors import UnsupportedOptionError
from .processors_ship import Kind
from .protocol import LogitProcessor


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One change to the logits.

    Attributes:
        kind: what the server runs.
        params: its parameters, as JSON.
        allowed: for a mask, a byte of 0 or 1 per id; and
        beyond: whether the ids after these are allowed.
    """

    kind: Kind
    params: str
    allowed: bytes | None = None
    beyond: bool = False

    def after(self, num_tokens: int) -> Self:
        """The stage for a request whose prompt ends with ``num_tokens`` tokens of this one.

        Raises:
            UnsupportedOptionError: a user's class, which may look at the tokens so far.
        """
        if self.kind == "temperature":
            return replace(self, params=json.dumps(_moved_on(json.loads(self.params), num_tokens)))
        if isinstance(self.kind, str):
            return self  # a mask is the same for every token
        raise UnsupportedOptionError(
            f"a completion with a processor of a class of your own was aborted after {num_tokens} "
            "tokens: it can't go on from there, since the class may look at the tokens so far and "
            "would begin again. Generate it anew, or go on with a processor that this library made."
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class StagedProcessor(LogitProcessor):
    """A processor that `combined` can take apart.

    Attributes:
        stages: what it does, in order.
        min_vocab_size: with fewer ids in the model's vocabulary, its masks leave nothing.
    """

    stages: tuple[Stage, ...] = ()
    min_vocab_size: int = 1

    def after(self, num_tokens: int) -> LogitProcessor:
        """Its stages, each from where it was; errors as in `Stage.after`."""
        if num_tokens == 0:
            return self
        stages = tuple(stage.after(num_tokens) for stage in self.stages)
        return replace(self, stages=stages, params={"stages": [stage.params for stage in stages]})

    def __repr__(self) -> str:
        kinds = [stage.kind if isinstance(stage.kind, str) else "class" for stage in self.stages]
        return f"{type(self).__name__}({', '.join(kinds)})"


def _moved_on(params: dict[str, float], num_tokens: int) -> dict[str, float]:
    """What is left of the way from one temperature to another."""
    start, end, length = params["start"], params["end"], params["over_tokens"]
    done = min(num_tokens / length, 1.0)
    left = max(length - num_tokens, 1)
    return {"start": start + (end - start) * done, "end": end, "over_tokens": left}
