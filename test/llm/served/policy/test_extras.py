"""What comes back beside tokens and log-probs: why a row ended, which weights, and extras."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from helpers.behaviour import chosen, full_log_probs, hf_logits
from helpers.rows import rows_of, shaped
from helpers.servers import (
    asked,
    hf_log_probs,
    needs,
    needs_version_spans,
    perturb,
    ready_weights,
    told,
    wait_until,
)
from torchrl_sglang import AsyncSGLang, GenerateRequest, SGLangWeightSyncScheme, SGLangWrapper
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError
from torchrl_sglang.generate.request import Returns

PROMPTS = [[5, 6, 7, 8], [20, 21], [9, 40, 41, 42, 43, 44], [99]]

QUESTIONS = ["the quick", "hello", "a policy acts", "no"]

SAMPLING = {"max_new_tokens": 5, "ignore_eos": True}

SHAPES = [(), (4,), (2, 2)]

MODES = ["history", "text", "tokens"]

EOS = 2


def make_input(mode: str = "tokens", shape: tuple[int, ...] = (4,)) -> Any:
    if mode == "history":
        histories = History.from_chats([[{"role": "user", "content": q}] for q in QUESTIONS])
        rows = [
            TensorDict(history=ChatHistory(prompt=history, batch_size=()), batch_size=())
            for history in histories
        ]
    elif mode == "text":
        rows = [TensorDict(text=Text(prompt=q, batch_size=()), batch_size=()) for q in QUESTIONS]
    else:
        rows = [
            TensorDict(tokens=Tokens(prompt=torch.tensor(ids), batch_size=()), batch_size=())
            for ids in PROMPTS
        ]
    return shaped(rows, shape)


def make_policy(service: AsyncSGLang, **kwargs: Any) -> SGLangWrapper:
    options = {"input_mode": "tokens", "inplace": False, **kwargs}
    options["generate_kwargs"] = {**SAMPLING, **kwargs.get("generate_kwargs", {})}
    return SGLangWrapper(service, **options)


def parts(row: Any) -> tuple[list[int], list[int]]:
    """Prompt and response of a row, without padding."""
    attended, sampled = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
    full = row["tokens"].full
    return full[attended & ~sampled].tolist(), full[sampled].tolist()


@pytest.fixture
def call_weights(service: AsyncSGLang) -> Iterator[Callable[[str], None]]:
    """Gives the server's weights another version; they have their own again afterwards."""
    worker = service.workers[0]
    before = asked(worker, "/model_info")["weight_version"]

    def call(version: str) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        told(worker, "/update_weight_version", body)

    yield call
    call(before)


