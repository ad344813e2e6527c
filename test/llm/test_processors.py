"""Logit processors: what travels, what it does to logits, and what a real server makes of it."""

from __future__ import annotations

import ast
import importlib
import json
import math
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import dill
import numpy as np
import pytest
import torch
from helpers.servers import CPU_SERVER_ARGS, asked, told

from torchrl_sglang import AsyncSGLang, Timeouts
from torchrl_sglang.errors import ConfigError, InputError, RequestRefusedError
from torchrl_sglang.generate.processors.make import (
    allowed_tokens,
    combined,
    disallowed_tokens,
    progress_temperature,
    user_processor,
)
from torchrl_sglang.generate.processors.remote import num_generated
from torchrl_sglang.generate.processors.ship import SERVED
from torchrl_sglang.generate.request import LogitProcessor

VOCAB = 8
INF = math.inf


# Classes as a user writes them.


class Force:
    """Only ``params["token"]`` can be sampled."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        forced = torch.full_like(logits, -math.inf)
        tokens = torch.tensor([row["token"] for row in params])
        return forced.scatter_(1, tokens[:, None], 0.0)


class CountRows:
    """Samples the number of rows of the batch that have this class."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        logits.fill_(-math.inf)[:, len(params)] = 0.0
        return logits


class CountSteps:
    """Samples how often the request was here, from what it keeps with the request."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        logits.fill_(-math.inf)
        for row, own in zip(logits, params, strict=True):
            own["seen"] = own.get("seen", 0) + 1
            row[own["seen"]] = 0.0
        return logits


class CountOutput:
    """Samples how many output ids SGLang's request has."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        logits.fill_(-math.inf)
        for row, own in zip(logits, params, strict=True):
            row[len(own["__req__"].output_ids)] = 0.0
        return logits


class Raising:
    """A bug."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        raise KeyError("missing")


class NaNRow:
    """NaN in the rows that ask for it."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        for row, own in zip(logits, params, strict=True):
            if own["nan"]:
                row[3] = math.nan
        return logits


class NothingLeft:
    """Every logit is -inf."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        return torch.full_like(logits, -math.inf)


class Reduced:
    """Another shape than the logits'."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        return logits[:, :2]


class NotMade:
    """An ``__init__`` that fails, on the server."""

    def __init__(self) -> None:
        raise OSError("no such table")

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        return logits


# Without a server: a stand-in for SGLang's request, and its way of loading a processor.


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's module of finish reasons, which the server's process has loaded."""
    module = SimpleNamespace(FINISH_ABORT=lambda *args: args)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", module)


def load(processor: LogitProcessor) -> Any:
    """As SGLang's ``CustomLogitProcessor.from_str``."""
    return dill.loads(bytes.fromhex(json.loads(processor.serialized)["callable"]))()


def fake_req(generated: int = 0, temperature: float = 1.0) -> Any:
    return SimpleNamespace(
        origin_input_ids=[1, 2, 3],
        output_ids=[0] * max(generated - 1, 0),  # as in the overlapped schedule
        kv=SimpleNamespace(kv_committed_len=3 + generated),
        sampling_params=SimpleNamespace(temperature=temperature),
        to_finish=None,
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kv_committed_len": 5}, 2),  # SGLang 0.5.15
        ({"kv_committed_len": 5, "kv": SimpleNamespace(kv_allocated_len=9)}, 2),  # 0.5.17
        ({"kv_committed_len": 5, "kv": None}, 2),
        ({"kv": SimpleNamespace(kv_committed_len=5)}, 2),  # 0.5.23
        ({"kv": SimpleNamespace(kv_committed_len=2)}, 0),
        ({}, 1),
    ],
)
def test_generated_tokens_are_counted_from_the_cache(fields: Any, expected: int) -> None:
    req = SimpleNamespace(origin_input_ids=[1, 2, 3], output_ids=[0], **fields)
    assert num_generated(req) == expected


def rows_of(processors: Sequence[LogitProcessor], reqs: Sequence[Any]) -> list[dict[str, Any]]:
    """The ``custom_param_list`` after it went through JSON."""
    return [
        {**json.loads(json.dumps(p.params)), "__req__": req}
        for p, req in zip(processors, reqs, strict=True)
    ]


def run(processors: Sequence[LogitProcessor], logits: torch.Tensor, reqs: Any = None) -> Any:
    """One step of rows that share a processor's text."""
    assert len({p.serialized for p in processors}) == 1
    reqs = reqs or [fake_req() for _ in processors]
    return load(processors[0])(logits, rows_of(processors, reqs))


