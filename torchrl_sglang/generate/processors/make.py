"""Logit processors: action masks, a moving temperature, and classes of a user's own.

A processor changes the logits inside the server, before it samples, and goes with a request: rows
of one batch can have different ones, or none. The servers need
``enable_custom_logit_processor=True``, which lets whoever has a server's API key run code there.

SGLang's router (0.3.2) passes the class on and drops its parameters, which ends the server: a
request with a processor has to go to a server itself.

Where it stands: model -> ``logit_bias``, penalties, grammar -> processor -> temperature -> softmax
-> top-k, top-p, min-p -> sample. The log-probs that SGLang reports are taken after the softmax, so
they are those of the processed and tempered distribution: ``log_softmax`` over the allowed ids
alone, for an action mask. Prompt log-probs (scoring) know no processor. A trainer has to do to its
own logits what the processor did. SGLang refuses a sampling mask beside a processor.

Nothing has to be installed beside SGLang: `allowed_tokens`, `disallowed_tokens` and
`progress_temperature` travel as source text, to any Python version that SGLang runs on. A user's
own class travels by value as bytecode, by cloudpickle: client and server must run the same minor
version of Python, and the server needs ``cloudpickle``. What goes wrong on the server (another
Python, a module that it lacks, an exception in the class, a row without a finite logit) ends the
requests concerned with `RequestRefusedError`, and leaves the server running. Only what the device
itself refuses, such as an index out of range on a GPU, still ends the server.

Source: SGLang's ``sampling/custom_logit_processor.py`` and ``layers/sampler.py``.
"""

from __future__ import annotations

import base64
import json
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from ...config import is_count, is_number
from ...errors import ConfigError, InputError, UnsupportedOptionError
from ..request import LogitProcessor
from .ship import Kind, class_kind, serialized

# No vocabulary has an id as large; a mask takes a byte per id while it is made.
MAX_ID = 2**24
LOWEST_TEMPERATURE = 1e-6  # SGLang's own; below it samples greedily

Ids = Iterable[int] | torch.Tensor


def allowed_tokens(ids: Ids) -> StagedProcessor:
    """An action mask: only these ids can be sampled.

    It costs one pass over the logits per step. Generation goes on to ``max_new_tokens`` where
    neither EOS nor a stop token is among the ids. Where something else forbids all of them (EOS
    alone is allowed and ``min_new_tokens`` is not reached), the mask wins.

    Args:
        ids: token ids; or a bool tensor over the vocabulary, shape ``(vocab,)``, True for what
            can be sampled. Ids of the model after the tensor's end are not.

    Raises:
        InputError: no id is allowed, or an id is negative or too large. Ids that are all outside
            of the model's vocabulary are known to the server alone: `RequestRefusedError`.
        ConfigError: neither ids nor a bool tensor.
    """
    return _masking(_flags(ids), beyond=False)


def disallowed_tokens(ids: Ids) -> StagedProcessor:
    """These ids can't be sampled, everything else can.

    Args:
        ids: token ids; or a bool tensor over the vocabulary, shape ``(vocab,)``, True for what
            can't be sampled.

    Raises:
        InputError: a bool tensor that leaves nothing; an id is negative or too large.
        ConfigError: neither ids nor a bool tensor.
    """
    banned = _flags(ids)
    if _is_mask(ids) and banned.find(0) < 0:
        raise InputError("disallowed_tokens: every id is disallowed, so nothing can be sampled.")
    return _masking(_inverted(banned), beyond=True)


def progress_temperature(start: float, end: float, over_tokens: int) -> StagedProcessor:
    """The temperature moves linearly from one to another, then stays there.

    The token after ``k`` generated ones is sampled at
    ``start + (end - start) * min(k / over_tokens, 1)``: the first at ``start``, and from the one
    after ``over_tokens`` tokens on at ``end``. This takes the place of the request's own
    ``temperature``, but a request at temperature 0 stays greedy. Reported log-probs are those
    at the temperature that was used. With speculative decoding all tokens of a step share one.

    Args:
        start: temperature of the first token, at least 1e-6.
        end: the last temperature, at least 1e-6.
        over_tokens: length of the way in generated tokens, at least 1.

    Raises:
        ConfigError: a value out of range.
    """
    for name, value in (("start", start), ("end", end)):
        if not is_number(value) or value < LOWEST_TEMPERATURE:
            raise ConfigError(
                f"progress_temperature: {name}={value!r}: must be a number of at least "
                f"{LOWEST_TEMPERATURE}."
            )
    if not is_count(over_tokens):
        raise ConfigError(
            f"progress_temperature: over_tokens={over_tokens!r}: must be an integer of at least 1."
        )
    params = {"start": float(start), "end": float(end), "over_tokens": over_tokens}
    return _of_stages(Stage(kind="temperature", params=json.dumps(params)))


