"""Spawns, watches and ends one child process. The only module that uses ``subprocess``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import LaunchError, ProcessDiedError, StartTimeoutError
from .guard import kill_session, session_members
from .options import KnownOptions

GUARD = Path(__file__).with_name("guard.py")
LIST_OPTIONS = Path(__file__).with_name("list_options.py")
SECRET_OPTIONS = ("--api-key", "--admin-api-key")
POLL_S = 0.1
KILLED_S = 30.0  # how long a killed process may take to give its memory back
GUARD_S = 5.0
TAIL_BYTES = 64 * 1024
CAUSE_BYTES = 1024 * 1024  # the end of a log in which its cause of death is looked for
CAUSE_CHARS = 1000


class ChildProcess:
    """A command in a session of its own, which ends when this process ends, however that is.

    Args:
        name: what messages call it.
        argv: the command.
        env: its whole environment.
        log_path: file that gets its output.
        grace_s: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        grace_s: float,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log_path = log_path
        self._grace_s = grace_s
        self._owner_pid = os.getpid()
        guard = [sys.executable, "-I", "-S", str(GUARD), str(self._owner_pid), str(grace_s)]
        with log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [*guard, *self.argv],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the guard, which leads the child's session."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """The command's exit code (negative: a signal's number), or None while it runs."""
        return self._popen.poll()

    def log_tail(self, num_lines: int = 40) -> str:
        """The last lines that it logged."""
        return "\n".join(self._log_end(TAIL_BYTES).splitlines()[-num_lines:])

    def cause(self) -> str:
        """Why it ended, as far as it said so; empty if it did not."""
        return cause_in(self._log_end(CAUSE_BYTES))

    def _log_end(self, num_bytes: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - num_bytes))
            return log.read().decode(errors="replace")

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Polls until ready.

        Raises:
            ProcessDiedError: it ended first.
            StartTimeoutError: it was not ready within ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            code = self.exit_code
            if code is not None:
                raise ProcessDiedError(
                    self.name, redacted(self.argv), code, self.log_tail(), self.cause()
                )
            if time.monotonic() > deadline:
                raise StartTimeoutError(
                    f"{self.name} was not ready within {timeout_s:.0f} s (Timeouts.start_s). "
                    f"Its log, {self.log_path}, ends:\n{self.log_tail()}"
                )
            time.sleep(POLL_S)

    def ask_stop(self) -> None:
        """Sends SIGTERM and returns at once."""
        if self._mine() and self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends it and everything that it started; harmless twice, and in a forked copy."""
        if not self._mine():
            return
        self.ask_stop()
        try:
            self._popen.wait(self._grace_s + 10.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(5.0)
        if self._popen.returncode == -signal.SIGKILL:
            kill_session(self.pid)  # a guard that was killed could not see to it

    def kill(self) -> None:
        """Ends it and everything that it started at once: what is stuck heeds no SIGTERM.

        Raises:
            LaunchError: it does not end; the kernel waits for a device, say.
        """
        if not self._mine():
            return
        if self._popen.poll() in (None, -signal.SIGKILL):  # else the guard has seen to it
            kill_session(self.pid, KILLED_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(GUARD_S)
        if left := session_members(self.pid):
            raise LaunchError(
                f"{self.name} can't be killed: processes {left} are still there {KILLED_S:.0f} s "
                "after SIGKILL."
            )

    def _mine(self) -> bool:
        return os.getpid() == self._owner_pid

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


# A traceback up to its last line (``package.Kind: message``, not indented), which is wanted, and
# the last line of argparse's usage.
_TRACEBACK = re.compile(
    r"^.*Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(?P<said>[A-Za-z_][^\n]*)", re.M
)
_CHAINED = re.compile(
    r"\n+(?:During handling of the above exception, another|"
    r"The above exception was the direct cause).*\n+"
)
_USAGE = re.compile(r"^[\w./ -]+: error: (?P<said>.*)", re.M)


def cause_in(log: str) -> str:
    """The exception, or the usage error, that a child's log names first; empty if there is none.

    The first one is why a process ended. What follows is what others say of its end.
    """
    if usage := _USAGE.search(log):
        return usage["said"]
    said, found = "", _TRACEBACK.search(log)
    while found:
        said = found["said"][:CAUSE_CHARS]
        chained = _CHAINED.match(log, found.end())
        found = _TRACEBACK.match(log, chained.end()) if chained else None
    return said


def redacted(argv: Sequence[str]) -> list[str]:
    """The command line with the keys replaced by ``***``."""
    return [
        "***" if before in SECRET_OPTIONS else _without_secret(word)
        for before, word in zip(["", *argv], argv, strict=False)
    ]


def _without_secret(word: str) -> str:
    option, equals, _ = word.partition("=")
    return f"{option}=***" if equals and option in SECRET_OPTIONS else word


def installed_version(python: str, distribution: str) -> str | None:
    """Version of a distribution in ``python``'s environment; None if it is not installed there."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    try:
        probe = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60.0, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return probe.stdout.strip() if probe.returncode == 0 else None


def known_options(python: str) -> dict[str, KnownOptions]:
    """The options of SGLang and of its router, by package, in ``python``'s environment.

    Nothing is known of what can't be found out: it lets everything pass.
    """
    command = [python, "-c", LIST_OPTIONS.read_text()]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=True)
        found = json.loads(probe.stdout)
        return {
            package: KnownOptions(
                names=frozenset(said["options"]), negatable=frozenset(said["negatable"])
            )
            for package, said in found.items()
        }
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, AttributeError):
        return {}
