"""Going on from what an aborted row had."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from helpers.fault_proxy import Fault, FaultProxy
from helpers.marks import IDLE
from helpers.parts import FORGOTTEN, reasons, split
from helpers.rows import rows_of, token_rows
from helpers.servers import Connect, hf_log_probs, needs, needs_version_spans, perturb
from helpers.under_way import once_running, requests_of
from torchrl_sglang import (
    AsyncSGLang,
    SamplingParams,
    SGLangWrapper,
    WeightSyncConfig,
    progress_temperature,
)
from torchrl_sglang.errors import ConfigError, InputError, UnsupportedOptionError
from torchrl_sglang.generate.request import new_rid

pytestmark = IDLE

SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)


# The policy


QUESTIONS = ["the quick", "hello", "a policy acts, the environment answers", "no"]

SAMPLING = {"max_new_tokens": 1900, "ignore_eos": True}


def make_input(mode: str) -> TensorDict:
    if mode == "tokens":
        return token_rows([5, 6, 7], [20, 21], [40, 41, 42, 43], [9])
    if mode == "text":
        rows = [TensorDict(text=Text(prompt=q, batch_size=()), batch_size=()) for q in QUESTIONS]
    else:
        chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
        rows = [
            TensorDict(history=ChatHistory(prompt=h, batch_size=()), batch_size=())
            for h in History.from_chats(chats)
        ]
    return lazy_stack(rows)


def lengths_per_row(*lengths: int) -> TensorDict:
    return TensorDict(max_new_tokens=torch.tensor(lengths), batch_size=len(lengths))


def aborted(policy: Any, td: TensorDict, service: AsyncSGLang, running: int, **kwargs: Any) -> Any:
    """What the policy returns for ``td`` when everything is aborted on its way."""
    future = once_running(service, running, lambda: policy(td, **kwargs))
    service.abort()
    return future.result(20.0)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_resuming(
    service: AsyncSGLang, model: Any, tokenizer: Any, mode: str, pad_output: bool
) -> None:
    """Aborted rows go on from their tokens; the others stay as they are."""
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        generate_kwargs=SAMPLING,
        pad_output=pad_output,
        partial_rollouts=True,
    )
    td = make_input(mode).set("sampling", lengths_per_row(1900, 5, 1900, 12))
    out = aborted(policy, td, service, 2)
    assert reasons(out) == ["abort", "length", "abort", "length"]
    parts = [split(row) for row in rows_of(out)]
    old = [row.clone() for row in rows_of(out)]

    wanted = [len(parts[0][1]) + 7, 5, len(parts[2][1]) + 3, 12]
    out.set("sampling", lengths_per_row(*wanted))
    resumed = policy.resume(out)
    assert resumed is out
    assert reasons(resumed) == ["length"] * 4
    rows = rows_of(resumed)
    for index, (row, (prompt, sampled, scores, versions)) in enumerate(
        zip(rows, parts, strict=True)
    ):
        again, whole, all_scores, all_versions = split(row)
        assert again == prompt
        assert len(whole) == wanted[index]
        assert whole[: len(sampled)] == sampled
        assert all_scores[: len(scores)] == scores
        assert all_versions[: len(versions)] == versions
        assert all_scores == pytest.approx(hf_log_probs(model, prompt, whole), abs=0.02)
        assert row["text"].response == tokenizer.decode(whole)
        if mode == "history":
            content = row["text"].response.removesuffix(tokenizer.eos_token)
            assert row["history"].response.content == [content]
            assert row["history"].full.role == ["user", "assistant"]
    for index in (1, 3):
        same(old[index], rows[index], padded=pad_output)


def same(old: Any, new: Any, *, padded: bool) -> None:
    """A row that was not aborted, but for longer padding."""
    assert set(old.keys(True, True)) == set(new.keys(True, True))
    for key, value in old.items(True, True):
        got = new.get(key)
        if not isinstance(value, torch.Tensor):
            assert str(got) == str(value), key
        elif padded and value.ndim and got.shape != value.shape:
            torch.testing.assert_close(got[: len(value)], value, equal_nan=True, msg=str(key))
        else:
            torch.testing.assert_close(got, value, equal_nan=True, msg=str(key))
    if "history" in old:
        assert new["history"].full.content == old["history"].full.content
        assert new["history"].response.is_complete == old["history"].response.is_complete
    assert new["text"].full == old["text"].full


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("ending", ["eos", "stop string"])
def test_rows_that_ended_stay_as_they_are(
    service: AsyncSGLang, tokenizer: Any, ending: str, pad_output: bool
) -> None:
    """What a stop takes out of text and history stays out."""
    policy = SGLangWrapper(
        service,
        generate_kwargs={"max_new_tokens": 1900, "no_stop_trim": False},
        pad_output=pad_output,
        partial_rollouts=True,
        extras=["request_id", "latency", "cached_tokens"],
    )
    stop = tokenizer.eos_token if ending == "eos" else "e"
    ended = TensorDict(
        logit_bias=NonTensorData({tokenizer.convert_tokens_to_ids(stop): 100.0}),
        stop=NonTensorData([] if ending == "eos" else [stop]),
    )
    going_on = TensorDict(logit_bias=NonTensorData({tokenizer.eos_token_id: -100.0}))
    td = make_input("history")[:2]
    td[0].set("sampling", ended)
    td[1].set("sampling", going_on)
    out = aborted(policy, td, service, 1)
    assert reasons(out) == ["stop", "abort"]
    old = rows_of(out)[0].clone()
    assert split(old)[1] == [tokenizer.convert_tokens_to_ids(stop)]
    assert old["history"].response.content == [old["text"].response] == [""]
    done = len(split(rows_of(out)[1])[1])
    resumed = policy.resume(out, max_new_tokens=done + 3)
    same(old, rows_of(resumed)[0], padded=pad_output)
    assert len(split(rows_of(resumed)[1])[1]) == done + 3


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_rows_that_ended_keep_what_was_said_of_them(service: AsyncSGLang, pad_output: bool) -> None:
    """Also what the policy that goes on would not say, and what somebody else wrote there."""
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs=SAMPLING,
        pad_output=pad_output,
        partial_rollouts=True,
        extras={"request_id": True, "cached_tokens": True, "latency": True, "top_log_probs": 2},
    )
    td = make_input("tokens").set("sampling", lengths_per_row(1900, 5, 1900, 12))
    out = aborted(policy, td, service, 2)
    assert reasons(out) == ["abort", "length", "abort", "length"]
    for row in rows_of(out):
        row["rollout"].set("reward", torch.tensor(0.5))
    old = [row["rollout"].clone() for row in rows_of(out)]
    longest = max(len(split(row)[1]) for row in rows_of(out))
    out.set("sampling", lengths_per_row(longest + 3, 5, longest + 3, 12))
    resumed = rows_of(policy.get_new_version(extras=()).resume(out))
    for index in (1, 3):
        said = resumed[index]["rollout"]
        assert set(said.keys()) == set(old[index].keys())
        assert said["request_id"] == old[index]["request_id"]
        for name in ("cached_tokens", "latency_s", "reward", "top_log_probs", "top_token_ids"):
            assert torch.equal(said[name], old[index][name])
    for index in (0, 2):
        assert set(resumed[index]["rollout"].keys()) == {
            "finish_reason",
            "weight_version",
            "policy_version",
        }


def test_aborted_twice(service: AsyncSGLang, model: Any) -> None:
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    out = aborted(policy, make_input("tokens"), service, 4)
    first = [len(split(row)[1]) for row in rows_of(out)]
    future = once_running(service, 4, lambda: policy.resume(out))
    service.abort()
    out = future.result(20.0)
    assert reasons(out) == ["abort"] * 4
    second = [len(split(row)[1]) for row in rows_of(out)]
    assert all(b > a for a, b in zip(first, second, strict=True))
    out = policy.resume(out, max_new_tokens=max(second) + 4)
    for row in rows_of(out):
        prompt, sampled, scores, _ = split(row)
        assert len(sampled) == max(second) + 4
        assert scores == pytest.approx(hf_log_probs(model, prompt, sampled), abs=0.02)


def test_rows_that_never_began(service: AsyncSGLang, model: Any) -> None:
    """They waited in the server's queue, and have nothing but their prompt."""
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={"max_new_tokens": 1900, "ignore_eos": True},
        partial_rollouts=True,
        extras={"top_log_probs": 2},
    )
    td = token_rows(*[[5, 6, 20 + i] for i in range(30)])
    out = aborted(policy, td, service, 30)
    assert reasons(out) == ["abort"] * 30
    counts = [len(split(row)[1]) for row in rows_of(out)]
    assert 0 in counts
    assert max(counts) > 0
    out.set("sampling", lengths_per_row(*[count + 3 for count in counts]))
    out = policy.resume(out)
    for row, count in zip(rows_of(out), counts, strict=True):
        prompt, sampled, scores, _ = split(row)
        assert len(sampled) == count + 3
        assert scores == pytest.approx(hf_log_probs(model, prompt, sampled), abs=0.02)
        assert row["rollout", "top_log_probs"].shape == (count + 3, 2)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_several_samples(
    service: AsyncSGLang, tokenizer: Any, model: Any, pad_output: bool
) -> None:
    policy = SGLangWrapper(
        service,
        generate_kwargs=SAMPLING,
        num_samples=3,
        pad_output=pad_output,
        partial_rollouts=True,
        inplace=False,
    )
    out = aborted(policy, make_input("history")[:2], service, 6)
    assert out.batch_size == (2, 3)
    assert reasons(out) == ["abort"] * 6
    before = [split(row) for row in rows_of(out)]
    longest = max(len(sampled) for _, sampled, _, _ in before)
    out = policy.resume(out, max_new_tokens=longest + 5)
    assert out.batch_size == (2, 3)
    for row, (prompt, sampled, _, _) in zip(rows_of(out), before, strict=True):
        again, whole, scores, _ = split(row)
        assert again == prompt
        assert whole[: len(sampled)] == sampled
        assert len(whole) == longest + 5
        assert scores == pytest.approx(hf_log_probs(model, prompt, whole), abs=0.02)
        content = row["text"].response.removesuffix(tokenizer.eos_token)
        assert row["history"].response.content == [content]


