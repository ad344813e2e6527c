"""Chooses the number of a push: higher than every number that a server or a collector has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, VersionError


def counted(collector: Any) -> int | None:
    """The version that a collector is at; None if it doesn't count in numbers."""
    current = getattr(collector, "policy_version", None)
    return current if isinstance(current, int) and not isinstance(current, bool) else None


def choose_version(wanted: int | None, served: int, collectors: Iterable[Any]) -> int:
    """The number of the next push.

    Args:
        wanted: the number that was asked for; one more than all others by default.
        served: what the servers run.
        collectors: all that count.

    Raises:
        ConfigError: ``wanted`` is no integer.
        VersionError: ``wanted`` is not higher than every other.
    """
    counts = [count for collector in collectors if (count := counted(collector)) is not None]
    highest = max([served, *counts])
    if wanted is None:
        return highest + 1
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        raise ConfigError(f"a version is an integer, got {wanted!r}.")
    if wanted <= highest:
        whose = "the servers already run" if highest == served else "a collector already counts"
        raise VersionError(
            f"version {wanted} can't be pushed: {whose} version {highest}, and versions only go "
            f"up. Push {highest + 1} or more, or leave version= out. Nothing was touched."
        )
    return wanted


def check_label(label: Any) -> None:
    """Raises `ConfigError` for a label that is no name."""
    if label is not None and not (isinstance(label, str) and label):
        raise ConfigError(f"label is a name such as 'step_1000', got {label!r}.")


def bring_up(collector: Any, version: int) -> None:
    """Sets a collector that lags behind to ``version``; never sets one back.

    Args:
        collector: any with TorchRL's ``policy_version``. One in another process (Ray) can't be set
            and is counted up.
        version: where it should be.
    """
    current = counted(collector)
    if current is None or current >= version:
        return
    tracker = tracker_of(collector)
    if isinstance(getattr(tracker, "version", None), int):
        tracker.version = version
        return
    for _ in range(version - current):
        collector.increment_version()


def count_to(collector: Any, version: int) -> None:
    """Counts a collector up by one push, which takes it to ``version`` if it counts in numbers."""
    if counted(collector) == version:
        return  # it shares its counter with another
    bring_up(collector, version - 1)
    collector.increment_version()


def tracker_of(collector: Any) -> Any:
    """What counts a collector's versions: TorchRL's ``PolicyVersion``, if it is in this process."""
    return getattr(collector, "policy_version_tracker", None)


def shares_counter(one: Any, other: Any) -> bool:
    """Whether counting one collector up counts the other up."""
    return one is other or (tracker_of(one) is not None and tracker_of(one) is tracker_of(other))
