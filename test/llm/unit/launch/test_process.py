"""A child's life: it starts, is watched, and never outlives the process that started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import torchrl_sglang
from helpers.processes import until
from torchrl_sglang import RouterConfig, ServerConfig, Timeouts
from torchrl_sglang.errors import LaunchError, ProcessDiedError, StartTimeoutError
from torchrl_sglang.launch.fleet import Fleet, FleetPlan
from torchrl_sglang.launch.guard import session_members
from torchrl_sglang.launch.process import GUARD, ChildProcess, cause_in, installed_version, redacted

PYTHON = [sys.executable, "-I", "-S", "-c"]

SLEEP = [*PYTHON, "import time; time.sleep(600)"]


# Prints the pid of a process that it starts, and lives on.
FAMILY = """
import os, subprocess, sys, time
args = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
print(os.getpid(), flush=True)
print(subprocess.Popen(args, start_new_session={new_session}).pid, flush=True)
{then}
"""


# Starts a command with the library as its parent would, prints the guard's pid, and ends as told.
# Loads launch/ without the package's __init__, which takes seconds.
PARENT = """
import os, pathlib, signal, sys, threading, time, types
package = types.ModuleType("torchrl_sglang")
package.__path__ = [sys.argv[1]]
sys.modules["torchrl_sglang"] = package
from torchrl_sglang.launch.process import ChildProcess
assert "torch" not in sys.modules
child = ChildProcess(
    "child", sys.argv[3:], env=dict(os.environ), log_path=pathlib.Path(sys.argv[2]), grace_s=0.5
)
print(child.pid, flush=True)
"""


def stat(pid: int) -> list[str]:
    """State, parent, group and session of a process; nothing if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return []


def alive(pid: int) -> bool:
    return stat(pid)[:1] not in ([], ["Z"])


def session(leader: int) -> list[int]:
    """Living processes of a session."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if stat(pid)[3:] == [str(leader)] and alive(pid)]


def numbers(path: Path, count: int) -> list[int]:
    """The numbers that a process has printed, once there are as many."""
    return until(lambda: len(found := path.read_text().split()) >= count and [*map(int, found)])


def marked(mark: str) -> list[int]:
    """Living processes that have ``mark`` in their environment."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if mark.encode() in variables and int(entry) != os.getpid():
                found.append(int(entry))
    return [pid for pid in found if alive(pid)]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test started, however far down, is gone after it."""
    name, value = "TORCHRL_SGLANG_TEST", uuid.uuid4().hex
    monkeypatch.setenv(name, value)
    yield
    try:
        until(lambda: not marked(f"{name}={value}"), 3.0)
    finally:
        for pid in marked(f"{name}={value}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


Start = Callable[..., ChildProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts commands, and ends them after the test."""
    made: list[ChildProcess] = []

    def start(
        argv: Sequence[str], *, grace_s: float = 5.0, env: Mapping[str, str] = os.environ
    ) -> ChildProcess:
        log_path = tmp_path / f"{len(made)}.log"
        child = ChildProcess("child", argv, env=env, log_path=log_path, grace_s=grace_s)
        made.append(child)
        return child

    yield start
    for child in made:
        child.stop()


def family(start: Start, *, new_session: bool = False, then: str = "time.sleep(600)") -> Any:
    """A child that runs, its pid and that of its own child."""
    child = start([*PYTHON, FAMILY.format(new_session=new_session, then=then)])
    return child, *numbers(child.log_path, 2)


# Running


def test_it_runs_in_a_session_of_its_own(start: Start) -> None:
    child, pid, grandchild = family(start)
    assert os.getsid(pid) == os.getsid(grandchild) == child.pid != os.getsid(0)
    assert set(session(child.pid)) == {child.pid, pid, grandchild}
    assert child.exit_code is None


def test_its_environment_is_the_one_given(start: Start) -> None:
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    child = start([*PYTHON, code], env={"ONLY": "this"})
    until(lambda: child.exit_code is not None)
    seen = json.loads(child.log_tail())
    assert {name: seen[name] for name in seen if not name.startswith("LC_")} == {"ONLY": "this"}


def test_it_has_no_input_and_logs_both_outputs(start: Start) -> None:
    code = "import sys; print(repr(sys.stdin.read())); print('bad', file=sys.stderr)"
    child = start([*PYTHON, code])
    until(lambda: child.exit_code is not None)
    assert sorted(child.log_tail().splitlines()) == ["''", "bad"]


