"""Names the versions of pushed adapters: one name in requests, ``name@version`` on the servers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence

from ..errors import InputError

SEPARATOR = "@"


def versioned(name: str, version: int) -> str:
    """What the servers call a version of an adapter."""
    return f"{name}{SEPARATOR}{version}"


def versions_of(name: str, loaded: Collection[str]) -> tuple[int, ...]:
    """The versions of an adapter among the names of what is loaded, sorted."""
    ends = [each.rpartition(SEPARATOR)[2] for each in loaded]
    numbers = {int(end): end for end in ends if end.isdecimal()}
    return tuple(n for n in sorted(numbers) if versioned(name, n) in loaded)


class InUse:
    """What a batch under way has, and what keeps its adapters loaded for as long as it lives."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)


class AdapterVersions:
    """Which version of an adapter a request runs under. Safe to use from several threads.

    The process that pushes knows. Any other learns what is loaded from the servers' lists, and
    takes the highest version that is not above the servers' weight version: that is set last, so a
    version above it is still being pushed, or was given up.
    """

    def __init__(self) -> None:
        self._pushed: dict[str, int] = {}
        self._listed: dict[str, tuple[int, ...]] = {}
        self._uses: weakref.WeakSet[InUse] = weakref.WeakSet()
        self._lock = threading.Lock()

    def switch(self, name: str, version: int) -> None:
        """From now on requests of this process run under ``version``, which every server has."""
        with self._lock:
            self._pushed[name] = version

    def pushed(self, name: str) -> int | None:
        """The version that this process pushed last."""
        with self._lock:
            return self._pushed.get(name)

    def listed(self, name: str, versions: Sequence[int]) -> None:
        """Takes note of what all servers have; nothing, where ``name`` itself is loaded."""
        with self._lock:
            self._listed[name] = tuple(versions)

    def unloaded(self, loaded_name: str) -> None:
        """Takes note that a server may not have it any more."""
        with self._lock:
            for name, version in list(self._pushed.items()):
                if versioned(name, version) == loaded_name:
                    del self._pushed[name]

    def resolve(
        self, names: Collection[str], weight_version: Callable[[], str]
    ) -> tuple[dict[str, int], InUse]:
        """The version that each adapter is used in, and what keeps these loaded.

        Args:
            names: adapters that were checked.
            weight_version: asks what the servers run, if that matters.

        Returns:
            Versions by name, without the names that the servers know as they are.

        Raises:
            InputError: an adapter of which the first version is still being pushed.
        """
        unsure = any(self._listed.get(name) and name not in self._pushed for name in names)
        served = weight_version() if unsure else ""
        with self._lock:
            found = {name: self._version(name, served) for name in names}
            versions = {name: version for name, version in found.items() if version is not None}
            use = InUse(versioned(name, version) for name, version in versions.items())
            self._uses.add(use)
        return versions, use

    def _version(self, name: str, weight_version: str) -> int | None:
        """None for a name that the servers know as it is."""
        if name in self._pushed:
            return self._pushed[name]
        listed = self._listed.get(name, ())
        whole = [v for v in listed if not weight_version.isdecimal() or v <= int(weight_version)]
        if listed and not whole:
            raise InputError(
                f"adapter {name!r} is being pushed for the first time, as version {listed[0]}, and "
                f"the servers are at version {weight_version} still: wait for the push to end."
            )
        return max(whole, default=None)

    def in_use(self, loaded_name: str) -> bool:
        """Whether requests of this process are under way with it."""
        return any(loaded_name in use.names for use in list(self._uses))