@pytest.mark.parametrize("num_samples", [None, 2], ids=["one", "two samples"])
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_facts_in_every_mode_layout_and_shape(
    service: AsyncSGLang,
    call_weights: Callable[[str], None],
    mode: str,
    shape: tuple[int, ...],
    pad_output: bool,
    num_samples: int | None,
) -> None:
    call_weights("7")
    td = make_input(mode, shape)
    rows = [td] if not shape else list(td.reshape(-1).unbind(0))
    for row in rows[::2]:  # every other row ends after its first token
        options = TensorDict(batch_size=()).set_non_tensor("logit_bias", {EOS: 100.0})
        row.set("sampling", options.set("ignore_eos", torch.tensor(False)))
    td = rows[0] if not shape else lazy_stack(rows).reshape(shape)
    policy = make_policy(service, input_mode=mode, pad_output=pad_output, num_samples=num_samples)
    out = policy(td)
    info = out["rollout"]
    assert info.batch_size == out.batch_size == (*shape, *([num_samples] if num_samples else []))
    for index, row in enumerate(rows_of(out)):
        stopped = (index // (num_samples or 1)) % 2 == 0
        facts, sampled = row["rollout"], row["masks"].all_assistant_mask
        assert set(facts.keys()) == {"finish_reason", "weight_version", "policy_version"}
        assert facts["finish_reason"] == ("stop" if stopped else "length")
        assert sampled.sum() == (1 if stopped else 5)
        assert facts["weight_version"].dtype == facts["policy_version"].dtype == torch.int64
        assert facts["weight_version"] == 7
        assert facts["policy_version"].tolist() == torch.where(sampled, 7, -1).tolist()


@pytest.mark.parametrize(("name", "number"), [("default", 0), ("12", 12), ("a-name", -1)])
def test_versions_as_numbers(
    service: AsyncSGLang, call_weights: Callable[[str], None], name: str, number: int
) -> None:
    """0 for the weights that the server loaded itself, -1 for what is no number."""
    call_weights(name)
    out = make_policy(service)(make_input())
    assert out["rollout"]["weight_version"].tolist() == [number] * 4


@pytest.mark.parametrize("num_samples", [None, 2], ids=["one", "two samples"])
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_log_probs(
    service: AsyncSGLang, model: Any, pad_output: bool, num_samples: int | None, temperature: float
) -> None:
    """The most likely tokens of the distribution after the temperature, the likeliest first."""
    policy = make_policy(
        service,
        extras={"top_log_probs": 4},
        pad_output=pad_output,
        num_samples=num_samples,
        generate_kwargs={"temperature": temperature},
    )
    for row in rows_of(policy(make_input())):
        prompt, response = parts(row)
        tops, ids = row["rollout"]["top_log_probs"], row["rollout"]["top_token_ids"]
        assert (tops.dtype, ids.dtype) == (torch.float32, torch.int64)
        assert tops.shape == ids.shape == (5, 4)
        scores = full_log_probs(hf_logits(model, prompt, response), response, policy.sampling)
        torch.testing.assert_close(tops, scores.gather(-1, ids), atol=0.02, rtol=0)
        torch.testing.assert_close(tops, scores.topk(4).values, atol=0.02, rtol=0)
        assert all(len(set(row_ids)) == 4 for row_ids in ids.tolist())


def test_top_log_probs_beside_a_grammar(service: AsyncSGLang) -> None:
    """What can't come has probability 0."""
    policy = make_policy(
        service,
        extras={"top_log_probs": 3},
        generate_kwargs={"regex": "ab", "ignore_eos": False},
    )
    for row in rows_of(policy(make_input())):
        tops = row["rollout"]["top_log_probs"]
        assert tops[-1].exp().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("num_samples", [None, 2], ids=["one", "two samples"])
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_input_log_probs(
    service: AsyncSGLang, model: Any, pad_output: bool, num_samples: int | None
) -> None:
    """They stand where prompts have their log-probs, at temperature 1; the first is NaN."""
    policy = make_policy(
        service,
        extras=["input_log_probs", "cached_tokens"],
        pad_output=pad_output,
        num_samples=num_samples,
        generate_kwargs={"temperature": 2.0},
    )
    for row in rows_of(policy(make_input())):
        prompt, response = parts(row)
        attended, sampled = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
        log_probs = row["log_probs"]
        scores = log_probs.full[attended & ~sampled]
        assert scores.isnan().tolist() == [True] + [False] * (len(prompt) - 1)
        expected = torch.tensor(hf_log_probs(model, prompt[:1], prompt[1:]))
        torch.testing.assert_close(scores[1:], expected, atol=0.02, rtol=0)
        torch.testing.assert_close(
            log_probs.prompt[-len(prompt) :], scores, atol=0, rtol=0, equal_nan=True
        )
        assert log_probs.prompt[: -len(prompt)].isnan().all()
        behaviour = torch.tensor(hf_log_probs(model, prompt, response, temperature=2.0))
        torch.testing.assert_close(log_probs.response[:5], behaviour, atol=0.02, rtol=0)
        assert row["rollout"]["cached_tokens"] == 0  # all of the prompt is computed for it


def test_cached_tokens_request_id_and_latency(service: AsyncSGLang) -> None:
    policy = make_policy(service, extras=["cached_tokens", "request_id", "latency"])
    seen: list[GenerateRequest] = []
    generator = service._local.generator
    check = generator.check
    generator.check = lambda batch: (seen.extend(batch), check(batch))[1]  # type: ignore[method-assign]
    try:
        start = time.monotonic()
        policy(make_input())
        out = policy(make_input())
        seconds = time.monotonic() - start
    finally:
        del generator.check
    rollout = out["rollout"]
    assert rollout["cached_tokens"].tolist() == [len(prompt) - 1 for prompt in PROMPTS]
    assert rollout["cached_tokens"].dtype == torch.int64
    assert [row["rollout"]["request_id"] for row in rows_of(out)] == [r.rid for r in seen[4:]]
    assert rollout["latency_s"].dtype == torch.float32
    assert (rollout["latency_s"] > 0).all()
    assert (rollout["latency_s"] < seconds).all()


def test_all_that_the_shared_server_has_at_once(service: AsyncSGLang, tokenizer: Any) -> None:
    """Extras do not get into each other's way, nor do padding and several samples."""
    needs(service, "sampling_mask_tokens")
    extras = {
        "top_log_probs": 2,
        "input_log_probs": True,
        "sampling_mask": True,
        "cached_tokens": True,
        "request_id": True,
        "latency": True,
        "hidden_states": False,
    }
    policy = make_policy(
        service,
        extras=extras,
        pad_output=True,
        num_samples=2,
        log_probs_mode="corrected",
        generate_kwargs={"top_k": 3, "temperature": 2.0},
        rollout_key=("agent", "info"),
    )
    assert ("agent", "info") in policy.out_keys
    out = policy(make_input(shape=(2, 2)))
    rows = rows_of(out)
    assert len({row["agent", "info", "request_id"] for row in rows}) == 8
    for row in rows:
        info = row["agent", "info"]
        assert set(info.keys()) == {
            "finish_reason",
            "weight_version",
            "policy_version",
            "top_log_probs",
            "top_token_ids",
            "sampling_mask_ids",
            "sampling_mask_offsets",
            "cached_tokens",
            "request_id",
            "latency_s",
        }
        assert torch.equal(
            info["top_token_ids"].sort().values,
            info["sampling_mask_ids"].view(5, 3)[:, :2].sort().values,
        )


@pytest.mark.parametrize("num_samples", [None, 2], ids=["one", "two samples"])
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_hidden_states(
    special_service: AsyncSGLang, model: Any, pad_output: bool, num_samples: int | None
) -> None:
    """What each token was sampled from, also where the prompt's prefix was cached."""
    needs(special_service, "hidden_states")
    policy = make_policy(
        special_service,
        extras=["hidden_states", "cached_tokens"],
        pad_output=pad_output,
        num_samples=num_samples,
        generate_kwargs={"temperature": 3.0},  # so that no token comes twice
    )
    first = 20 * (num_samples or 1) + 10 * pad_output  # prompts that are new here
    new = [torch.arange(n) + first + at for n, at in [(3, 100), (1, 200), (7, 300)]]
    td = lazy_stack(
        [TensorDict(tokens=Tokens(prompt=ids, batch_size=()), batch_size=()) for ids in new]
    )
    for cached in (num_samples is not None, True):
        out = policy(td)
        for row in rows_of(out):
            prompt, response = parts(row)
            states = row["rollout"]["hidden_states"]
            assert row["rollout"]["cached_tokens"] == (len(prompt) - 1 if cached else 0)
            assert (states.dtype, states.shape) == (torch.float32, (5, 128))
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *response]])
                expected = model.model(ids).last_hidden_state[0].float()
            before = expected[len(prompt) - 1 : -1]
            torch.testing.assert_close(states, before, atol=0.3, rtol=0)  # bf16, up to 11
            scores = (states @ model.lm_head.weight.float().T / 3).log_softmax(-1)
            torch.testing.assert_close(
                chosen(scores, response), row["log_probs"].response[:5], atol=0.05, rtol=0
            )