@pytest.mark.parametrize("mode", ["reported", "corrected"])
def test_extras_of_both_parts(service: AsyncSGLang, mode: Any) -> None:
    needs(service, "sampling_mask_tokens")
    extras = {"top_log_probs": 3, "sampling_mask": True, "input_log_probs": True}
    others = {"cached_tokens": True, "request_id": True, "latency": True}
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={**SAMPLING, "top_k": 5},
        log_probs_mode=mode,
        partial_rollouts=True,
        extras={**extras, **others},
    )
    td = make_input("tokens").set("sampling", lengths_per_row(1900, 6, 1900, 6))
    out = aborted(policy, td, service, 2)
    assert reasons(out) == ["abort", "length", "abort", "length"]
    old = [row.clone() for row in rows_of(out)]
    counts = [len(split(row)[1]) for row in old]
    out.set("sampling", lengths_per_row(*[c + 4 if c > 6 else c for c in counts]))
    out = policy.resume(out)
    for index, (row, before) in enumerate(zip(rows_of(out), old, strict=True)):
        _, sampled, scores, _ = split(row)
        info, was = row["rollout"], before["rollout"]
        assert len(sampled) == counts[index] + (4 if index in (0, 2) else 0)
        assert info["top_log_probs"].shape == info["top_token_ids"].shape == (len(sampled), 3)
        torch.testing.assert_close(info["top_log_probs"][: counts[index]], was["top_log_probs"])
        offsets = info["sampling_mask_offsets"].tolist()
        kept = info["sampling_mask_ids"].tolist()
        assert len(offsets) == len(sampled) + 1
        for position, token in enumerate(sampled):
            assert token in kept[offsets[position] : offsets[position + 1]]
        # In both parts the same log-probs: among the ids kept, or before any were left out.
        top = dict(zip(info["top_token_ids"][-1].tolist(), info["top_log_probs"][-1], strict=True))
        if sampled[-1] in top:
            close = abs(top[sampled[-1]].item() - scores[-1]) < 0.02
            assert close or mode == "corrected"
        prompt = row["log_probs"].prompt
        assert prompt[0].isnan()
        assert not prompt[1:].isnan().any()
        torch.testing.assert_close(prompt, before["log_probs"].prompt, equal_nan=True)
        assert info["cached_tokens"] == was["cached_tokens"]
        assert info["latency_s"] >= was["latency_s"]
        if index in (1, 3):
            same(before, row, padded=False)


