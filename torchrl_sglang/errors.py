"""The errors of the library.

Every error derives from `SGLangError`, and from the builtin that fits, so that code that knows only
``ValueError``, ``TimeoutError`` or ``ConnectionError`` handles it too::

    SGLangError
    ├── ConfigError (ValueError)              a wrong argument, found at construction
    │   └── UnsupportedOptionError            unknown, or the engine can't serve it
    ├── InputError (ValueError)               data that can't be generated from
    │   ├── EmptyBatchError
    │   ├── EmptyPromptError
    │   ├── InputTypeError (TypeError)        a history that is none, text that is none
    │   └── PromptTooLongError
    ├── TokenizerError (ValueError)           no tokenizer, or one that can't do what is asked
    ├── LaunchError (RuntimeError)            a managed start failed
    │   ├── EngineNotFoundError (ImportError) SGLang or the router is not installed there
    │   ├── PortTakenError (OSError)          a port that was asked for is in use
    │   ├── ProcessDiedError                  a child ended while starting: argv, exit code, log
    │   └── StartTimeoutError (TimeoutError)  a child was not ready in time
    ├── ServiceError
    │   ├── ConnectError (ConnectionError)    nothing, or nothing we know, answers at a URL
    │   │   └── NoWorkersError                a router without a worker
    │   ├── ServiceClosedError (RuntimeError) used after shutdown
    │   ├── ServiceBrokenError (RuntimeError) a weight update failed; a full push repairs it
    │   ├── RequestRefusedError (ValueError)  the server answered 4xx
    │   ├── ServerFailedError (ConnectionError) the server answered 5xx, or the connection broke
    │   ├── RequestTimeoutError (TimeoutError)  no answer in time
    │   ├── ResponseError (ValueError)        an answer that must not be trained on
    │   └── RequestAbortedError (RuntimeError)  the engine aborted the request
    └── WeightSyncError
        ├── WeightsError (ValueError)         wrong names, shapes or dtypes, found before any pause
        ├── VersionError (ValueError)         a version that is not higher than the servers'
        ├── NotConnectedError (RuntimeError)  a push without servers
        ├── AlreadyConnectedError (RuntimeError) another weight sync pushes to this service
        ├── TopologyError (ValueError)        DP or PP, which a broadcast can't reach
        ├── PushError (RuntimeError)          a step failed on an engine; names engine, step, bucket
        │   ├── PushTimeoutError (TimeoutError)
        │   └── EngineLostError (ConnectionError)  the engine's process is gone
        └── VerificationError (RuntimeError)  the servers don't hold what was sent
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Self


class SGLangError(Exception):
    """Base of every error that this library raises."""


class ConfigError(SGLangError, ValueError):
    """An argument is wrong; the message says which, and what would work."""


class UnsupportedOptionError(ConfigError):
    """An option is unknown, or cannot be served."""


class InputError(SGLangError, ValueError):
    """The data handed in can't be generated from."""


class EmptyBatchError(InputError):
    """A batch without a single prompt."""


class EmptyPromptError(InputError):
    """A prompt without a single token."""


class InputTypeError(InputError, TypeError):
    """A key of the TensorDict holds something of another type than the input mode reads."""


class PromptTooLongError(InputError):
    """A prompt that leaves no room for a token in the model's context."""


class TokenizerError(SGLangError, ValueError):
    """No tokenizer was found, or it can't do what is asked of it."""


class LaunchError(SGLangError, RuntimeError):
    """A managed server or router could not be started."""


class EngineNotFoundError(LaunchError, ImportError):
    """SGLang (or the router) is not installed for the interpreter that was to run it."""


class PortTakenError(LaunchError, OSError):
    """The port that was asked for is in use."""


