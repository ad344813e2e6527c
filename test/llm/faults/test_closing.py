"""However a script with a weight sync ends, it ends by itself: no signal, nothing said in vain."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import keys_of, ready_weights
from torchrl_sglang import AsyncSGLang
from torchrl_sglang.servers.control import GIVING

pytestmark = pytest.mark.slow

INIT = "/init_weights_update_group"


# Forks for each case, so that the imports are paid once; each fork ends as a script does.
SCRIPT = """
import gc, json, os, sys, time
import torch
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, Timeouts, WeightSyncConfig
from torchrl_sglang.sync import sender
from torchrl_sglang.weights.source import merged  # what a first connection would import
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)  # a fork has none of the threads that would compute along
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
gc.freeze()  # what the imports made is not looked through once more in every fork
for case in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        break
    start = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, time.monotonic() - start)
    print("=" * 80, file=sys.stderr, flush=True)
else:
    sys.exit(0)

timeouts = Timeouts(step_s=5.0, group_s=2.0)
service = AsyncSGLang.connect(case["url"], timeouts=timeouts, **case["keys"])
scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(**case["config"]))
exec(case["code"])
"""


@dataclass
class Case:
    """How a script ends.

    Attributes:
        code: what it does with its scheme.
        faults: what the server does, by route.
        config: the scheme's.
        keys: that differ from the right ones.
        error: the last line that it says; empty if it ends well.
    """

    code: str = "scheme.connect()"
    faults: dict[str, Fault] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    error: str = "PushError"


INTERRUPTED = """
import signal
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 1.0)
scheme.push(model)
"""

PUSHED = "scheme.push(model)"


CASES = {
    "a wrong key": Case(keys={"admin_api_key": "wrong"}),
    "joining is refused": Case(faults={INIT: Fault(status=400)}),
    "the server dies as it joins": Case(faults={INIT: Fault(cut=True)}),
    "it joins and does not say so": Case(faults={INIT: Fault(lose=True)}),
    "no answer to joining": Case(faults={INIT: Fault(delay_s=30.0)}, error="PushTimeoutError"),
    "Ctrl-C while it joins": Case(
        INTERRUPTED, {INIT: Fault(delay_s=30.0)}, error="KeyboardInterrupt"
    ),
    "Ctrl-C in the transfer": Case(
        INTERRUPTED, {GIVING["announce"]: Fault(delay_s=30.0, after=1)}, error="KeyboardInterrupt"
    ),
    "a bucket is refused": Case(PUSHED, {GIVING["announce"]: Fault(status=400, after=1)}),
    "a push still under way": Case(PUSHED, config={"non_blocking": True}, error=""),
    "a push under way, which fails": Case(
        PUSHED,
        {GIVING["announce"]: Fault(delay_s=0.5, cut=True, after=1)},
        {"non_blocking": True},
        error="",
    ),
    "connected, and left so": Case(error=""),
    "never connected": Case("pass", error=""),
    "never connected, in a cycle": Case("scheme.itself = scheme", error=""),
}


CODES = {"": 0, "KeyboardInterrupt": -signal.SIGINT}  # as Python ends by itself


@dataclass
class Ended:
    code: int
    after_s: float
    said: str
    asked: list[str]


@pytest.fixture(scope="module")
def ended(shared_service: AsyncSGLang, model_path: Path) -> Iterator[dict[str, Ended]]:
    """How each of the cases ended."""
    keys = keys_of(shared_service)
    with ExitStack() as stack:
        stack.callback(ready_weights, shared_service, model_path)  # some leave it paused
        proxies = {}
        for name, case in CASES.items():
            proxies[name] = stack.enter_context(FaultProxy(shared_service.workers[0].url))
            proxies[name].faults.update(case.faults)
        told = [
            {
                "url": proxies[name].url,
                "keys": {**keys, **case.keys},
                "config": case.config,
                "code": case.code,
            }
            for name, case in CASES.items()
        ]
        command = [sys.executable, "-c", SCRIPT, json.dumps(told), str(model_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300.0, check=False)
        assert done.returncode == 0, done.stderr
        codes = [line.split() for line in done.stdout.splitlines()]
        said = done.stderr.split("=" * 80 + "\n")
        yield {
            name: Ended(int(code), float(s), text, [path for path, _ in proxies[name].seen])
            for name, (code, s), text in zip(CASES, codes, said, strict=False)
        }


@pytest.mark.parametrize("name", CASES)
def test_a_script_ends_by_itself(ended: dict[str, Ended], name: str) -> None:
    case, end = CASES[name], ended[name]
    assert end.code == CODES.get(case.error, 1), end.said
    assert "terminate called" not in end.said
    assert "Exception ignored" not in end.said
    if case.error:  # torch may have more to say after the traceback
        assert f"errors.{case.error}: " in end.said or case.error in end.said.splitlines()
    else:
        assert not end.said


def test_a_wrong_key_is_known_before_anybody_joins(ended: dict[str, Ended]) -> None:
    assert "answered 401" in ended["a wrong key"].said
    assert INIT not in ended["a wrong key"].asked
    assert INIT in ended["joining is refused"].asked


def test_a_push_under_way_goes_on_to_its_end(ended: dict[str, Ended]) -> None:
    assert ended["a push still under way"].asked[-1] == "/continue_generation"


def test_nothing_is_waited_for_in_vain(ended: dict[str, Ended]) -> None:
    """The bounds of joining, and what an exit takes on a busy machine."""
    late = {name: end.after_s for name, end in ended.items() if end.after_s > 20.0}
    assert not late