def test_hidden_states_of_both_parts_are_refused_or_joined(service: AsyncSGLang) -> None:
    assert not service.info.features.hidden_states
    with pytest.raises(UnsupportedOptionError, match="hidden states"):
        SGLangWrapper(service, input_mode="tokens", extras=["hidden_states"])(token_rows([5, 6]))


def test_options_per_row_go_on_under_any_name(service: AsyncSGLang) -> None:
    """``max_tokens`` is ``max_new_tokens``; both limits count from the row's start."""
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    options = TensorDict(
        max_tokens=torch.tensor([1900, 1900]),
        min_tokens=torch.tensor([0, 1400]),
        temperature=torch.tensor([1.0, 0.0]),
        batch_size=2,
    )
    out = aborted(policy, token_rows([5, 6], [7, 8]).set("sampling", options), service, 2)
    counts = [len(split(row)[1]) for row in rows_of(out)]
    options["max_tokens"] = torch.tensor([count + 6 for count in counts])
    options["min_tokens"] = options["max_tokens"] - 1
    out = policy.resume(out.set("sampling", options))
    assert [len(split(row)[1]) for row in rows_of(out)] == [count + 6 for count in counts]
    greedy = split(rows_of(out)[1])[1]
    alone = service.generate([7, 8], {**SAMPLING, "temperature": 0.0, "max_new_tokens": 20})
    assert greedy[:20] == alone.output_ids