@pytest.mark.slow
def test_hidden_states_when_weights_are_pushed_in_mid_generation(
    special_service: AsyncSGLang, model: Any, model_path: Path
) -> None:
    """Rows are retracted and computed anew; each token keeps the state that it was sampled from."""
    needs(special_service, "hidden_states")
    needs_version_spans(special_service)  # they tell which tokens are old
    policy = make_policy(
        special_service,
        extras=["hidden_states"],
        generate_kwargs={"max_new_tokens": 400, "temperature": 3.0},
    )
    scheme = SGLangWeightSyncScheme(special_service)
    scheme.init_on_sender()
    scheme.connect()
    try:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(policy, make_input())
            load = special_service.workers[0]
            wait_until(lambda: asked(load, "/v1/loads")["loads"][0]["num_running_reqs"] == 4)
            scheme.send(perturb(model, seed=41))
            version = scheme.last_push.version  # type: ignore[union-attr]
            out = call.result(60.0)
    finally:
        scheme.close()
        ready_weights(special_service, model_path)
    for row in rows_of(out):
        prompt, response = parts(row)
        states = row["rollout"]["hidden_states"]
        assert states.shape == (400, 128)
        versions = row["rollout"]["policy_version"][len(prompt) :].tolist()
        assert versions[-1] == version
        switch = versions.index(version)
        assert switch > 0
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response]])
            expected = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1].float()
        torch.testing.assert_close(states[switch:], expected[switch:], atol=0.3, rtol=0)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ("hidden_states", "enable_return_hidden_states=True"),
        ("routed_experts", "mixture-of-experts"),
    ],
)
def test_what_the_server_was_not_started_for(service: AsyncSGLang, extra: str, match: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=match):
        make_policy(service, extras=[extra])(make_input())
    request = GenerateRequest(input_ids=(5, 6), returns=Returns(**{extra: True}))
    with pytest.raises(UnsupportedOptionError, match=match):
        service.generate(request)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"extras": ["latencies"]}, "known are .*latency"),
        ({"extras": ["top_log_probs"]}, "say how many"),
        ({"extras": {"top_log_probs": True}}, "say how many"),
        ({"extras": {"top_log_probs": -1}}, "number"),
        ({"extras": {"top_log_probs": 2.0}}, "number"),
        ({"extras": {"top_log_probs": 513}}, "512 tokens"),
        ({"extras": ["latency"], "rollout_key": None}, "rollout_key=None"),
        ({"extras": ["input_log_probs"], "log_probs_key": None}, "log_probs_key=None"),
        ({"extras": ["input_log_probs"], "return_log_probs": False}, "return_log_probs=False"),
    ],
    ids=str,
)
def test_extras_that_can_not_be(service: AsyncSGLang, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_policy(service, **kwargs)


def test_no_rollout_key(service: AsyncSGLang) -> None:
    policy = make_policy(service, rollout_key=None, extras=["input_log_probs"])
    out = policy(make_input())
    assert set(out.keys()) == {"text", "tokens", "masks", "log_probs"}
    assert (out[0]["log_probs"].prompt[1:] < 0).all()
