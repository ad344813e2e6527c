"""The scripts that run TorchRL's own tests and recipes: what they change, and what not."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from typing import Any

import pytest

import torchrl_sglang
from helpers.paths import ROOT

TOOLS = ROOT / "tools"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # they add the folder of the tiny model
    return importlib.import_module("torchrl_recipe")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "from torchrl.modules.llm import SGLangWrapper, TransformersWrapper",
            "from torchrl.modules.llm import TransformersWrapper\n"
            "from torchrl_sglang import SGLangWrapper as SGLangWrapper",
        ),
        (
            "    from torchrl.modules.llm.backends.vllm import AsyncVLLM",
            "    from torchrl_sglang import AsyncSGLang as AsyncVLLM",
        ),
        ("from torchrl.data import ReplayBuffer", "from torchrl.data import ReplayBuffer"),
        ('device = torch.device("cuda:0")', 'device = torch.device("cpu")'),
        ('name = f"cuda:{devices[0]}" if a else "cuda:0"\n', 'name = "cpu" if a else "cpu"\n'),
        ("if torch.cuda.is_available():", "if torch.cuda.is_available():"),
        (
            'if not torch.cuda.is_available():\n    raise RuntimeError("CUDA is required")',
            'if False:\n    raise RuntimeError("CUDA is required")',
        ),
        ("collect(replay_buffer=rb, x=1)", "collect(replay_buffer=rb.client(), x=1)"),
    ],
)
def test_what_is_changed_in_a_recipe(recipe: Any, line: str, expected: str) -> None:
    made: Counter[str] = Counter()
    assert recipe.substituted(line, made) == expected
    assert bool(made) == (line != expected)


def test_what_is_imported_instead_is_there(recipe: Any) -> None:
    tests = importlib.import_module("torchrl_tests")
    assert set(recipe.OURS.values()) <= set(torchrl_sglang.__all__)
    swapped = {name for names in tests.SWAPPED.values() for name in names}
    assert swapped - {"vLLMWrapper", "AsyncVLLM"} <= set(torchrl_sglang.__all__)
    for module, names in tests.SWAPPED.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names)