def as_if_aborted(policy: SGLangWrapper, td: TensorDict, done: int, **options: Any) -> TensorDict:
    """Rows that have ``done`` tokens and say that they were aborted."""
    out = policy(td, max_new_tokens=done, **options)
    for row in rows_of(out):
        assert row["rollout", "finish_reason"] == "length"
        row["rollout"].set("finish_reason", NonTensorData("abort"))
    return out


def test_a_stop_that_begins_before_the_abort_and_ends_after(
    service: AsyncSGLang, tokenizer: Any
) -> None:
    """Wherever the row was aborted, it ends where it would have ended."""
    (hyphen,) = tokenizer("-")["input_ids"]
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={"logit_bias": {hyphen: 100.0}, "no_stop_trim": False},
        partial_rollouts=True,
    )
    td = lazy_stack([*token_rows([5, 6], [7, 8])])
    td[1].set("sampling", TensorDict(stop=NonTensorData("--")))
    options = {"max_new_tokens": 12, "stop": ["*", "---"]}
    for done, some in ((1, td), (2, td[:1])):
        wholes = rows_of(policy(some.clone(), **options))
        assert [len(row["tokens"].response) for row in wholes] == [3, 2][: len(wholes)]
        out = as_if_aborted(policy, some.clone(), done)
        for row, whole in zip(rows_of(policy.resume(out, **options)), wholes, strict=True):
            assert row["rollout", "finish_reason"] == "stop"
            assert row["tokens"].response.tolist() == whole["tokens"].response.tolist()
            assert row["text"].response == whole["text"].response == ""
            assert row["log_probs"].response.shape == whole["log_probs"].response.shape


@pytest.mark.parametrize("options", [*FORGOTTEN[:3], FORGOTTEN[4]], ids=str)
def test_rows_that_would_forget_their_first_part(
    service: AsyncSGLang, options: dict[str, Any]
) -> None:
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True, inplace=False
    )
    out = as_if_aborted(policy, token_rows([5, 6], [7, 8]), 3)
    with pytest.raises(UnsupportedOptionError, match=next(iter(options))) as caught:
        policy.resume(out, max_new_tokens=5, **options)
    assert caught.value.__notes__ == ["row 0 of the batch"]
    assert [len(split(row)[1]) for row in rows_of(policy.resume(out, max_new_tokens=5))] == [5, 5]


def test_a_moving_temperature_goes_on_in_a_row(special_service: AsyncSGLang, model: Any) -> None:
    """The log-probs of the second part are those at the temperatures that were left."""
    needs(special_service, "processors")
    policy = SGLangWrapper(
        special_service,
        input_mode="tokens",
        generate_kwargs={"ignore_eos": True},
        processor=progress_temperature(1.0, 3.0, 6),
        partial_rollouts=True,
        inplace=False,
    )
    out = policy.resume(as_if_aborted(policy, token_rows([5, 6]), 4), max_new_tokens=10)
    prompt, sampled, scores, _ = split(rows_of(out)[0])
    for index, score in enumerate(scores):
        temperature = 1.0 + 2.0 * min(index / 6, 1)
        expected = hf_log_probs(model, [*prompt, *sampled[:index]], sampled[index:], temperature)
        assert score == pytest.approx(expected[0], abs=0.02)


