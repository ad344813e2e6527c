"""Keeps what is known of the weights that servers run: told by them, or pushed from here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .control import ControlClient
from .info import INITIAL_VERSION
from .together import Answers, ask_all

VERSION_S = 2.0  # one server's answer


def ask_versions(servers: Sequence[ControlClient]) -> Answers[str]:
    """Asks servers for the version of their weights; takes two times `VERSION_S` at most."""
    return ask_all(servers, lambda server: version_of(server, VERSION_S), within_s=2 * VERSION_S)


def version_of(server: ControlClient, timeout_s: float | None = None) -> str:
    """What one server says that it runs."""
    return str(server.model_info(timeout_s).get("weight_version", INITIAL_VERSION))


class KnownVersions:
    """What this process knows of the weights that the servers run.

    Attributes:
        pushed: the version that this process pushed last; None before it pushed.
        others_push: whether the servers were seen with a higher version since.
        seen: the highest version that a server was seen with, or was given.
        adapters_only: whether what this process pushed were adapters alone.
        labels: names that pushes of this process gave their numbers.
    """

    def __init__(self) -> None:
        self.pushed: int | None = None
        self.others_push = False
        self.seen = 0
        self.adapters_only = False
        self.labels: dict[int, str] = {}

    @property
    def known(self) -> int:
        """The version that was pushed last, or the highest that was seen; 0 if there is none."""
        return self.seen if self.pushed is None or self.others_push else self.pushed

    def saw(self, versions: Iterable[str]) -> None:
        """Takes note of versions that servers run; names count for nothing."""
        numbers = (int(each) for each in versions if each.isdecimal())
        self.seen = max([self.seen, *numbers])

    def noticed(self, version: str) -> None:
        """Takes note of a version that was not expected: somebody else may have pushed."""
        self.saw([version])
        if self.pushed is not None and version.isdecimal() and int(version) > self.pushed:
            self.others_push = True  # or a push of ours is about to end, and sets it back

    def set_pushed(self, version: int, *, adapter: bool = False) -> None:
        """Every server runs ``version`` now, or has its adapter."""
        self.adapters_only = adapter and (self.pushed is None or self.adapters_only)
        self.pushed = version
        self.others_push = False
        self.saw([str(version)])

    def set_label(self, version: int, label: str | None) -> None:
        """Names the version that is about to be pushed; None: it has no name."""
        self.labels.pop(version, None)
        if label is not None:
            self.labels[version] = label
