"""The life of managed servers: starts that fail, and ends that leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.processes import descendants, listening, wait_until_gone
from torchrl_sglang import AsyncSGLang, Timeouts
from torchrl_sglang.errors import EngineNotFoundError, ProcessDiedError, StartTimeoutError

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "all_proxy")


# A parent that starts a service and says so; what it does next decides its end.
PARENT = """
import sys, time
from torchrl_sglang import AsyncSGLang, Timeouts

def main():
    service = AsyncSGLang.from_pretrained(
        sys.argv[1], device="cpu", log_dir=sys.argv[2], max_total_tokens=4096,
        timeouts=Timeouts(start_s=240.0, stop_s=10.0),
    )
    print("ready", service.server_url, *(worker.url for worker in service.workers), flush=True)
    if sys.argv[3] in ("raise", "exit"):
        sys.stdin.readline()
    if sys.argv[3] == "raise":
        with service:
            raise RuntimeError("something else went wrong")
    if sys.argv[3] == "exit":
        return
    time.sleep(300)

if __name__ == "__main__":
    main()
"""


class Parents:
    """Processes that run `PARENT`."""

    def __init__(self, model_path: Path, folder: Path) -> None:
        self._model_path = model_path
        self._folder = folder
        self._started: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, then: str) -> subprocess.Popen[str]:
        """The parent of that name; what it does once its service is ready is ``then``."""
        if name not in self._started:
            script = self._folder / "parent.py"
            script.write_text(PARENT)
            self._started[name] = subprocess.Popen(
                [
                    sys.executable,
                    str(script),
                    str(self._model_path),
                    str(self._folder / name),
                    then,
                ],
                # Nothing answers there: it is for downloads, of which there are none.
                env={**os.environ, **dict.fromkeys(PROXIES, "http://127.0.0.1:9")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._started[name]

    def close(self) -> None:
        """Ends whatever a failed test left."""
        for parent in self._started.values():
            if parent.poll() is None:
                for process in descendants(parent.pid):
                    process.kill()
                parent.kill()
                parent.wait()
            for stream in filter(None, (parent.stdin, parent.stdout, parent.stderr)):
                stream.close()


@pytest.fixture(scope="module")
def parents(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parents]:
    made = Parents(model_path, tmp_path_factory.mktemp("parents"))
    yield made
    made.close()


QUICK: list[str | signal.Signals] = [signal.SIGKILL]
SLOW: list[str | signal.Signals] = ["exit", "raise", signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("end", [*QUICK, *(pytest.param(e, marks=pytest.mark.slow) for e in SLOW)])
def test_no_end_of_the_parent_leaves_anything(parents: Parents, end: Any) -> None:
    ends = QUICK if end in QUICK else SLOW
    at = ends.index(end)
    # The next one starts meanwhile.
    parent, *_ = [
        parents.start(str(one), one if isinstance(one, str) else "wait")
        for one in ends[at : at + 2]
    ]
    words = parent.stdout.readline().split()
    assert words[:1] == ["ready"], parent.communicate()[1]
    children = descendants(parent.pid)
    # Two guards, the router, the server, and the server's scheduler and detokenizer.
    assert len(children) >= 6
    assert all(listening(url) for url in words[1:])
    if isinstance(end, signal.Signals):
        parent.send_signal(end)
        _, stderr = parent.communicate(timeout=60.0)
    else:
        _, stderr = parent.communicate("go on\n", timeout=60.0)
    code = {"exit": 0, "raise": 1, signal.SIGINT: -2, signal.SIGTERM: -15, signal.SIGKILL: -9}[end]
    assert parent.returncode == code
    assert ("something else went wrong" in stderr) == (end == "raise")
    assert wait_until_gone(children) == []
    assert not any(listening(url) for url in words[1:])


@pytest.mark.slow
def test_ctrl_c_while_starting_leaves_nothing(parents: Parents) -> None:
    parent = parents.start("ctrl-c", "wait")
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and len(descendants(parent.pid)) < 2:
        time.sleep(0.05)
    children = descendants(parent.pid)
    assert len(children) >= 2  # a guard and the server that it started
    parent.send_signal(signal.SIGINT)
    _, stderr = parent.communicate(timeout=60.0)
    assert "KeyboardInterrupt" in stderr
    assert wait_until_gone(children) == []


@pytest.mark.slow
def test_a_server_that_dies_while_starting(model_path: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ProcessDiedError, match="no-such-backend") as caught:
        AsyncSGLang.from_pretrained(
            str(model_path),
            device="cpu",
            log_dir=tmp_path,
            attention_backend="no-such-backend",
        )
    ended = time.monotonic()
    error = caught.value
    assert error.exit_code == 2
    assert "invalid choice" in error.log_tail
    assert "no-such-backend" in str(error).splitlines()[0]  # the cause comes first
    assert "--attention-backend" in error.argv
    assert error.argv[error.argv.index("--api-key") + 1] == "***"
    # It was told of the death when it happened, not at some time-out.
    last_log_s = (tmp_path / "server-0.log").stat().st_mtime - time.time() + time.monotonic()
    assert ended - max(last_log_s, start) < 20.0


def test_a_server_that_is_killed_while_starting(model_path: Path, tmp_path: Path) -> None:
    killed: list[float] = []
    earlier = {process.pid for process in descendants(os.getpid())}

    def kill_the_server() -> None:
        deadline = time.monotonic() + 60.0
        while not killed and time.monotonic() < deadline:
            for process in descendants(os.getpid()):
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    if process.pid not in earlier and process.cmdline()[1] == "-P":
                        process.kill()
                        killed.append(time.monotonic())
            time.sleep(0.05)

    thread = threading.Thread(target=kill_the_server)
    thread.start()
    with pytest.raises(ProcessDiedError) as caught:
        AsyncSGLang.from_pretrained(str(model_path), device="cpu", log_dir=tmp_path)
    assert time.monotonic() - killed[0] < 20.0
    assert caught.value.exit_code == -signal.SIGKILL
    thread.join(10.0)


def test_a_start_that_takes_too_long(model_path: Path, tmp_path: Path) -> None:
    earlier = set(descendants(os.getpid()))
    with pytest.raises(StartTimeoutError, match="start_s"):
        AsyncSGLang.from_pretrained(
            str(model_path), device="cpu", log_dir=tmp_path, timeouts=Timeouts(start_s=1.0)
        )
    assert set(descendants(os.getpid())) <= earlier


def test_sglang_is_not_installed(model_path: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")],
        check=True,
        timeout=60.0,
    )
    with pytest.raises(EngineNotFoundError, match="server_python=") as caught:
        AsyncSGLang.from_pretrained(
            str(model_path), device="cpu", server_python=str(tmp_path / "bare/bin/python")
        )
    assert isinstance(caught.value, ImportError)