def open_ids(processor: LogitProcessor, vocab: int = VOCAB) -> list[int]:
    return torch.isfinite(run([processor], torch.randn(1, vocab))[0]).nonzero().flatten().tolist()


MASK = torch.tensor([False, True, False, True])


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (allowed_tokens([1, 3]), [1, 3]),
        (allowed_tokens({3, 1}), [1, 3]),
        (allowed_tokens(range(1, 4, 2)), [1, 3]),
        (allowed_tokens(np.array([1, 3])), [1, 3]),
        (allowed_tokens(torch.tensor([3, 1, 1])), [1, 3]),
        (allowed_tokens(MASK), [1, 3]),
        (allowed_tokens(MASK.numpy()), [1, 3]),
        (allowed_tokens([0]), [0]),
        (allowed_tokens([7, VOCAB, 10**6]), [7]),
        (disallowed_tokens([1, 3]), [0, 2, 4, 5, 6, 7]),
        (disallowed_tokens(MASK), [0, 2, 4, 5, 6, 7]),
        (disallowed_tokens([]), list(range(VOCAB))),
        (disallowed_tokens([10**6]), list(range(VOCAB))),
        (combined(allowed_tokens([1, 3, 6]), disallowed_tokens([3])), [1, 6]),
    ],
)
def test_what_a_mask_leaves(processor: LogitProcessor, expected: list[int]) -> None:
    assert open_ids(processor) == expected


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: allowed_tokens([]), InputError, "no id is left"),
        (lambda: allowed_tokens(torch.zeros(5, dtype=torch.bool)), InputError, "no id is left"),
        (lambda: allowed_tokens(torch.zeros(0, dtype=torch.long)), InputError, "no id is left"),
        (lambda: disallowed_tokens(torch.ones(5, dtype=torch.bool)), InputError, "every id"),
        (
            lambda: combined(allowed_tokens([1, 2]), disallowed_tokens([1, 2])),
            InputError,
            "exclude each other",
        ),
        (lambda: combined(allowed_tokens([1]), allowed_tokens([2])), InputError, "exclude"),
        (lambda: allowed_tokens([-1]), InputError, "-1 is no token id"),
        (lambda: allowed_tokens([2**40]), InputError, "is no token id"),
        (lambda: allowed_tokens([True, False]), ConfigError, "bool tensor"),
        (lambda: allowed_tokens([1.0]), ConfigError, "1.0 is no token id"),
        (lambda: allowed_tokens("1 2"), ConfigError, "sequence of integers"),
        (lambda: allowed_tokens(3), ConfigError, "sequence of integers"),
        (lambda: allowed_tokens(torch.zeros(2, 5, dtype=torch.bool)), ConfigError, "1-D"),
        (lambda: allowed_tokens(torch.zeros(5)), ConfigError, "torch.float32"),
        (lambda: progress_temperature(0.0, 1.0, 5), ConfigError, "start=0.0"),
        (lambda: progress_temperature(1.0, math.nan, 5), ConfigError, "end=nan"),
        (lambda: progress_temperature(1.0, 1.0, 0), ConfigError, "over_tokens=0"),
        (lambda: progress_temperature(1.0, 1.0, 1.5), ConfigError, "over_tokens=1.5"),
        (lambda: combined(), ConfigError, "at least one"),
        (
            lambda: combined(LogitProcessor(serialized="x", params={})),
            ConfigError,
            "argument 0 is a LogitProcessor",
        ),
        (
            lambda: combined(*[progress_temperature(1.0, 0.5, 5)] * 2),
            ConfigError,
            "one progress_temperature",
        ),
    ],
)
def test_refused_at_once(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("processor", "smallest"),
    [
        (allowed_tokens([5, 9]), 6),
        (disallowed_tokens([0, 1]), 3),
        (disallowed_tokens([3]), 1),
        (combined(allowed_tokens([5, 9]), disallowed_tokens([5])), 10),
        (combined(disallowed_tokens([0]), disallowed_tokens([1, 2])), 4),
        (progress_temperature(1.0, 0.5, 5), 1),
    ],
)
def test_smallest_vocabulary(processor: Any, smallest: int) -> None:
    assert processor.min_vocab_size == smallest
    assert open_ids(processor, smallest) != []


def test_rows_have_masks_of_their_own() -> None:
    processors = [allowed_tokens([1, 2]), allowed_tokens([2, 3]), disallowed_tokens([0])]
    logits = torch.randn(3, VOCAB)
    result = run(processors, logits.clone())
    for row, processor in enumerate(processors):
        ids = open_ids(processor)
        assert torch.isfinite(result[row]).nonzero().flatten().tolist() == ids
        assert torch.equal(result[row, ids], logits[row, ids])