class ProcessDiedError(LaunchError):
    """A child process ended before it was ready.

    Attributes:
        argv: its command line, keys replaced by ``***``.
        exit_code: its exit code; negative is the number of the signal that ended it.
        log_tail: the last lines that it logged.
        cause: what it said of the reason; empty where it said nothing.
    """

    def __init__(
        self, name: str, argv: Sequence[str], exit_code: int, log_tail: str, cause: str = ""
    ) -> None:
        self.argv = tuple(argv)
        self.exit_code = exit_code
        self.log_tail = log_tail
        self.cause = cause
        super().__init__(
            f"{name} ended with exit code {exit_code} before it was ready"
            f"{f': {cause}' if cause else '.'}\n"
            f"command: {' '.join(argv)}\nlast log lines:\n{log_tail}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class StartTimeoutError(LaunchError, TimeoutError):
    """A child process lives but was not ready in time."""


class ServiceError(SGLangError):
    """The rollout service can't answer."""


class ConnectError(ServiceError, ConnectionError):
    """Nothing that this library can use answers at a URL."""


class NoWorkersError(ConnectError):
    """The router answers but has no worker behind it."""


class ServiceClosedError(ServiceError, RuntimeError):
    """The service was shut down."""


class ServiceBrokenError(ServiceError, RuntimeError):
    """A weight update failed half-way; nothing generates until a full push succeeds."""


class HTTPAnswerError(ServiceError):
    """Base of the errors that carry a server's answer.

    Attributes:
        status: the HTTP status, or None where no answer came.
        body: what the server said.
    """

    def __init__(self, message: str, *, status: int | None = None, body: str = "") -> None:
        self.status = status
        self.body = body
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class RequestRefusedError(HTTPAnswerError, ValueError):
    """The server answered 4xx, but 408 or 429: the request is wrong, and again won't help."""


class ServerFailedError(HTTPAnswerError, ConnectionError):
    """The server answered 5xx, 408 or 429, or the connection broke before an answer came."""


class RequestTimeoutError(ServiceError, TimeoutError):
    """No answer came in time."""


class ResponseError(ServiceError, ValueError):
    """An answer is not what was asked for and must not be trained on."""


class RequestAbortedError(ServiceError, RuntimeError):
    """The engine aborted the request; what it had generated is incomplete."""


class WeightSyncError(SGLangError):
    """The trainer's weights did not reach the servers."""


class WeightsError(WeightSyncError, ValueError):
    """Weights with a wrong name, shape or dtype; found before anything was paused."""


class VersionError(WeightSyncError, ValueError):
    """A version that is not higher than the servers'; found before anything was paused."""


class NotConnectedError(WeightSyncError, RuntimeError):
    """A push without servers: none were named, the weight sync was closed, or another took over."""


class AlreadyConnectedError(WeightSyncError, RuntimeError):
    """Another weight sync of this process is in the middle of a push to the service."""


class TopologyError(WeightSyncError, ValueError):
    """The servers are laid out in a way that a broadcast can't reach."""


class PushError(WeightSyncError, RuntimeError):
    """A step of a push failed.

    Attributes:
        engine: URL of the engine that failed, or None if the failure is the trainer's own.
        step: the step, such as ``"pause"`` or ``"announce"``.
        bucket: index of the bucket in transfer, or None outside the transfer.
    """

    def __init__(
        self, message: str, *, step: str, engine: str | None = None, bucket: int | None = None
    ) -> None:
        self.engine = engine
        self.step = step
        self.bucket = bucket
        place = f"step {step!r}"
        if bucket is not None:
            place += f", bucket {bucket}"
        place += f", engine {engine}" if engine else ", trainer"
        super().__init__(f"weight push failed at {place}: {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class PushTimeoutError(PushError, TimeoutError):
    """A step of a push got no answer in time."""


class EngineLostError(PushError, ConnectionError):
    """An engine failed a push because it is gone: nothing answers at its address any more."""

    @classmethod
    def of(cls, error: PushError, engine: str | None = None) -> Self:
        """The same failure, of an engine that was found gone.

        Args:
            error: the failure.
            engine: the engine, if it is not the one that the failure was put down to.
        """
        said = f"the engine is gone: nothing answers there any more ({error.__cause__ or error})"
        made = cls(said, step=error.step, engine=engine or error.engine, bucket=error.bucket)
        made.__cause__ = error
        return made


class VerificationError(WeightSyncError, RuntimeError):
    """The servers do not hold the weights that were sent."""


def _rebuild(
    cls: type[SGLangError], args: tuple[object, ...], state: dict[str, object]
) -> SGLangError:
    """Unpickles an error whose ``__init__`` takes more than its message."""
    # Where a class has two builtin bases, only OSError's __new__ is safe for it.
    base = OSError if issubclass(cls, OSError) else Exception
    error: SGLangError = base.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


def count_of(number: int, thing: str) -> str:
    """A number of things, for messages: "1 name", "2 names"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# Packages between a user's line and what warns.
BETWEEN = ("torchrl_sglang", "torchrl", "tensordict", "torch", "threading", "concurrent", "asyncio")


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warns of a line that a user wrote, however deep in here it is found out."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _name(frame).partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