@pytest.mark.slow
def test_one_row_of_a_call(service: AsyncSGLang) -> None:
    """By the id that the row gave its request."""
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs=SAMPLING,
        partial_rollouts=True,
        extras=["request_id"],
    )
    td = token_rows([5, 6], [7, 8], [9])
    for row, rid in zip(td.unbind(0)[:2], ("first-row", "second-row"), strict=True):
        row.set("sampling", TensorDict(rid=NonTensorData(f"{rid}-{new_rid()}")))
    rids = [row["sampling", "rid"] for row in td.unbind(0)[:2]]
    future = once_running(service, 3, lambda: policy(td, max_new_tokens=1200))
    service.abort(rids[1])
    out = future.result(60.0)
    assert reasons(out) == ["length", "abort", "length"]
    assert [row["rollout", "request_id"] for row in rows_of(out)][:2] == rids
    done = len(split(out[1])[1])
    assert 0 < done < 1200
    assert reasons(policy.resume(out, max_new_tokens=done + 3)) == ["length"] * 3


def test_a_session_per_row_goes_on(service: AsyncSGLang) -> None:
    needs(service, "sessions")
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    with service.open_session() as session:
        td = token_rows([5, 6, 7])
        td[0].set("sampling", TensorDict(session=NonTensorData(session.session_id)))
        out = aborted(policy, td, service, 1)
        assert session.tokens == []
        done = len(split(out[0])[1])
        out = policy.resume(out, max_new_tokens=done + 4)
        prompt, sampled, _, _ = split(out[0])
        assert len(sampled) == done + 4
        assert session.tokens == [*prompt, *sampled]


@pytest.mark.parametrize("shape", [(2,), (1, 2), ()], ids=str)
def test_any_batch_shape(service: AsyncSGLang, shape: tuple[int, ...]) -> None:
    """Of a TensorDict that is no lazy stack."""
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])[: 2 if shape else 1].reshape(*shape, 3)
    td = TensorDict(tokens=Tokens(prompt=prompt, batch_size=shape), batch_size=shape)
    out = aborted(policy, td, service, 2 if shape else 1)
    before = [split(row)[1] for row in (rows_of(out) if shape else [out])]
    longest = max(map(len, before))
    out = policy.resume(out, max_new_tokens=longest + 3)
    assert out.batch_size == shape
    for row, sampled in zip(rows_of(out) if shape else [out], before, strict=True):
        whole = split(row)[1]
        assert len(whole) == longest + 3
        assert whole[: len(sampled)] == sampled


