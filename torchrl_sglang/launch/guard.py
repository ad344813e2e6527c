"""Stands between the library and one child, so that the child never outlives the library.

Run as a script: ``python guard.py PARENT_PID GRACE_S COMMAND...``. The guard leads a session of
its own, starts the command in it and waits for the first of: the command ends, SIGTERM, or the
parent is gone (by whatever means, SIGKILL included). Then it ends every process of the session and
every orphan below it, and leaves with the command's exit code or signal.

Watching the parent *process* does what a parent-death signal can't: that signal fires when the
*thread* that spawned the child ends, so a child started from a worker thread would die too early.
Needs only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.25  # how late the parent's end may be seen where the kernel has no pidfd


def prctl(option: int, value: int) -> None:
    """Linux's ``prctl`` with one argument."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def session_members(session: int) -> list[int]:
    """Processes of a session and, for its leader, its children; this process aside."""
    me, found = os.getpid(), []
    mine = me == session
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == me:
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat:
                state, ppid, _, sid = stat.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state != "Z" and (int(sid) == session or (mine and int(ppid) == me)):
            found.append(int(entry))
    return found


def reap() -> None:
    """Collects orphans that ended; the command itself is left to ``Popen``."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def kill_session(session: int, patience_s: float = 5.0) -> None:
    """SIGKILLs until nothing of the session is left."""
    deadline = time.monotonic() + patience_s
    while (members := session_members(session)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        if session == os.getpid():
            reap()


class Wakeup:
    """Turns SIGTERM, SIGINT and SIGCHLD into something that ``select`` sees."""

    def __init__(self) -> None:
        self.stop_asked = False
        self.reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _ask_stop(self, *_: object) -> None:
        self.stop_asked = True

    def drain(self) -> None:
        """Empties the pipe, so that the next signal is seen."""
        try:
            while os.read(self.reader, 512):
                pass
        except BlockingIOError:
            pass


def open_parent(parent: int) -> list[int]:
    """A file descriptor that becomes readable when the parent ends, where the kernel has one."""
    try:
        return [os.pidfd_open(parent)]
    except (OSError, AttributeError):
        return []


def wait_for_end(child: subprocess.Popen[bytes], parent: int, wakeup: Wakeup) -> None:
    """Returns when the child ended, SIGTERM came or the parent is gone."""
    watched = [wakeup.reader, *open_parent(parent)]
    while child.poll() is None and not wakeup.stop_asked and os.getppid() == parent:
        select.select(watched, [], [], POLL_S if len(watched) == 1 else 30.0)
        wakeup.drain()


def stop(child: subprocess.Popen[bytes], grace_s: float, wakeup: Wakeup) -> None:
    """SIGTERM, a grace period, then SIGKILL."""
    child.terminate()
    deadline = time.monotonic() + grace_s
    while child.poll() is None and (left := deadline - time.monotonic()) > 0:
        select.select([wakeup.reader], [], [], left)
        wakeup.drain()
    if child.poll() is None:
        child.kill()
        child.wait()


def leave_as(returncode: int) -> None:
    """Ends this process the way the command ended."""
    if returncode < 0:
        signal.signal(-returncode, signal.SIG_DFL) if -returncode != signal.SIGKILL else None
        os.kill(os.getpid(), -returncode)
    os._exit(returncode)


def main(argv: list[str]) -> None:
    """Runs the command until it ends, SIGTERM comes or the parent is gone."""
    parent, grace_s, command = int(argv[1]), float(argv[2]), argv[3:]
    wakeup = Wakeup()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        os._exit(1)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    wait_for_end(child, parent, wakeup)
    if child.poll() is None:
        stop(child, grace_s, wakeup)
    kill_session(os.getsid(0))
    leave_as(child.returncode)


if __name__ == "__main__":
    main(sys.argv)
