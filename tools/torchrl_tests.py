"""Runs TorchRL's published LLM tests with its classes swapped for ours, and counts.

The tests are read from a folder that the user names, a checkout of TorchRL at the release that is
installed; nothing of them is kept here or fetched. They run on a real server of ours on the CPU.

    git clone --branch v0.14.1 https://github.com/pytorch/rl
    .venv/bin/python tools/torchrl_tests.py rl/test/llm/test_wrapper.py --no-rollout --any-message
    .venv/bin/python tools/torchrl_tests.py rl/test/llm/test_sglang.py --as-on-gpu --runslow

No test is changed, and none is skipped that does not skip itself. What is put in place of what:

- TorchRL's ``vLLMWrapper``, ``SGLangWrapper``, ``AsyncSGLang``, ``RLSGLangEngine``,
  ``SGLangWeightSyncScheme`` and ``SGLangWeightSender`` are ours; services start on the CPU.
- ``vllm.LLM(...)`` and ``AsyncVLLM.from_pretrained(...)`` give the one service that tests share.
- Hub names (``Qwen/Qwen2.5-0.5B`` and its like) are folders with a tiny model, below the folder
  that the tests run in: whatever loads them finds these first.
- ``find_spec("vllm")`` finds something, so that the tests which ask for it run. Fixtures that make
  an engine are told that there is a GPU; with ``--as-on-gpu``, modules are while they are read.

Options relax what a drop-in need not have: ``--no-rollout`` leaves out the outputs that TorchRL's
wrappers lack (``rollout_key=None``), ``--any-message`` takes every message of an expected error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
NAMES = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B", "gpt2")
OPTIONS = "TORCHRL_SGLANG_SWAP"  # how the script tells them to the plugin
ENGINES = ("vllm_instance", "async_vllm_instance", "vllm_instance_opt", "sglang_service")
SWAPPED = {
    "torchrl.modules.llm": (
        "vLLMWrapper",
        "SGLangWrapper",
        "AsyncSGLang",
        "RLSGLangEngine",
        "AsyncVLLM",
    ),
    "torchrl.modules.llm.policies": ("vLLMWrapper", "SGLangWrapper"),
    "torchrl.modules.llm.policies.vllm_wrapper": ("vLLMWrapper",),
    "torchrl.modules.llm.policies.sglang_wrapper": ("SGLangWrapper",),
    "torchrl.modules.llm.backends": ("AsyncSGLang", "RLSGLangEngine"),
    "torchrl.modules.llm.backends.sglang": ("AsyncSGLang", "RLSGLangEngine"),
    "torchrl.weight_update.llm": ("SGLangWeightSyncScheme", "SGLangWeightSender"),
    "torchrl.weight_update.llm.sglang_nccl": ("SGLangWeightSyncScheme", "SGLangWeightSender"),
}


def write_models(folder: Path) -> None:
    """A tiny model under every hub name, in float32: two right forwards agree to many digits."""
    import torch
    from tiny_model import make_tiny_model

    for name in NAMES:
        sizes = {"hidden_size": 128, "max_position_embeddings": 8192, "logit_scale": 2.5}
        make_tiny_model(folder / name, dtype=torch.float32, **sizes)


# The plugin


class Swap:
    """What is put in place before a test module is imported, and what is counted after it ran."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.wrapper: Any = None
        self.service: Any = None
        self.failures: list[tuple[str, str]] = []
        self.deselected = 0

    def pytest_configure(self, config: pytest.Config) -> None:
        import torchrl_sglang

        self.wrapper = torchrl_sglang.SGLangWrapper
        if self.options["no_rollout"]:
            self.wrapper = without_rollout(self.wrapper)
        shared = types.SimpleNamespace(from_pretrained=lambda *_, **__: self.start())
        ours = {
            "vLLMWrapper": self.wrapper,
            "SGLangWrapper": self.wrapper,
            "AsyncSGLang": on_cpu(torchrl_sglang.AsyncSGLang),
            "AsyncVLLM": shared,
        }
        for module_name, names in SWAPPED.items():
            module = importlib.import_module(module_name)
            for name in names:
                setattr(module, name, ours.get(name) or getattr(torchrl_sglang, name))
        for name in ("vllm", "vllm.envs"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        sys.modules["vllm"].envs = sys.modules["vllm.envs"]
        sys.modules["vllm"].LLM = lambda *_, **__: self.start()
        if self.options["any_message"]:
            accept_any_message()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        with a_gpu_is_said_to_be_there(self.options["as_on_gpu"]):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        with a_gpu_is_said_to_be_there(fixturedef.argname in ENGINES):
            return (yield)

    def start(self) -> Any:
        """One server for all tests."""
        if self.service is None:
            from transformers import AutoTokenizer

            from torchrl_sglang import AsyncSGLang

            self.service = on_cpu(AsyncSGLang).from_pretrained(NAMES[0], random_seed=0)
            tokenizer = AutoTokenizer.from_pretrained(NAMES[0])
            self.service.get_tokenizer = lambda: tokenizer  # as vLLM's engine has it
        return self.service

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        if self.options["every_item"]:
            return
        kept = [item for item in items if self.reaches(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def reaches(self, item: Any) -> bool:
        """Whether it uses our classes: by its parameters, else by its fixtures."""
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec else {}
        if "wrapper_class" in params:
            return params["wrapper_class"] is self.wrapper
        return any(name in item.fixturenames for name in ENGINES)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)
            self.failures.append((report.nodeid.split("::", 1)[1], said.strip().split("\n")[0]))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("with our classes")
        for cause, count in Counter(said for _, said in self.failures).most_common():
            terminalreporter.line(f"{count} x {cause}")
            for name in (name for name, said in self.failures if said == cause):
                terminalreporter.line(f"      {name}")
        kinds = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
        counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in kinds}
        terminalreporter.line(", ".join(f"{count} {kind}" for kind, count in counts.items()))

    def pytest_unconfigure(self) -> None:
        if self.service is not None:
            self.service.shutdown()


def without_rollout(cls: type) -> type:
    """The wrapper with ``rollout_key=None`` unless something else is asked for."""

    class SGLangWrapper(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"rollout_key": None, **kwargs})

    return SGLangWrapper


