"""What a logit processor runs inside SGLang's sampler. Nothing in the library imports this module.

Its source text goes with every request that has a processor (see `processors`), so it needs only
torch and the standard library where the server runs, and no ``torchrl_sglang``. SGLang ends the
whole server when a processor raises: everything that can go wrong here aborts the request that it
went wrong for, with a message, and the client gets that as a 400.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import pickle
import sys
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger("torchrl_sglang.processors")

# A logit of -inf that came in (a penalty for EOS, a grammar) is raised to this before a mask is
# applied, so that a row always has something to sample: what the mask allows. Above the -1e30 that
# SGLang puts for -inf where SGLANG_SANITIZE_NAN_LOGITS is set.
FLOOR = -1e25

# Masks in use, by what they were made from: equal masks of many requests are one tensor, which
# goes with the last of these requests.
_MASKS: weakref.WeakValueDictionary[tuple[Any, ...], torch.Tensor] = weakref.WeakValueDictionary()


class TokenMask:
    """Leaves only some ids to sample. Params: ``mask`` (packed), ``beyond`` (ids after it)."""

    floors = True

    def open(self, params: dict[str, Any], req: Any, logits: torch.Tensor) -> torch.Tensor:
        """What is added to a row: 0 or -inf, float16 of shape ``(vocab,)``, on its device."""
        vocab_size = logits.shape[-1]
        key = (params["mask"], params["beyond"], vocab_size, logits.device)
        mask = _MASKS.get(key)
        if mask is None:
            built = self._build(params, vocab_size)
            _MASKS[key] = mask = built.to(logits.device, non_blocking=True)
        return mask

    @staticmethod
    def _build(params: dict[str, Any], vocab_size: int) -> torch.Tensor:
        given = zlib.decompress(base64.b64decode(params["mask"]))[:vocab_size]
        allowed = bytearray(given.ljust(vocab_size, bytes((params["beyond"],))))
        if 1 not in allowed:
            raise ValueError(f"none of the allowed ids is in the model's vocabulary ({vocab_size})")
        banned = torch.frombuffer(allowed, dtype=torch.uint8) == 0
        return torch.zeros(vocab_size, dtype=torch.float16, device="cpu").masked_fill_(
            banned, -math.inf
        )

    def __call__(self, logits: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
        """Bans in place; one result of `open` per row."""
        first = rows[0]
        return logits.add_(first if all(row is first for row in rows) else torch.stack(rows))


class ProgressTemperature:
    """Moves the temperature. Params: ``start``, ``end``, ``over_tokens``."""

    floors = False

    def open(self, params: dict[str, Any], req: Any, logits: torch.Tensor) -> tuple[Any, ...]:
        """What a step needs of one request."""
        own = req.sampling_params.temperature  # by which the sampler divides after us
        return params["start"] / own, params["end"] / own, params["over_tokens"], req

    def __call__(self, logits: torch.Tensor, rows: list[tuple[Any, ...]]) -> torch.Tensor:
        """Scales in place; one result of `open` per row."""
        scales = torch.tensor([self._scale(*row) for row in rows], dtype=logits.dtype, device="cpu")
        return logits.div_(scales.to(logits.device, non_blocking=True)[:, None])

    @staticmethod
    def _scale(start: float, end: float, over_tokens: int, req: Any) -> float:
        progress = min(num_generated(req) / over_tokens, 1.0)
        return start + (end - start) * progress


def num_generated(req: Any) -> int:
    """Tokens of a request that were sampled before the one that is sampled now.

    Counted from the KV cache: in SGLang's overlapped schedule (its default) ``output_ids`` is a
    token behind, as it is read before the last step's result. With speculative decoding this is
    the count at the start of the step.
    """
    # The request's own number, or that of its ``kv`` from 0.5.2x on; 0.5.17 has both objects.
    committed: int | None = None
    for holder in (getattr(req, "kv", None), req):
        committed = getattr(holder, "kv_committed_len", committed)
    if committed is None:
        return len(req.output_ids)
    return max(committed - len(req.origin_input_ids), 0)


class UserClass:
    """Calls an object of a user's class, which came by value."""

    floors = False

    def __init__(self, cls: type) -> None:
        self.processor = cls()

    def open(self, params: dict[str, Any], req: Any, logits: torch.Tensor) -> dict[str, Any]:
        """What the user's class gets for this request, the same object at every step."""
        return {**params, "__req__": req}

    def __call__(self, logits: torch.Tensor, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Calls the user's object, and checks what it returns."""
        shape = logits.shape
        result = self.processor(logits, rows)
        if not isinstance(result, torch.Tensor) or result.shape != shape:
            got = tuple(getattr(result, "shape", ())) or type(result).__name__
            raise TypeError(f"it has to return logits of shape {tuple(shape)}, and returned {got}")
        bad = ~torch.isfinite(result.amax(-1))
        if bad.any():  # waits for the device, once per step
            for row in bad.nonzero().flatten().tolist():
                abort(rows[row], "it left no finite logit, or NaN or +inf, in the request's row")
            result = result.masked_fill(bad[:, None], 0.0)
        return result


def load_user_class(payload: bytes, python: tuple[int, int]) -> Callable[[], Any]:
    """A maker of `UserClass`; one that raises when called if the class can't be loaded here."""
    try:
        if python != sys.version_info[:2]:
            ours = ".".join(map(str, sys.version_info[:2]))
            theirs = ".".join(map(str, python))
            raise RuntimeError(
                f"it was sent from Python {theirs} and the server runs {ours}: a class travels as "
                "bytecode, so both need the same version"
            )
        cls = pickle.loads(payload)
    except Exception as error:  # it may run anything of the user's
        message = f"{type(error).__name__}: {error}"
        logger.exception("a logit processor can't be loaded")

        def fail() -> Any:
            raise RuntimeError(f"the class can't be loaded on the server: {message}")

        return fail
    return lambda: UserClass(cls)


BUILTIN: dict[str, Callable[[], Any]] = {"tokens": TokenMask, "temperature": ProgressTemperature}


class Pipeline:
    """One or more stages in order; what SGLang calls at every step."""

    def __init__(self, makers: Sequence[Callable[[], Any]]) -> None:
        self._makers = makers
        self._stages: list[Any] | None = None  # made at the first call, where failing is safe

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]]
    ) -> torch.Tensor:
        """Changes the logits, shape ``(rows, vocab)``; one dictionary of parameters per row."""
        if any(params is None for params in custom_param_list):
            # Nothing says which request it is, so none can be ended; better no server than tokens
            # of another distribution than was asked for.
            raise RuntimeError(
                "a request with a logit processor came without custom_params. SGLang's router "
                "drops them: send the request to the server itself"
            )
        try:
            return self._run(logits, custom_param_list)
        except Exception as error:  # the server's life hangs on it
            logger.exception("a logit processor failed")
            for params in custom_param_list:
                abort(params, f"{type(error).__name__}: {error}")
            return torch.zeros_like(logits)

    def _run(self, logits: torch.Tensor, requests: list[dict[str, Any]]) -> torch.Tensor:
        if self._stages is None:
            self._stages = [make() for make in self._makers]
        opened = [self._open(params, logits) for params in requests]
        good = [index for index, row in enumerate(opened) if row is not None]
        if len(good) == len(opened):
            return self._apply(logits, opened)
        if good:
            logits[good] = self._apply(logits[good], [opened[index] for index in good])
        return logits

    def _open(self, params: dict[str, Any], logits: torch.Tensor) -> list[Any] | None:
        """What each stage needs of a request, read once and kept with it; None if it can't be."""
        if "__opened__" not in params:
            params["__opened__"] = None
            try:
                params["__opened__"] = [
                    stage.open(json.loads(text), params["__req__"], logits)
                    for stage, text in zip(self._stages or (), params["stages"], strict=True)
                ]
            except (ArithmeticError, LookupError, TypeError, ValueError, zlib.error) as error:
                abort(params, f"{type(error).__name__}: {error}")
        opened: list[Any] | None = params["__opened__"]
        return opened

    def _apply(self, logits: torch.Tensor, opened: list[Any]) -> torch.Tensor:
        stages = self._stages or ()
        if any(stage.floors for stage in stages):
            logits.clamp_(min=FLOOR)
        for index, stage in enumerate(stages):
            logits = stage(logits, [row[index] for row in opened])
        return logits


def abort(params: dict[str, Any], message: str) -> None:
    """Ends a request at the end of this step; the client gets the message as a 400."""
    req = params["__req__"]
    reason = sys.modules["sglang.srt.managers.schedule_batch"].FINISH_ABORT
    req.to_finish = reason(
        f"the request's logit processor failed: {message}.", 400, "BadRequestError"
    )


def processor(kinds: Sequence[Any]) -> Callable[[], Pipeline]:
    """What SGLang calls for a new processor. A kind is a name or ``(payload, python version)``."""
    makers = [BUILTIN[kind] if isinstance(kind, str) else load_user_class(*kind) for kind in kinds]
    return lambda: Pipeline(makers)
