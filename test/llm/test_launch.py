"""The life of managed servers: starts that fail, and ends that leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import CPU_SERVER_ARGS

from torchrl_sglang import AsyncSGLang, Timeouts
from torchrl_sglang.errors import (
    ConfigError,
    EngineNotFoundError,
    PortTakenError,
    ProcessDiedError,
    StartTimeoutError,
)

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


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a process id that was given to somebody else does not count."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def wait_until_gone(processes: list[psutil.Process], timeout_s: float = 30.0) -> list[Any]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def listening(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


@pytest.fixture
def start_parent(model_path: Path, tmp_path: Path) -> Iterator[Any]:
    """Runs `PARENT` in a process of its own, and ends whatever a failed test left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(then: str) -> subprocess.Popen[str]:
        script = tmp_path / "parent.py"
        script.write_text(PARENT)
        parent = subprocess.Popen(
            [sys.executable, str(script), str(model_path), str(tmp_path / "logs"), then],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(parent)
        return parent

    yield start
    for parent in started:
        if parent.poll() is None:
            for process in descendants(parent.pid):
                process.kill()
            parent.kill()
            parent.wait()


@pytest.mark.parametrize("end", ["exit", "raise", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_end_of_the_parent_leaves_anything(start_parent: Any, end: Any) -> None:
    parent = start_parent(end if isinstance(end, str) else "wait")
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


def test_ctrl_c_while_starting_leaves_nothing(start_parent: Any, tmp_path: Path) -> None:
    parent = start_parent("wait")
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and len(descendants(parent.pid)) < 2:
        time.sleep(0.05)
    children = descendants(parent.pid)
    assert len(children) >= 2  # a guard and the server that it started
    parent.send_signal(signal.SIGINT)
    _, stderr = parent.communicate(timeout=60.0)
    assert "KeyboardInterrupt" in stderr
    assert wait_until_gone(children) == []


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
    assert "--attention-backend" in error.argv
    assert error.argv[error.argv.index("--api-key") + 1] == "***"
    # It was told of the death when it happened, not at some time-out.
    last_log_s = (tmp_path / "server-0.log").stat().st_mtime - time.time() + time.monotonic()
    assert ended - max(last_log_s, start) < 2.0


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
    assert time.monotonic() - killed[0] < 2.0
    assert caught.value.exit_code == -signal.SIGKILL
    thread.join(10.0)


def test_a_start_that_takes_too_long(model_path: Path, tmp_path: Path) -> None:
    earlier = set(descendants(os.getpid()))
    with pytest.raises(StartTimeoutError, match="start_s"):
        AsyncSGLang.from_pretrained(
            str(model_path), device="cpu", log_dir=tmp_path, timeouts=Timeouts(start_s=1.0)
        )
    assert set(descendants(os.getpid())) <= earlier


def test_a_port_that_is_taken(model_path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=str(port)):
            AsyncSGLang.from_pretrained(
                str(model_path), device="cpu", server_ports=[port], log_dir=tmp_path
            )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "folder or a hub name"),
        (None, "folder or a hub name"),
        ("./no/such/folder", "no folder"),
        ("{tmp}", "config.json"),
    ],
)
def test_no_model(tmp_path: Path, name: Any, match: str) -> None:
    given = str(tmp_path) if name == "{tmp}" else name
    with pytest.raises(ConfigError, match=match):
        AsyncSGLang.from_pretrained(given, device="cpu")


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


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_replicas": 0},
        {"tp_size": 0},
        {"device": "tpu"},
        {"cuda_devices": [0]},
        {"server_ports": [1, 2]},
        {"model_path": "x"},
    ],
)
def test_wrong_arguments(model_path: Path, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AsyncSGLang.from_pretrained(str(model_path), **{"device": "cpu", **kwargs})


def test_from_a_worker_thread_that_ends(
    model_path: Path, tmp_path: Path, timeouts: Timeouts
) -> None:
    """Two replicas, started by a thread that is gone afterwards, live on and are ended."""
    from servers import perturb, worst_error
    from transformers import AutoModelForCausalLM

    from torchrl_sglang import SGLangWeightSyncScheme

    earlier = set(descendants(os.getpid()))
    made: list[AsyncSGLang] = []
    thread = threading.Thread(
        target=lambda: made.append(
            AsyncSGLang.from_pretrained(
                str(model_path),
                num_replicas=2,
                device="cpu",
                log_dir=tmp_path,
                timeouts=timeouts,
                **CPU_SERVER_ARGS,
            )
        )
    )
    thread.start()
    thread.join(280.0)
    with made[0] as service:
        children = [p for p in descendants(os.getpid()) if p not in earlier]
        assert len(children) >= 9
        urls = [service.server_url, *(worker.url for worker in service.workers)]
        assert len(set(urls)) == 3
        prompts = [[10 + i, 20, 30] for i in range(16)]
        greedy = {"max_new_tokens": 8, "temperature": 0.0}
        service.generate(prompts, greedy)
        logs = [(tmp_path / f"server-{i}.log").read_text() for i in range(2)]
        served = [log.count('"POST /generate HTTP/1.1" 200') for log in logs]
        assert min(served) >= 8  # both took their share (each had one more to warm up)

        model = perturb(AutoModelForCausalLM.from_pretrained(model_path, dtype="bfloat16"), seed=1)
        scheme = SGLangWeightSyncScheme(service, num_gpus=2)
        scheme.init_on_sender()
        scheme.connect()
        scheme.send(model)
        assert scheme.last_push is not None
        assert scheme.last_push.verified_by == "checksum"
        sampling = {"max_new_tokens": 8, "ignore_eos": True}
        assert worst_error(model, prompts, service.generate(prompts, sampling)) < 0.02
        for worker in service.workers:
            keys = service._keys
            with AsyncSGLang.connect(
                worker.url, api_key=keys.api_key, admin_api_key=keys.admin_api_key
            ) as one:
                assert one.weight_version == str(scheme.last_push.version)
                assert worst_error(model, prompts, one.generate(prompts, sampling)) < 0.02
        scheme.close()
    assert alive(children) == []
    assert not any(listening(url) for url in urls)