def test_a_mask_wins_over_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2:] = -INF
    probs = run([allowed_tokens([2, 3])], logits.clone()).softmax(-1)
    assert probs[0].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    probs = run([allowed_tokens([1, 2, 3])], logits.clone()).softmax(-1)
    assert probs[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_two_masks_and_a_penalty() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = -INF
    both = combined(allowed_tokens([1, 2]), disallowed_tokens([1]))
    assert run([both], logits).softmax(-1)[0, 2] == 1


@pytest.mark.parametrize(
    ("generated", "expected"), [(0, 2.0), (1, 1.75), (4, 1.0), (6, 0.5), (9, 0.5)]
)
@pytest.mark.parametrize("own", [1.0, 0.5])
def test_the_temperature_moves(generated: int, expected: float, own: float) -> None:
    logits = torch.randn(1, VOCAB)
    reqs = [fake_req(generated, own)]
    result = run([progress_temperature(2.0, 0.5, 6)], logits.clone(), reqs)
    torch.testing.assert_close(result / own, logits / expected)


def test_rows_have_temperatures_of_their_own() -> None:
    logits = torch.randn(3, VOCAB)
    processors = [progress_temperature(t, 2 * t, 4) for t in (0.5, 1.0, 2.0)]
    result = run(processors, logits.clone(), [fake_req(k) for k in (0, 2, 4)])
    torch.testing.assert_close(result, logits / torch.tensor([[0.5], [1.5], [4.0]]))


def test_combined_applies_in_order() -> None:
    both = combined(user_processor(Force, {"token": 5}), allowed_tokens([1]))
    assert torch.isfinite(run([both], torch.randn(1, VOCAB))).nonzero().tolist() == []
    flipped = combined(allowed_tokens([1]), user_processor(Force, {"token": 5}))
    assert open_ids(flipped) == [5]


def test_equal_masks_are_one_tensor_for_as_long_as_they_are_used() -> None:
    from torchrl_sglang.generate.processors import remote as served

    pipeline = served.processor(["tokens"])()
    processors = [allowed_tokens([1, 2]), allowed_tokens([1, 2]), allowed_tokens([3])]
    rows = rows_of(processors, [fake_req() for _ in processors])
    before = len(served._MASKS)
    for _ in range(2):
        pipeline(torch.randn(3, VOCAB), rows)
        assert len(served._MASKS) == before + 2
    assert rows[0]["__opened__"][0] is rows[1]["__opened__"][0]
    del rows
    assert len(served._MASKS) == before


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


def test_processors_can_be_pickled_and_compared() -> None:
    made = combined(allowed_tokens([1, 2]), progress_temperature(1.0, 0.5, 5))
    assert pickle.loads(pickle.dumps(made)) == made
    assert repr(made) == "StagedProcessor(tokens, temperature)"


# What goes wrong on the server ends the requests concerned, and nothing else.


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Raising, "KeyError: 'missing'"),
        (Reduced, r"it has to return logits of shape \(2, 8\), and returned \(2, 2\)"),
        (NotMade, "OSError: no such table"),
        (NothingLeft, "no finite logit"),
    ],
)
def test_a_failing_class_ends_its_requests(cls: type, message: str, finished: None) -> None:
    reqs = [fake_req(), fake_req()]
    result = run([user_processor(cls)] * 2, torch.randn(2, VOCAB), reqs)
    assert torch.isfinite(result).all()
    for req in reqs:
        said, status, _ = req.to_finish
        assert status == 400
        assert re.search(message, said), said


def test_a_bad_row_ends_its_own_request_alone(finished: None) -> None:
    reqs = [fake_req(), fake_req()]
    logits = torch.randn(2, VOCAB)
    processors = [user_processor(NaNRow, {"nan": nan}) for nan in (True, False)]
    result = run(processors, logits.clone(), reqs)
    assert "NaN" in reqs[0].to_finish[0]
    assert reqs[1].to_finish is None
    assert torch.isfinite(result[0]).all()
    assert torch.equal(result[1], logits[1])


def test_a_mask_outside_of_the_vocabulary_ends_its_own_request_alone(finished: None) -> None:
    reqs = [fake_req(), fake_req()]
    result = run([allowed_tokens([VOCAB]), allowed_tokens([2])], torch.randn(2, VOCAB), reqs)
    assert "none of the allowed ids is in the model's vocabulary (8)" in reqs[0].to_finish[0]
    assert reqs[1].to_finish is None
    assert torch.isfinite(result[0]).all()
    assert torch.isfinite(result[1]).nonzero().flatten().tolist() == [2]


