"""One child process: spawned, watched, ended. The only module that uses ``subprocess``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import LaunchError, ProcessDiedError, StartTimeoutError
from .guard import kill_session, session_members

GUARD = Path(__file__).with_name("guard.py")
SECRET_OPTIONS = ("--api-key", "--admin-api-key")
POLL_S = 0.1
KILLED_S = 30.0  # how long a killed process may take to give its memory back
GUARD_S = 5.0


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
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 64 * 1024))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

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
                raise ProcessDiedError(self.name, redacted(self.argv), code, self.log_tail())
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