def test_the_tail_of_a_long_log(start: Start) -> None:
    child = start([*PYTHON, "for i in range(50_000): print('line', i)"])
    until(lambda: child.exit_code is not None)
    assert child.log_tail(2) == "line 49998\nline 49999"


# Ending by itself


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import os; os.kill(os.getpid(), 10)", -signal.SIGUSR1),
    ],
)
def test_exit_code_or_signal(start: Start, code: str, expected: int) -> None:
    child = start([*PYTHON, code])
    until(lambda: child.exit_code is not None)
    assert child.exit_code == expected
    child.stop()
    assert child.exit_code == expected


def test_a_command_that_is_not_there(start: Start) -> None:
    child = start(["/no/such/command"])
    with pytest.raises(ProcessDiedError, match="/no/such/command") as caught:
        child.wait_until(lambda: False, 30.0)
    assert caught.value.exit_code != 0


@pytest.mark.parametrize("new_session", [False, True])
def test_what_it_started_does_not_outlive_it(start: Start, new_session: bool) -> None:
    child, _, grandchild = family(start, new_session=new_session, then="raise SystemExit(3)")
    until(lambda: child.exit_code is not None)
    assert child.exit_code == 3
    assert not alive(grandchild)
    assert session(child.pid) == []


# Waiting


def test_ready(start: Start) -> None:
    child = start([*PYTHON, "import time; print('ready', flush=True); time.sleep(600)"])
    child.wait_until(lambda: "ready" in child.log_tail(), 10.0)


def test_death_before_ready_says_all_within_a_second(start: Start) -> None:
    go = "import sys; print('no such model'); sys.exit(4)"
    child = start([*PYTHON, go, "--api-key", "secret", "--admin-api-key", "hidden"])
    until(lambda: not alive(child.pid))
    begun = time.monotonic()
    with pytest.raises(ProcessDiedError) as caught:
        child.wait_until(lambda: False, 60.0)
    assert time.monotonic() - begun < 1.0
    error = caught.value
    assert (error.exit_code, error.log_tail) == (4, "no such model")
    assert error.argv[-4:] == ("--api-key", "***", "--admin-api-key", "***")
    assert "no such model" in str(error)
    assert "exit code 4" in str(error)
    assert "secret" not in str(error)


FIRST = "Traceback (most recent call last):\n  File 'a', line 1\n    f()\n    ^^^\nKeyError: 'x'\n"

SECOND = FIRST.replace("KeyError: 'x'", "pkg.mod.BadError: b\nmore")

DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"

CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", ""),
        ("[t] all is well\nError: in a line\n", ""),
        (FIRST, "KeyError: 'x'"),
        ("[t TP0] Scheduler hit an exception: " + FIRST + "\n[t] sigquit\n", "KeyError: 'x'"),
        ("[t] one: " + FIRST + "[t] another: " + SECOND, "KeyError: 'x'"),
        (FIRST + DURING + SECOND, "pkg.mod.BadError: b"),
        (FIRST + CAUSED + SECOND, "pkg.mod.BadError: b"),
        (FIRST + DURING + "cut off", "KeyError: 'x'"),
        ("usage: a.py [-h]\n             [--b B]\na.py: error: no such --c\n", "no such --c"),
        ("Traceback (most recent call last):\n  File 'a', line 1\n", ""),
    ],
)
def test_the_cause_in_a_log(log: str, expected: str) -> None:
    assert cause_in(log) == expected


def test_death_names_its_cause_first(start: Start) -> None:
    """Though many lines follow it, more than the message shows."""
    code = "import sys; print(sys.argv[1] + 'later\\n' * 100, flush=True); sys.exit(3)"
    child = start([*PYTHON, code, FIRST])
    with pytest.raises(ProcessDiedError) as caught:
        child.wait_until(lambda: False, 60.0)
    assert caught.value.cause == "KeyError: 'x'"
    assert (
        str(caught.value).splitlines()[0].endswith("exit code 3 before it was ready: KeyError: 'x'")
    )