def test_parameters_that_a_router_dropped() -> None:
    with pytest.raises(RuntimeError, match="without custom_params"):
        load(allowed_tokens([1]))(torch.randn(1, VOCAB), [None])


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
for name in ("torchrl_sglang", "torchrl", "tensordict", "userpackage", "test_processors"):
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


# With a server. Its schedule is the overlapped one, as on a GPU.


@pytest.fixture(scope="module")
def serving(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    with AsyncSGLang.from_pretrained(
        str(model_path),
        device="cpu",
        timeouts=timeouts,
        enable_custom_logit_processor=True,
        disable_overlap_schedule=False,
        **CPU_SERVER_ARGS,
    ) as service:
        yield service


@dataclass(frozen=True)
class Sampled:
    output_ids: list[int]
    log_probs: list[float]


def generate(
    service: AsyncSGLang,
    prompts: Sequence[Sequence[int]],
    processors: Sequence[LogitProcessor | None],
    **sampling: Any,
) -> list[Sampled]:
    """All at once, a request for each prompt."""

    def one(prompt: Sequence[int], processor: LogitProcessor | None) -> Sampled:
        params = {"max_new_tokens": 40, "ignore_eos": True, **sampling}
        body: dict[str, Any] = {"input_ids": list(prompt), "return_logprob": True}
        if processor is not None:
            body["custom_logit_processor"] = processor.serialized
            params["custom_params"] = dict(processor.params)
        body["sampling_params"] = params
        rows = told(service.workers[0], "/generate", body, timeout_s=60.0)["meta_info"][
            "output_token_logprobs"
        ]
        return Sampled([row[1] for row in rows], [row[0] for row in rows])

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts, processors))


