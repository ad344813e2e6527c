"""Logit processors: what travels to the server."""

from __future__ import annotations

import ast
import importlib
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch

from helpers.processors import Force, Raising, fake_req, run
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.generate.processors.make import (
    allowed_tokens,
    combined,
    disallowed_tokens,
    progress_temperature,
    user_processor,
)
from torchrl_sglang.generate.processors.ship import SERVED

VOCAB = 8


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's module of finish reasons, which the server's process has loaded."""
    module = SimpleNamespace(FINISH_ABORT=lambda *args: args)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", module)


def test_one_text_for_all_params() -> None:
    """SGLang keeps every distinct text until it ends, and calls once per text."""
    assert allowed_tokens([1]).serialized == disallowed_tokens([2, 3]).serialized
    one, two = user_processor(Force, {"token": 1}), user_processor(Force, {"token": 2})
    assert one.serialized == two.serialized
    assert one.serialized != user_processor(Raising).serialized
    mixed = combined(allowed_tokens([1]), progress_temperature(1.0, 0.5, 5))
    assert mixed.serialized not in (allowed_tokens([1]).serialized, one.serialized)


def test_params_keep_to_what_sglang_takes() -> None:
    """Scalars, lists of scalars, dictionaries of scalars: its ``CustomParamValue``."""
    nested = user_processor(Force, {"a": {"b": [1, {"c": None}]}, "token": 1})
    for processor in (combined(allowed_tokens([1]), nested), progress_temperature(1.0, 0.5, 5)):
        for value in processor.params.values():
            assert isinstance(value, list)
            assert all(isinstance(item, str) for item in value)


def test_a_large_mask_is_small_on_the_wire() -> None:
    dense = torch.rand(150_000, generator=torch.Generator().manual_seed(0)) < 0.5
    assert len(json.dumps(allowed_tokens(dense).params)) < 60_000
    assert len(json.dumps(allowed_tokens([140_000]).params)) < 1500
    assert len(allowed_tokens([1]).serialized) < 12_000


# How code travels.


def test_the_served_source_is_old_python() -> None:
    ast.parse(SERVED.read_text(), feature_version=(3, 8))


def test_another_python_version_is_named(finished: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 99, 0))
        processor = user_processor(Force, {"token": 1})
    req = fake_req()
    run([processor], torch.randn(1, VOCAB), [req])
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"sent from Python 3.99 and the server runs {ours}" in req.to_finish[0]


ELSEWHERE = """
import json, pickle, sys, types
for name in ("torchrl_sglang", "torchrl", "tensordict", "userpackage", "helpers"):
    sys.modules[name] = None  # importing it fails
import dill, torch
req = types.SimpleNamespace(
    origin_input_ids=[1], output_ids=[], kv=types.SimpleNamespace(kv_committed_len=1),
    sampling_params=types.SimpleNamespace(temperature=1.0), to_finish=None)
reasons = types.SimpleNamespace(FINISH_ABORT=lambda *args: args)
sys.modules["sglang.srt.managers.schedule_batch"] = reasons
for line in sys.stdin:
    sent = json.loads(line)
    call = dill.loads(bytes.fromhex(json.loads(sent["serialized"])["callable"]))()
    logits = call(torch.zeros(1, 8), [{**sent["params"], "__req__": req}])
    print(json.dumps([torch.isfinite(logits[0]).nonzero().flatten().tolist(), req.to_finish]))
"""


USER_PACKAGE = {
    "__init__.py": "",
    "helpers.py": "LOW = -float('inf')\n\ndef banned(logits):\n    return logits * 0 + LOW\n",
    "mine.py": (
        "from . import helpers as h\nfrom .helpers import LOW\nimport torch\n\n"
        "class Base:\n    def __call__(self, logits, params):\n"
        "        out = torch.full_like(logits, LOW)\n        out[:, params[0]['token']] = 0\n"
        "        return out\n\n"
        "class Mine(Base):\n    def __call__(self, logits, params):\n"
        "        assert h.banned(logits + 1).max() == LOW\n"
        "        return super().__call__(logits, params)\n"
    ),
}


FROM_MAIN = """
import json, math, sys
import torch
from torchrl_sglang.generate.processors.make import user_processor

TOKEN = 6

class InMain:
    def __call__(self, logits, params):
        out = torch.full_like(logits, -math.inf)
        out[:, TOKEN] = 0
        return out

processor = user_processor(InMain)
print(json.dumps({"serialized": processor.serialized, "params": processor.params}))
"""


def python(script: str, stdin: str = "") -> list[Any]:
    """Lines of JSON that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_classes_load_where_their_modules_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "userpackage"
    package.mkdir()
    for name, text in USER_PACKAGE.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("userpackage.mine")
    (from_main,) = python(FROM_MAIN)
    start = 3

    class Local:
        def __call__(self, logits: torch.Tensor, params: Any) -> torch.Tensor:
            logits[:, :start] = -math.inf
            return logits

    processors = [
        allowed_tokens([2]),
        user_processor(Force, {"token": 4}),
        user_processor(mine.Mine, {"token": 5}),
        user_processor(Local),
    ]
    sent = [{"serialized": p.serialized, "params": p.params} for p in processors] + [from_main]
    got = python(ELSEWHERE, "\n".join(json.dumps(line) for line in sent))
    assert got == [[ids, None] for ids in ([2], [4], [5], [3, 4, 5, 6, 7], [6])]
    assert cloudpickle.list_registry_pickle_by_value() == set()


class NeedsArgument(Force):
    """Can't be made without one."""

    def __init__(self, token: int) -> None:
        self.token = token


class TakesOne:
    """Called with too little."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


LOCK = threading.Lock()


class UsesLock(Force):
    """What can't be pickled."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        with LOCK:
            return logits


class Large(Force):
    """Too large to go with every request."""

    table = bytes(2**20)


@pytest.mark.parametrize(
    ("cls", "params", "match"),
    [
        (Force(), {}, "takes a class"),
        (dict, {}, "needs a method __call__"),
        (NeedsArgument, {}, "made without arguments.*token"),
        (TakesOne, {}, r"called with \(logits, params\)"),
        (UsesLock, {}, "can't be sent to the server.*lock"),
        (Large, {}, "takes 1.0 MiB"),
        (Force, {"token": {1, 2}}, "are no JSON"),
        (Force, {"token": math.nan}, "are no JSON"),
        (Force, {1: 2}, "strings as keys"),
        (Force, [1], "strings as keys"),
        (Force, {"__req__": 1}, "SGLang's own"),
    ],
)
def test_classes_and_params_that_cant_work(cls: Any, params: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        user_processor(cls, params)
    assert cloudpickle.list_registry_pickle_by_value() == set()
