"""Collects calls of many threads into requests that they share."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..config import is_count
from ..errors import ConfigError, ServiceError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """When what was collected is sent.

    Attributes:
        min_size: items that are sent at once; fewer wait for more.
        max_size: most items in one batch; None: all there are.
        timeout_s: how long an item waits for others.
    """

    min_size: int = 1
    max_size: int | None = None
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("min_size", "max_size"):
            value = getattr(self, name)
            if not is_count(value) and not (name == "max_size" and value is None):
                raise ConfigError(f"{name.replace('size', 'batch_size')} must be >= 1: {value!r}.")
        if self.max_size is not None and self.min_size > self.max_size:
            raise ConfigError(
                f"min_batch_size={self.min_size} is above max_batch_size={self.max_size}."
            )
        if isinstance(self.timeout_s, bool) or not self.timeout_s >= 0:
            raise ConfigError(f"batching_timeout must be seconds >= 0, got {self.timeout_s!r}.")

    @classmethod
    def chosen(
        cls, batching: bool | None, min_size: int | None, max_size: int | None, timeout_s: float
    ) -> BatchingConfig | None:
        """From the arguments that TorchRL's wrappers take; None: no batching.

        Raises:
            ConfigError: sizes without batching, or sizes that can't be.
        """
        sized = min_size is not None or max_size is not None
        if batching is False and sized:
            raise ConfigError("min_batch_size and max_batch_size belong to batching=True.")
        if not batching and not sized:
            return None
        min_size = 1 if min_size is None else min_size
        return cls(min_size=min_size, max_size=max_size, timeout_s=timeout_s)


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    size: int
    since: float
    result: Future[Result] = field(default_factory=Future)
    batch: list[_Waiting[Item, Result]] = field(default_factory=list)  # what its caller has to run


class Batcher(Generic[Item, Result]):
    """Collects items of many threads and runs them together. Safe to use from several threads.

    No thread of its own: the caller whose item makes the batch whole, or whose time is up first,
    runs the batch for all others in it, and returns when all are done. Several batches can be under
    way at once. A copy, by pickle too, starts with nobody waiting.

    Args:
        run: runs items; calls the function that it is given with each item's index and result or
            exception, from any thread, and returns when it has done so for all.
        config: when what was collected is sent.
    """

    def __init__(self, run: Run[Item, Result], config: BatchingConfig) -> None:
        self._run = run
        self._config = config
        self._queue: list[_Waiting[Item, Result]] = []
        self._num_calls = 0
        self._changed = threading.Condition()

    def call(self, item: Item, size: int) -> Result:
        """The item's result; raises what its run raised.

        Args:
            item: what to run.
            size: how many rows it counts for.

        Raises:
            ServiceError: `release` ended the wait.
        """
        mine: _Waiting[Item, Result] = _Waiting(item, size, time.monotonic())
        try:
            with self._changed:
                self._queue.append(mine)
                self._num_calls += 1
                self._wait_for_batch(mine)
            if mine.batch:
                self._run_batch(mine.batch)
            return mine.result.result()
        except BaseException as error:
            self._give_up(mine, error)
            raise
        finally:
            with self._changed:
                self._num_calls -= 1

    def counts(self) -> tuple[int, int]:
        """Items that wait for others, and items without a result yet, these included."""
        with self._changed:
            return len(self._queue), self._num_calls

    def release(self, *, run: bool) -> None:
        """Ends every wait for others: what waits is run now, or its callers get an error.

        Returns at once. What is being run goes on.
        """
        with self._changed:
            if run:
                for waiting in self._queue:
                    waiting.since = -math.inf
            else:
                for waiting in self._queue:
                    said = "the wait for other calls was ended by cleanup_batching(): call again."
                    _settle(waiting.result, ServiceError(said))
                self._queue = []
            self._changed.notify_all()

    def _wait_for_batch(self, mine: _Waiting[Item, Result]) -> None:
        """Returns once the caller has a batch to run, or another thread took its item."""
        while mine in self._queue:
            rows = sum(waiting.size for waiting in self._queue)
            left = mine.since + self._config.timeout_s - time.monotonic()
            if rows >= self._config.min_size or left <= 0:
                self._take(mine)
            else:
                self._changed.wait(left)

    def _take(self, mine: _Waiting[Item, Result]) -> None:
        """Items up to the largest batch, the caller's among them; one item is never divided."""
        most = self._config.max_size
        mine.batch, rows = [mine], mine.size
        for waiting in self._queue:
            if waiting is not mine and (most is None or rows + waiting.size <= most):
                mine.batch.append(waiting)
                rows += waiting.size
        self._queue = [waiting for waiting in self._queue if waiting not in mine.batch]
        self._changed.notify_all()  # they need not wait for their own time to be up

    def _run_batch(self, batch: list[_Waiting[Item, Result]]) -> None:
        def done(index: int, result: Result | BaseException) -> None:
            _settle(batch[index].result, result)

        self._run([waiting.item for waiting in batch], done)
        if not all(waiting.result.done() for waiting in batch):
            raise ServiceError("a shared batch ended without a result for each of its callers.")

    def _give_up(self, mine: _Waiting[Item, Result], error: BaseException) -> None:
        """The caller leaves, wherever it was: nobody runs its item, and nobody waits for it."""
        with self._changed:
            self._queue = [waiting for waiting in self._queue if waiting is not mine]
        for waiting in mine.batch:
            _settle(waiting.result, _for_others(error))

    def __getstate__(self) -> dict[str, Any]:
        return {"run": self._run, "config": self._config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


Done = Callable[[int, Result | BaseException], None]
Run = Callable[[list[Item], Done[Result]], None]


def _settle(future: Future[Result], result: Result | BaseException) -> None:
    """Whatever comes first holds: a result, or that its batch was given up."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


def _for_others(error: BaseException) -> BaseException:
    """Ctrl-C in one thread must not look like Ctrl-C in another."""
    if isinstance(error, Exception):
        return error
    return ServiceError(f"the thread that ran this batch was interrupted ({error!r}); call again.")