def test_not_ready_in_time(start: Start) -> None:
    child = start([*PYTHON, "import time; print('loading', flush=True); time.sleep(600)"])
    until(lambda: "loading" in child.log_tail())
    with pytest.raises(StartTimeoutError, match=r"not ready within .*start_s[\s\S]*loading") as no:
        child.wait_until(lambda: False, 0.2)
    assert isinstance(no.value, LaunchError)
    assert child.exit_code is None  # whoever started it decides


# Stopping


def test_stop_ends_the_whole_family(start: Start) -> None:
    child, pid, grandchild = family(start)
    child.stop()
    assert not any(map(alive, (child.pid, pid, grandchild)))
    assert session(child.pid) == []
    assert child.exit_code == -signal.SIGTERM
    child.stop()


def test_stop_finds_who_left_the_session(start: Start) -> None:
    child, _, grandchild = family(start, new_session=True)
    assert os.getsid(grandchild) == grandchild
    child.stop()
    assert not alive(grandchild)


def test_stop_asks_first(start: Start) -> None:
    code = """
import signal, sys, time
def end(*_):
    print("bye", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
"""
    child = start([*PYTHON, code])
    child.wait_until(lambda: "ready" in child.log_tail(), 10.0)
    child.stop()
    assert (child.exit_code, child.log_tail()) == (5, "ready\nbye")


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def test_stop_kills_who_does_not_listen(start: Start) -> None:
    child = start([*PYTHON, STUBBORN], grace_s=0.3)
    child.wait_until(lambda: "ready" in child.log_tail(), 10.0)
    begun = time.monotonic()
    child.stop()
    assert 0.25 < time.monotonic() - begun < 5.0
    assert child.exit_code == -signal.SIGKILL
    assert session(child.pid) == []


def test_several_are_stopped_at_once(start: Start) -> None:
    children = [start([*PYTHON, STUBBORN], grace_s=1.0) for _ in range(3)]
    for child in children:
        child.wait_until(lambda child=child: "ready" in child.log_tail(), 10.0)
    begun = time.monotonic()
    for child in children:
        child.ask_stop()
    for child in children:
        child.stop()
    assert time.monotonic() - begun < 2.5
    assert [session(child.pid) for child in children] == [[], [], []]


def test_leaving_the_block_stops_it_and_leaves_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ChildProcess("c", SLEEP, env=os.environ, log_path=tmp_path / "log", grace_s=5.0) as child:
        until(lambda: len(session(child.pid)) == 2)
    assert session(child.pid) == []
    assert len(os.listdir("/proc/self/fd")) <= before  # others may close meanwhile


# The end of the parent


