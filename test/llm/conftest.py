"""One real SGLang server on CPU, behind a real router, for most tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tensordict import set_list_to_stack
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers.fault_proxy import FaultProxy
from helpers.servers import (
    CPU_SERVER_ARGS,
    SPECIAL_SERVER_ARGS,
    connect_like,
    connected_schemes,
    make_peaked_model,
    ready_weights,
)
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, Timeouts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("tests", deadline=None)  # machines are noisy
settings.load_profile("tests")
FOLDER = Path(__file__).parent
MARKS = {"unit": "unit", "served": "served", "faults": "failing", "whole": "whole"}
# Files without a server that take long all the same: they import SGLang, or wait.
SLOWEST_UNITS = {
    *("unit/launch/test_options", "unit/launch/test_pinning", "unit/policy/test_media"),
    *("unit/generate/processors/test_ship", "unit/weights/test_group", "unit/weights/test_sharded"),
}
# Files that start servers of their own, or take minutes.
LONG = {
    *("faults/test_closing", "faults/test_dead_servers", "faults/test_every_step"),
    *("faults/test_restart", "faults/test_sharded", "whole/test_docs"),
    *("served/service/test_launch", "served/service/test_replicas"),
    *("served/weights/test_data_parallel", "served/weights/test_experts"),
    *("served/weights/test_ranks", "served/weights/test_sharded"),
    *("served/policy/test_extras", "served/policy/test_without_a_tokenizer"),
    *("served/policy/test_resuming", "served/generate/test_processors"),
    *("served/generate/test_paused_servers", "served/weights/test_beside_requests"),
    *("served/weights/test_arrives", "served/weights/test_refused"),
    *(f"served/weights/adapters/test_{name}" for name in ("arrive", "failures", "refused")),
}
# A shell's background jobs ignore Ctrl-C, and so do their children: some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by their folder, and puts the quick ones first.

    What starts servers of its own, or takes minutes, comes next, so that no process ends long after
    others.
    """

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(FOLDER).with_suffix("").as_posix()
        if name.startswith("unit/"):
            return 0 if name in SLOWEST_UNITS else 1
        return 2 if name in LONG else 3

    for item in items:
        item.add_marker(MARKS[item.path.relative_to(FOLDER).parts[0]])
    items.sort(key=place)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes what ran, how it ended and how long it took, where ``TESTS_REPORT`` names a file."""
    path = os.environ.get("TESTS_REPORT")
    if not path or "PYTEST_XDIST_WORKER" in os.environ:  # a worker knows of its own tests alone
        return
    took: dict[str, float] = {}
    ends: dict[str, str] = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            ends[report.nodeid] = outcome
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                took[report.nodeid] = took.get(report.nodeid, 0.0) + report.duration
    rows = [f"| `{name}` | {end} | {took[name]:.1f} |\n" for name, end in sorted(ends.items())]
    machine = f"torch {torch.__version__}, {os.cpu_count()} cores\n\n"
    head = "| test | end | seconds |\n|---|---|---|\n"
    Path(path).write_text(machine + head + "".join(rows))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose next-token distributions are peaked, as a trained model's are."""
    return make_peaked_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture
def model(model_path: Path) -> Any:
    """The served model as the trainer has it, fresh for each test."""
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def timeouts() -> Timeouts:
    """Longer than the usual ones, where a machine has more to do than this."""
    patient = dict.fromkeys(("control_s", "step_s", "group_s", "transfer_s"), 20.0)
    return Timeouts(start_s=240.0, request_s=60.0, **patient)


@pytest.fixture(scope="session")
def shared_service(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    """Started once for the whole run; tests take `service`, which sees to its weights."""
    with AsyncSGLang.from_pretrained(
        str(model_path), device="cpu", timeouts=timeouts, **CPU_SERVER_ARGS
    ) as service:
        yield service


@pytest.fixture(scope="session")
def special_service(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    """As above, with LoRA, logit processors and hidden states; no adapter is loaded between tests.

    The LoRA backend is the library's own choice.
    """
    with AsyncSGLang.from_pretrained(
        str(model_path), device="cpu", timeouts=timeouts, **SPECIAL_SERVER_ARGS
    ) as service:
        yield service


@pytest.fixture
def service(shared_service: AsyncSGLang) -> AsyncSGLang:
    """The shared service, running its checkpoint's weights."""
    return shared_service


@pytest.fixture
def attached(shared_service: AsyncSGLang, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    """An external service on the shared server, with a state of its own."""
    with connect_like(
        shared_service,
        timeouts=timeouts,
    ) as external:
        yield external


@pytest.fixture
def proxy(shared_service: AsyncSGLang) -> Iterator[FaultProxy]:
    """A proxy in front of the shared server, which passes everything on until told otherwise."""
    with FaultProxy(shared_service.workers[0].url) as running:
        yield running


@pytest.fixture
def proxied(
    proxy: FaultProxy, shared_service: AsyncSGLang, timeouts: Timeouts
) -> Iterator[AsyncSGLang]:
    """An external service that reaches the shared server through the proxy."""
    with connect_like(shared_service, proxy.url, timeouts=timeouts) as external:
        proxy.seen.clear()  # of what was asked to attach
        yield external


@pytest.fixture
def restore_weights(shared_service: AsyncSGLang, model_path: Path) -> Iterator[None]:
    """Puts the checkpoint's weights back after a test that pushed others."""
    yield
    ready_weights(shared_service, model_path)


@pytest.fixture
def lists_stack() -> Iterator[None]:
    with set_list_to_stack(True):
        yield


@pytest.fixture
def connected(
    shared_service: AsyncSGLang, restore_weights: None
) -> Iterator[Callable[..., SGLangWeightSyncScheme]]:
    """Makes schemes that are connected, and closes them."""
    with connected_schemes(shared_service) as connect:
        yield connect
