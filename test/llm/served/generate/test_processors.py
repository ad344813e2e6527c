"""Logit processors: what a real server makes of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.processors import Force, NaNRow, NothingLeft, NotMade, Raising
from helpers.servers import CPU_SERVER_ARGS, asked, told
from torchrl_sglang import AsyncSGLang, Timeouts
from torchrl_sglang.errors import RequestRefusedError
from torchrl_sglang.generate.processors.make import (
    allowed_tokens,
    combined,
    disallowed_tokens,
    progress_temperature,
    user_processor,
)
from torchrl_sglang.generate.request import LogitProcessor


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


@pytest.mark.slow
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