@contextlib.contextmanager
def parent(tmp_path: Path, then: str, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that starts ``command`` with the library, and then does ``then``."""
    folder = str(Path(torchrl_sglang.__file__).parent)
    argv = [*PYTHON, PARENT + then, folder, str(tmp_path / "log"), *command]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def guard_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


@pytest.mark.parametrize(
    ("how", "then"),
    [
        (signal.SIGKILL, "time.sleep(600)"),
        (signal.SIGTERM, "time.sleep(600)"),
        (signal.SIGINT, "time.sleep(600)"),
        (None, "sys.stdin.read(0)"),
        (None, "raise ValueError"),
        (None, "os._exit(3)"),
    ],
    ids=["SIGKILL", "SIGTERM", "Ctrl-C", "end", "exception", "_exit"],
)
@pytest.mark.parametrize("stubborn", [False, True])
def test_nothing_outlives_the_parent(
    tmp_path: Path, how: signal.Signals | None, then: str, stubborn: bool
) -> None:
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else ""
    command = [*PYTHON, ignore + FAMILY.format(new_session=stubborn, then="time.sleep(600)")]
    # The parent ends only once the whole family is there.
    wait = "while len(pathlib.Path(sys.argv[2]).read_text().split()) < 2: time.sleep(0.01)\n"
    with parent(tmp_path, wait + "print(flush=True)\n" + then, command) as process:
        guard = guard_pid(process)
        assert process.stdout is not None
        process.stdout.readline()
        pids = numbers(tmp_path / "log", 2)
        if how is not None:
            process.send_signal(how)
        process.wait(10.0)
    until(lambda: not any(map(alive, (guard, *pids))))
    assert session(guard) == []


def test_a_child_lives_on_when_the_thread_that_started_it_ends(
    start: Start, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    code = f"""
import os, time
while not os.path.exists({str(flag)!r}):
    time.sleep(0.01)
print("alive", flush=True)
time.sleep(600)
"""
    made: list[ChildProcess] = []
    thread = threading.Thread(target=lambda: made.append(start([*PYTHON, code])))
    thread.start()
    tid = thread.native_id
    thread.join()
    until(lambda: not Path(f"/proc/self/task/{tid}").exists())
    flag.touch()
    made[0].wait_until(lambda: "alive" in made[0].log_tail(), 10.0)
    assert made[0].exit_code is None


def test_a_forked_copy_stops_nothing(tmp_path: Path) -> None:
    then = """
if os.fork() == 0:
    child.stop()
    child.ask_stop()
    os._exit(0)
os.wait()
print(child.exit_code, flush=True)
child.stop()
print(child.exit_code, flush=True)
"""
    ready = "while not pathlib.Path(sys.argv[2]).read_text(): time.sleep(0.01)\n"
    command = [*PYTHON, "import time; print('ready', flush=True); time.sleep(600)"]
    with parent(tmp_path, ready + then, command) as process:
        guard_pid(process)
        output, _ = process.communicate(timeout=20.0)
    assert output.split() == ["None", "-15"]


# A fleet that never gets ready


def test_ctrl_c_while_a_fleet_starts_ends_it_at_once(tmp_path: Path) -> None:
    python = tmp_path / "python"  # has every distribution, and runs every server for ever
    python.write_text("#!/bin/sh\n[ $1 = -c ] && echo 1.0 || exec sleep 600\n")
    python.chmod(0o755)
    plan = FleetPlan(
        servers=(ServerConfig(model_path="m", device="cpu"),) * 2,
        router=RouterConfig(),
        python=str(python),
        log_dir=tmp_path / "logs",
        timeouts=Timeouts(start_s=10.0, stop_s=2.0),
    )
    mark = f"TORCHRL_SGLANG_TEST={os.environ['TORCHRL_SGLANG_TEST']}"

    def interrupt() -> None:
        until(lambda: len(marked(mark)) == 4)  # two servers and their guards
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Fleet(plan, server_ready=lambda url: False, router_ready=lambda url: False)
    assert time.monotonic() - begun < 5.0


# The guard


def test_the_guard_starts_nothing_for_a_parent_that_is_gone() -> None:
    nobody = 2**22 + 1  # above the highest pid
    done = subprocess.run(
        [*PYTHON[:3], str(GUARD), str(nobody), "1", *PYTHON, "print('started')"],
        capture_output=True,
        text=True,
        timeout=20.0,
        check=False,
        start_new_session=True,  # a guard ends whoever is in its session
    )
    assert (done.stdout, done.returncode) == ("", 1)


def test_the_command_dies_with_its_guard(start: Start) -> None:
    child = start([*PYTHON, "import os, time; print(os.getpid(), flush=True); time.sleep(600)"])
    (pid,) = numbers(child.log_path, 1)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: not alive(pid))


def test_what_is_left_of_the_family_can_still_be_stopped(start: Start) -> None:
    child, pid, grandchild = family(start)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: not alive(pid))
    child.stop()
    until(lambda: not alive(grandchild), 2.0)


# Small things


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], []),
        (["--api-key", "k", "--port", "1"], ["--api-key", "***", "--port", "1"]),
        (["a", "--admin-api-key", "k"], ["a", "--admin-api-key", "***"]),
        (["--api-key"], ["--api-key"]),
    ],
)
def test_redacted(argv: list[str], expected: list[str]) -> None:
    assert redacted(argv) == expected


def test_installed_version() -> None:
    assert installed_version(sys.executable, "pytest") == pytest.__version__
    assert installed_version(sys.executable, "no-such-distribution") is None
    assert installed_version("/no/such/python", "pytest") is None


def test_what_is_stopped_is_killed_with_all_its_children(tmp_path: Path) -> None:
    code = (
        "import os, signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen(['sleep', '600']); print('up', flush=True);"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    log = tmp_path / "log"
    child = ChildProcess("it", ["python3", "-c", code], env={}, log_path=log, grace_s=60.0)
    deadline = time.monotonic() + 20.0
    while "up" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = time.monotonic()
    child.kill()
    child.kill()
    assert time.monotonic() - begun < 5.0
    assert child.exit_code is not None
    assert session_members(child.pid) == []
