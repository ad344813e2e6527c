"""Ships a processor's code into SGLang, which unpickles it and calls it without arguments."""

from __future__ import annotations

import base64
import functools
import inspect
import json
import pickle
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from ...errors import ConfigError

# What runs on the server: a name in ``processors_served.BUILTIN``, or a pickled class and the
# version of Python that it was pickled by.
Kind = str | tuple[bytes, tuple[int, int]]

# A class goes with every request.
MAX_CLASS_BYTES = 2**20

SERVED = Path(__file__).with_name("remote.py")


class _Evaluated:
    """Unpickles as the value of an expression, wherever that is, with builtins alone."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.expression,)


@functools.lru_cache(maxsize=16)
def serialized(kinds: tuple[Kind, ...]) -> str:
    """SGLang's ``custom_logit_processor`` for these kinds, in order.

    Equal kinds make equal text: SGLang runs all rows with one text in one call, and unpickles
    each text once.
    """
    sent = base64.b64encode(zlib.compress(pickle.dumps((SERVED.read_bytes(), kinds), 4), 9))
    expression = (
        "(lambda sent, module: (exec(sent[0], module), module['processor'](sent[1]))[1])("
        "__import__('pickle').loads(__import__('zlib').decompress("
        f"__import__('base64').b64decode({sent!r}))), {{'__name__': 'torchrl_sglang_processors'}})"
    )
    return json.dumps({"callable": pickle.dumps(_Evaluated(expression), protocol=4).hex()})


def _check_class(cls: Any) -> None:
    """Raises `ConfigError` unless ``cls()(logits, params)`` can work."""
    if not isinstance(cls, type):
        raise ConfigError(f"user_processor takes a class, got {cls!r:.100}.")
    call = next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
    if call is None or inspect.isabstract(cls):
        raise ConfigError(f"{cls.__name__} needs a method __call__(self, logits, params).")
    try:
        inspect.signature(cls).bind()
        inspect.signature(call).bind(None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"{cls.__name__} is made without arguments and called with (logits, params): {error}."
        ) from error
    except ValueError:
        return  # a class without a readable signature


_BY_VALUE = threading.Lock()


@contextmanager
def _by_value(cls: type) -> Iterator[None]:
    """Within, cloudpickle takes the class's own package by value; SGLang's is on the server."""
    package = sys.modules.get(cls.__module__.partition(".")[0])
    with _BY_VALUE:
        if (
            package is None
            or package.__name__ in ("__main__", "sglang", "builtins")
            or package.__name__ in cloudpickle.list_registry_pickle_by_value()
        ):
            yield
            return
        cloudpickle.register_pickle_by_value(package)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(package)


def class_kind(cls: type) -> Kind:
    """A user's class as it travels.

    Raises:
        ConfigError: SGLang couldn't call it, or it can't be pickled or is too large.
    """
    _check_class(cls)
    try:
        with _by_value(cls):
            payload: bytes = cloudpickle.dumps(cls)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{cls.__name__} can't be sent to the server ({type(error).__name__}: {error}). "
            "Does it refer to a lock, a file or a connection of its module?"
        ) from error
    if len(payload) > MAX_CLASS_BYTES:
        raise ConfigError(
            f"{cls.__name__} takes {len(payload) / 2**20:.1f} MiB, and goes with every request: "
            "make large values on the server, in __init__."
        )
    return payload, sys.version_info[:2]