def test_nothing_to_resume(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    policy = SGLangWrapper(
        proxied, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    out = policy(token_rows([5, 6], [7, 8]), max_new_tokens=4)
    old = [row.clone() for row in rows_of(out)]
    proxy.seen.clear()
    for before, after in zip(old, rows_of(policy.resume(out)), strict=True):
        same(before, after, padded=False)
    assert "/generate" not in [path for path, _ in proxy.seen]


@pytest.mark.parametrize(
    "keys", [{"tokens_key": None}, {"masks_key": None}, {"rollout_key": None}], ids=str
)
def test_what_resuming_needs(service: AsyncSGLang, keys: dict[str, Any]) -> None:
    policy = SGLangWrapper(
        service, input_mode="text", generate_kwargs=SAMPLING, partial_rollouts=True, **keys
    )
    out = policy(make_input("text"), max_new_tokens=3)
    with pytest.raises(InputError, match="missing"):
        policy.resume(out)
    with pytest.raises(InputError, match="missing"):
        policy.resume(make_input("text"))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"max_new_tokens": 1}, ConfigError, "counts from its start"),
        ({"regex": "[a-z]*"}, UnsupportedOptionError, "begin again"),
        ({"n": 2}, InputError, "n=2"),
    ],
)
def test_what_can_not_be_resumed(
    service: AsyncSGLang, kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    out = aborted(policy, token_rows([5, 6], [7, 8]), service, 2)
    before = [row.clone() for row in rows_of(out)]
    with pytest.raises(error, match=match):
        policy.resume(out, **kwargs)
    for old, row in zip(before, rows_of(out), strict=True):
        same(old, row, padded=False)


# With pushes


def test_each_part_keeps_its_version(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected()
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    td = make_input("tokens").set("sampling", lengths_per_row(1900, 5, 1900, 5))
    out = aborted(policy, td, service, 2)
    parts = [split(row) for row in rows_of(out)]
    old_model = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old_version = parts[0][3][0]
    scheme.send(perturb(model, seed=21, scale=0.2))
    new_version = scheme.last_push.version  # type: ignore[union-attr]
    assert new_version != old_version
    wanted = [len(parts[0][1]) + 30, 5, len(parts[2][1]) + 30, 5]
    out = policy.resume(out.set("sampling", lengths_per_row(*wanted)))
    new = [split(row) for row in rows_of(out)]
    for index, (prompt, whole, scores, versions) in enumerate(new):
        count = len(parts[index][1])
        assert versions == [old_version] * count + [new_version] * (len(whole) - count)
        expected = hf_log_probs(model, prompt, whole)
        # Each part is the log-prob of the weights that sampled it, given all that was before.
        assert scores[count:] == pytest.approx(expected[count:], abs=0.02)
    assert [row["rollout", "weight_version"].item() for row in rows_of(out)] == [
        new_version,
        old_version,
        new_version,
        old_version,
    ]
    changed = [hf_log_probs(model, prompt, whole) for prompt, whole, _, _ in new]
    model.load_state_dict(old_model)
    for index, (prompt, whole, scores, _) in enumerate(new):
        count = len(parts[index][1])
        expected = hf_log_probs(model, prompt, whole)
        assert scores[:count] == pytest.approx(expected[:count], abs=0.02)
        worst = max(abs(a - b) for a, b in zip(expected, changed[index], strict=True))
        assert count < 6 or worst > 0.1  # the two are far enough apart to tell


def test_a_push_that_aborts_gives_partial_rows(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected(config=WeightSyncConfig(pause_mode="abort"))
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=SAMPLING, partial_rollouts=True
    )
    future = once_running(service, 4, lambda: policy(make_input("tokens")))
    scheme.send(perturb(model, seed=22))
    out = future.result(20.0)
    assert reasons(out) == ["abort"] * 4
    version = scheme.last_push.version  # type: ignore[union-attr]
    counts = [len(split(row)[1]) for row in rows_of(out)]
    out = policy.resume(out.set("sampling", lengths_per_row(*[c + 3 for c in counts])))
    for row, count in zip(rows_of(out), counts, strict=True):
        versions = split(row)[3]
        assert len(versions) == count + 3
        assert set(versions[:count]) != {version}
        assert versions[count:] == [version] * 3


def test_a_push_in_mid_generation_gives_two_versions_in_one_row(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """No row is aborted: they go on under the new weights, and every token says whose it is."""
    needs_version_spans(service)
    scheme = connected()
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={"max_new_tokens": 900, "ignore_eos": True},
        inplace=False,
    )
    future = once_running(service, 2, lambda: policy(make_input("tokens")[:2]))
    old = service.weight_version
    scheme.send(perturb(model, seed=23))
    version = scheme.last_push.version  # type: ignore[union-attr]
    out = future.result(60.0)
    assert reasons(out) == ["length"] * 2
    for row in rows_of(out):
        prompt, sampled, scores, versions = split(row)
        assert sorted(set(versions)) == sorted({version, int(old) if old.isdecimal() else 0})
        switch = versions.index(version)
        assert set(versions[switch:]) == {version}
        expected = hf_log_probs(model, prompt, sampled)
        assert scores[switch:] == pytest.approx(expected[switch:], abs=0.02)
        assert row["rollout", "weight_version"] == version


def test_a_partial_answer_that_is_wrong(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    """An aborted answer is read as strictly as any other."""

    def edit(content: bytes) -> bytes:
        answer = json.loads(content)
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "m"}
        answer["meta_info"]["output_token_logprobs"].pop()
        return json.dumps(answer).encode()

    proxy.faults["/generate"] = Fault(garble=edit)
    request = replace(requests_of(SHORT)[0], partial_allowed=True)
    with pytest.raises(ValueError, match="log-probs for 3 tokens"), ThreadPoolExecutor(1) as pool:
        pool.submit(proxied.complete, [request]).result(20.0)