@torch.no_grad()
def hf_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Logits that each token of the response was sampled from, float32 ``(tokens, vocab)``."""
    ids = torch.tensor([[*prompt, *response]])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return hidden.float() @ model.lm_head.weight.float().T


def worst(
    model: Any, prompt: Sequence[int], sampled: Sampled, change: Callable[[torch.Tensor], Any]
) -> float:
    """Largest difference between the reported log-probs and those of the changed logits."""
    logits = change(hf_logits(model, prompt, sampled.output_ids))
    ids = torch.tensor(sampled.output_ids)
    ours = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    return (ours - torch.tensor(sampled.log_probs)).abs().max().item()


# bf16's noise, which these tests' lowest temperature doubles.
NOISE_AT_HALF = 0.02 / 0.5


def tempered(logits: torch.Tensor, start: float, end: float, over_tokens: int) -> torch.Tensor:
    progress = torch.arange(len(logits)).div(over_tokens).clamp(max=1.0)
    return logits / (start + (end - start) * progress)[:, None]


def only(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    masked = torch.full_like(logits, -math.inf)
    masked[:, ids] = logits[:, ids]
    return masked


def prompts_of(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, 500, (count, 7), generator=generator).tolist()


# A name, a processor, and what it is to do to logits of one request at temperature 0.8.
IDS, OTHER_IDS = [20, 33, 47, 300, 410], [33, 60, 61, 62]
WITHOUT = list(set(range(512)) - set(IDS))
ROWS: list[tuple[LogitProcessor | None, Callable[[torch.Tensor], torch.Tensor]]] = [
    (None, lambda x: x / 0.8),
    (allowed_tokens(IDS), lambda x: only(x, IDS) / 0.8),
    (allowed_tokens(OTHER_IDS), lambda x: only(x, OTHER_IDS) / 0.8),
    (disallowed_tokens(IDS), lambda x: only(x, WITHOUT) / 0.8),
    (progress_temperature(2.0, 0.5, 30), lambda x: tempered(x, 2.0, 0.5, 30)),
    (progress_temperature(0.7, 1.5, 10), lambda x: tempered(x, 0.7, 1.5, 10)),
    (
        combined(allowed_tokens(IDS), progress_temperature(3.0, 0.5, 20)),
        lambda x: tempered(only(x, IDS), 3.0, 0.5, 20),
    ),
    (user_processor(Force, {"token": 77}), lambda x: only(x * 0, [77])),
    (user_processor(Force, {"token": 78}), lambda x: only(x * 0, [78])),
]


def test_log_probs_are_those_of_the_processed_distribution(
    serving: AsyncSGLang, model: Any
) -> None:
    """A batch of rows with all kinds of processors, each row twice."""
    rows = ROWS * 2
    prompts = prompts_of(len(rows))
    completions = generate(serving, prompts, [processor for processor, _ in rows], temperature=0.8)
    for prompt, completion, (_, change) in zip(prompts, completions, rows, strict=True):
        assert len(completion.output_ids) == 40
        assert worst(model, prompt, completion, change) < NOISE_AT_HALF


def test_rows_of_a_class_are_called_together(serving: AsyncSGLang) -> None:
    processors = [user_processor(CountRows, {"own": index}) for index in range(3)]
    completions = generate(serving, prompts_of(4), [*processors, None], max_new_tokens=400)
    assert {max(c.output_ids) for c in completions[:3]} == {3}


def test_state_is_kept_with_the_request(serving: AsyncSGLang) -> None:
    processors = [user_processor(CountSteps)] * 3
    for completion in generate(serving, prompts_of(3), processors):
        assert completion.output_ids == list(range(1, 41))


def test_output_ids_are_a_token_behind(serving: AsyncSGLang) -> None:
    """Why `num_generated` doesn't count them; a user's class is told."""
    (completion,) = generate(serving, prompts_of(1), [user_processor(CountOutput)])
    assert completion.output_ids == [0, *range(39)]


def test_progress_survives_a_retraction(serving: AsyncSGLang, model: Any) -> None:
    """Frozen half-way and computed anew, as by a weight update."""
    prompts, worker = prompts_of(2), serving.workers[0]
    processor = progress_temperature(2.0, 0.5, 900)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(generate, serving, prompts, [processor] * 2, max_new_tokens=900)
        time.sleep(0.5)
        told(worker, "/pause_generation", {"mode": "retract"})
        assert not waiting.done()
        told(worker, "/continue_generation", {})
        completions = waiting.result(timeout=60.0)
    for prompt, completion in zip(prompts, completions, strict=True):
        error = worst(model, prompt, completion, lambda x: tempered(x, 2.0, 0.5, 900))
        assert error < NOISE_AT_HALF


def test_greedy_stays_greedy(serving: AsyncSGLang, model: Any) -> None:
    (prompt,) = prompts_of(1)
    processors = [allowed_tokens(IDS), progress_temperature(2.0, 0.5, 30)]
    masked, moved = generate(serving, [prompt] * 2, processors, temperature=0.0)
    best = only(hf_logits(model, prompt, masked.output_ids), IDS)
    regret = best.max(-1).values - best.gather(-1, torch.tensor(masked.output_ids)[:, None])[:, 0]
    assert regret.max() < 0.02
    logits = hf_logits(model, prompt, moved.output_ids)
    regret = (
        logits.max(-1).values - logits.gather(-1, torch.tensor(moved.output_ids)[:, None])[:, 0]
    )
    assert regret.max() < 0.02
    assert worst(model, prompt, moved, lambda x: tempered(x, 2.0, 0.5, 30)) < NOISE_AT_HALF


def test_a_mask_beats_min_new_tokens(serving: AsyncSGLang, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    options = {"min_new_tokens": 4, "max_new_tokens": 8, "ignore_eos": False}
    (completion,) = generate(serving, prompts_of(1), [allowed_tokens([eos])], **options)
    assert (completion.output_ids, completion.log_probs) == ([eos], [0.0])


@pytest.mark.parametrize(
    ("processor", "match"),
    [
        (allowed_tokens([600]), r"none of the allowed ids is in the model's vocabulary \(512\)"),
        (user_processor(Raising), "logit processor failed: KeyError: 'missing'"),
        (user_processor(NothingLeft), "no finite logit"),
        (user_processor(NaNRow, {"nan": True}), "NaN"),
        (user_processor(NotMade), "no such table"),
        (user_processor(Force, {"token": 513}), "index 513 is out of bounds"),
        (LogitProcessor(serialized=allowed_tokens([1]).serialized), "KeyError"),
    ],
)
def test_a_failure_is_a_400_and_the_server_lives(
    serving: AsyncSGLang, model: Any, processor: LogitProcessor, match: str
) -> None:
    prompts = prompts_of(2)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(generate, serving, prompts[:1], [allowed_tokens(IDS)])
        with pytest.raises(RequestRefusedError, match=match):
            generate(serving, prompts[1:], [processor])
        (completion,) = beside.result(timeout=60.0)
    assert worst(model, prompts[0], completion, lambda x: only(x, IDS)) < 0.02
    (completion,) = generate(serving, prompts[1:], [None])
    assert worst(model, prompts[1], completion, lambda x: x) < 0.02


def test_the_server_says_that_it_runs_processors(serving: AsyncSGLang) -> None:
    assert asked(serving.workers[0], "/server_info")["enable_custom_logit_processor"] is True