def user_processor(cls: type, params: Mapping[str, Any] | None = None) -> StagedProcessor:
    """A class of the user's own, sent to the server by value.

    SGLang makes an object (``cls()``) for each batch that starts, and calls it at every step with
    ``logits``, float32 of shape ``(rows, vocab)``, which it may change in place, and with a list
    of ``rows`` dictionaries; it returns logits of that shape. The rows are all requests of the
    batch with this class, whatever their ``params``. The dictionary of a request holds its
    ``params`` and ``"__req__"``, SGLang's request (``origin_input_ids``, ``output_ids``; in the
    overlapped schedule the latter is a token behind). It is the same object at every step of the
    request, so what has to be remembered can be kept in it; what is kept in ``self`` gets lost.
    The library's check of the result waits for the device once per step.

    The class comes along with what it uses of its own top-level package, or of ``__main__``; other
    packages have to be importable on the server. SGLang keeps each distinct class until the server
    ends, so what changes from request to request belongs into ``params``.

    Args:
        cls: the class. It need not derive from SGLang's ``CustomLogitProcessor``.
        params: anything JSON, with strings as keys.

    Raises:
        ConfigError: no such class, one that can't be pickled or takes more than 1 MiB; parameters
            that are no JSON.
    """
    kind = class_kind(cls)
    return _of_stages(Stage(kind=kind, params=_json_params(cls, params or {})))


def combined(*processors: LogitProcessor) -> StagedProcessor:
    """Several processors as one, applied in the order given; a request carries only one.

    Raises:
        ConfigError: none is given, one comes from elsewhere, or two move the temperature.
        InputError: no id is allowed by all masks.
    """
    if not processors:
        raise ConfigError("combined() needs at least one processor.")
    for index, given in enumerate(processors):
        if not isinstance(given, StagedProcessor):
            raise ConfigError(
                f"combined() takes processors that this module made; argument {index} is a "
                f"{type(given).__name__}. Wrap a class of your own with user_processor."
            )
    made = [given for given in processors if isinstance(given, StagedProcessor)]
    stages = [stage for given in made for stage in given.stages]
    if sum(stage.kind == "temperature" for stage in stages) > 1:
        raise ConfigError("combined() takes one progress_temperature; more would contradict.")
    return _of_stages(*stages)


def _is_mask(ids: object) -> bool:
    return str(getattr(ids, "dtype", "")) in ("torch.bool", "bool")


def _flags(ids: Ids) -> bytes:
    """A byte per id up to the largest, 1 for those given."""
    if hasattr(ids, "dtype"):
        ids = torch.as_tensor(ids).cpu()
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex():
            raise ConfigError(
                "token ids are given as a 1-D tensor of integers, or of bool over the vocabulary; "
                f"got shape {tuple(ids.shape)}, {ids.dtype}."
            )
        if ids.dtype == torch.bool:
            return ids.numpy().tobytes()
        ids = ids.tolist()
    flags = bytearray()
    for token in _checked(ids):
        if token >= len(flags):
            flags.extend(bytes(token + 1 - len(flags)))
        flags[token] = 1
    return bytes(flags)


def _checked(ids: Iterable[Any]) -> Iterator[int]:
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise ConfigError(f"token ids are a sequence of integers or a tensor, got {ids!r:.100}.")
    for given in ids:
        if isinstance(given, bool) or not hasattr(given, "__index__"):
            raise ConfigError(
                f"{given!r:.100} is no token id: give integers, or a bool tensor over all ids."
            )
        token = operator.index(given)
        if not 0 <= token < MAX_ID:
            raise InputError(f"{token} is no token id: it must be in 0..{MAX_ID - 1}.")
        yield token


def _inverted(flags: bytes) -> bytes:
    return flags.translate(bytes((1, 0)) + bytes(254))


def _masking(allowed: bytes, *, beyond: bool) -> StagedProcessor:
    packed = base64.b64encode(zlib.compress(allowed, 1)).decode()
    params = json.dumps({"mask": packed, "beyond": beyond})
    return _of_stages(Stage(kind="tokens", params=params, allowed=allowed, beyond=beyond))


def _first_allowed(stages: Iterable[Stage]) -> int | None:
    """The smallest id that all masks allow; None if there is none."""
    masks = [(stage.allowed, stage.beyond) for stage in stages if stage.allowed is not None]
    length = max((len(allowed) for allowed, _ in masks), default=0)
    joint = (1 << 8 * length) - 1
    for allowed, beyond in masks:
        padded = allowed + bytes((beyond,)) * (length - len(allowed))
        joint &= int.from_bytes(padded, "little")
    first = joint.to_bytes(length, "little").find(1) if masks else 0
    if first < 0:
        return length if all(beyond for _, beyond in masks) else None
    return first


def _of_stages(*stages: Stage) -> StagedProcessor:
    first = _first_allowed(stages)
    if first is None:
        raise InputError(
            "no id is left that could be sampled: the mask is empty"
            + (", or the masks exclude each other." if len(stages) > 1 else ".")
        )
    return StagedProcessor(
        serialized=serialized(tuple(stage.kind for stage in stages)),
        params={"stages": [stage.params for stage in stages]},
        stages=stages,
        min_vocab_size=first + 1,
    )


def _json_params(cls: type, params: Mapping[str, Any]) -> str:
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        raise ConfigError(
            f"parameters of {cls.__name__}: a mapping with strings as keys is needed."
        )
    if "__req__" in params:
        raise ConfigError(f"parameters of {cls.__name__}: '__req__' is SGLang's own.")
    try:
        return json.dumps(dict(params), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"parameters of {cls.__name__} are no JSON: {error}.") from error


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