def on_cpu(cls: type) -> type:
    """The service, started on the CPU and in little memory unless something else is asked for."""

    class AsyncSGLang(cls):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            small = {"device": "cpu", "max_total_tokens": 16384}
            return super().from_pretrained(*args, **{**small, **kwargs})

    return AsyncSGLang


@contextlib.contextmanager
def a_gpu_is_said_to_be_there(wanted: bool) -> Iterator[None]:
    """For the conditions under which tests skip themselves; nothing uses a GPU."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(torch.cuda, "is_available", lambda: True)
        yield


def accept_any_message() -> None:
    """``pytest.raises`` looks at types alone."""
    raises = pytest.raises

    def of_a_type(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("match", None)
        return raises(*args, **kwargs)

    pytest.raises = of_a_type


def pytest_addhooks(pluginmanager: Any) -> None:
    """Called when it is loaded by ``-p torchrl_tests``."""
    pluginmanager.register(Swap(json.loads(os.environ[OPTIONS])), "torchrl_sglang_swap")


# The script


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", type=Path, nargs="+", help="TorchRL's test files")
    parser.add_argument("--no-rollout", action="store_true", help="rollout_key=None by default")
    parser.add_argument("--any-message", action="store_true", help="errors are matched by type")
    parser.add_argument("--as-on-gpu", action="store_true", help="run what skips without a GPU")
    parser.add_argument("--every-item", action="store_true", help="also what uses no class of ours")
    return parser.parse_known_args()


def command(args: argparse.Namespace, rest: list[str], folder: Path) -> Iterator[str]:
    yield from (sys.executable, "-m", "pytest", "-p", "torchrl_tests", "-q", "--tb=short")
    yield from ("-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}")
    yield from (str(path.resolve()) for path in args.tests)
    yield from rest


def main() -> int:
    args, rest = arguments()
    names = ("no_rollout", "any_message", "every_item", "as_on_gpu")
    options = {name: getattr(args, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="torchrl-tests-") as scratch:
        folder = Path(scratch)
        write_models(folder)
        paths = [str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            OPTIONS: json.dumps(options),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        made = list(command(args, rest, folder))
        return subprocess.run(made, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
