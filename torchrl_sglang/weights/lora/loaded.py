"""Makes room on the servers for a new version of an adapter, and clears old ones."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import wait
from functools import partial
from typing import Any

from ...errors import PushError, WeightsError
from ...servers.control import ControlClient
from ...servers.lora import LIST_VALID_S, registered, unload
from ...servers.lora_versions import AdapterVersions, versioned, versions_of
from ..targets import Targets

# How long a version stays at least after it was replaced: another process may have seen it in the
# servers' lists just before, and sends requests that name it.
KEPT_S = 2 * LIST_VALID_S


class LoadedVersions:
    """The versions of one adapter on the servers.

    The version in use and the one before it stay. Older ones are unloaded once no request of this
    process is under way with them: SGLang unloads nothing before its requests are done, and loads
    nothing in the meantime.

    Args:
        name: what requests call the adapter.
        versions: what this process knows of adapters that are pushed.
    """

    def __init__(self, name: str, versions: AdapterVersions) -> None:
        self._name = name
        self._versions = versions
        self._in_use: int | None = None  # the version to replace
        self._loaded: tuple[int, ...] = ()
        self._replaced_at: dict[int, float] = {}

    def make_room(self, targets: Targets, version: int) -> None:
        """Makes the servers fit to load ``version``.

        What a failed push has left is unloaded; and what is old, where servers are full.

        Raises:
            WeightsError: an adapter is loaded under the name itself.
            PushError: a server does not answer, or is full of other adapters.
        """
        names: list[frozenset[str]] = targets.collect("room", registered)
        if any(self._name in each for each in names):
            raise WeightsError(
                f"an adapter is loaded as {self._name!r}, so requests that name it would not get "
                "the one that is pushed: unload it, or choose another adapter_name in "
                "WeightSyncConfig."
            )
        found = versions_of(self._name, frozenset().union(*names))
        pushed = self._versions.pushed(self._name)
        failed = [v for v in found if v == version or (pushed is not None and v > pushed)]
        self._loaded = tuple(v for v in found if v not in failed and v < version)
        self._in_use = pushed if pushed is not None else max(self._loaded, default=None)
        self._unload(targets, failed)
        gone = self._names(failed)
        if self._full(targets, names, gone) is not None:
            old = [v for v in self._loaded if v != self._in_use]
            youngest = max((self._replaced_at.get(v, 0.0) for v in old), default=0.0)
            time.sleep(max(0.0, youngest + KEPT_S - time.monotonic()))
            self._unload(targets, old)
            gone |= self._names(old)
            self._loaded = tuple(v for v in self._loaded if v not in old)
        self._check_full(targets, names, gone)

    def _full(
        self, targets: Targets, names: list[frozenset[str]], gone: frozenset[str]
    ) -> int | None:
        """Index of a server that holds as many adapters as it may."""
        for index, (info, each) in enumerate(zip(targets.infos, names, strict=True)):
            limit = info.features.max_adapters
            if limit is not None and len(each - gone) >= limit:
                return index
        return None

    def _check_full(
        self, targets: Targets, names: list[frozenset[str]], gone: frozenset[str]
    ) -> None:
        full = self._full(targets, names, gone)
        if full is not None:
            info, left = targets.infos[full], sorted(names[full] - gone)
            raise PushError(
                f"the server runs with max_loaded_loras={info.features.max_adapters} and has "
                f"{', '.join(map(repr, left))}: it would unload one of them. Unload what is not "
                "needed, or start the servers with a higher limit.",
                step="room",
                engine=info.url,
            )

    def take_back(self, targets: Targets, version: int) -> str:
        """Unloads a version that did not get into use; says what is left. Bounded, never raises."""
        name = versioned(self._name, version)
        asked = targets.ask(partial(unload, name, targets.timeout_s))
        done, _ = wait(asked, targets.timeout_s)
        left = [url for one, url in asked.items() if one not in done or one.exception() is not None]
        if left:
            return f"{', '.join(map(str, left))} may have {name!r} now: the next push unloads it"
        return f"no server has {name!r}; the version before is in use"

    def switch(self, version: int) -> None:
        """Takes ``version`` into use, for every request from now on."""
        self._versions.switch(self._name, version)
        if self._in_use is not None:
            self._replaced_at[self._in_use] = time.monotonic()

    def clear(self, targets: Targets, version: int) -> None:
        """Has the servers unload what is old, without waiting; what fails is left to the next push.

        Args:
            targets: the servers.
            version: the version in use now.
        """
        now = time.monotonic()
        old = [
            versioned(self._name, v)
            for v in self._loaded
            if v not in (version, self._in_use)
            and now - self._replaced_at.get(v, -KEPT_S) >= KEPT_S
            and not self._versions.in_use(versioned(self._name, v))
        ]
        kept = {*self._loaded, version}
        self._replaced_at = {v: at for v, at in self._replaced_at.items() if v in kept}
        if old:
            targets.ask(partial(_unload_each, old, targets.timeout_s))

    def _unload(self, targets: Targets, versions: Iterable[int]) -> None:
        for name in sorted(self._names(versions)):
            targets.do("room", partial(unload, name, targets.timeout_s))

    def _names(self, versions: Iterable[int]) -> frozenset[str]:
        return frozenset(versioned(self._name, version) for version in versions)


def _unload_each(names: Iterable[str], timeout_s: float, server: ControlClient) -> Any:
    for name in names:
        unload(name, timeout_s, server)
