"""A policy whose input, environment or output has a device."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.data import Unbounded
from torchrl.data.llm import History
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from helpers.marks import QUIET
from helpers.servers import hf_log_probs
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.errors import InputError

pytestmark = QUIET


CPU, META = torch.device("cpu"), torch.device("meta")

SAMPLING = {"max_new_tokens": 4, "ignore_eos": True}

QUESTIONS = ["hi", "the quick fox"]


def make_input(mode: str, device: torch.device | None, tokenizer: Any) -> Any:
    """Two prompts on a device, in a dense TensorDict or (ids) in a lazy stack."""
    if mode == "history":
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        history = ChatHistory(prompt=History.from_chats(chats))
        td = TensorDict(history=history, batch_size=2)
    elif mode == "text":
        td = TensorDict(text=Text(prompt=list(QUESTIONS), batch_size=2), batch_size=2)
    else:
        rows = [torch.tensor(tokenizer(question)["input_ids"]) for question in QUESTIONS]
        td = lazy_stack([TensorDict(tokens=Tokens(prompt=row)) for row in rows])
    return td if device is None else td.to(device)


def check_device(out: Any, device: torch.device | None) -> None:
    """Every tensor, and every TensorDict in it, is on the device."""
    assert out.device == device
    for row in out.reshape(-1).unbind(0):
        for key in ("tokens", "masks", "log_probs", "rollout"):
            for name, value in row[key].items():
                if isinstance(value, torch.Tensor):
                    assert value.device == (device or CPU), (key, name)
        if "history" in row.keys():  # noqa: SIM118  # iterating a TensorDict gives its rows
            assert row["history"].full.device == device
            assert row["history"].full.role[-1] == "assistant"


@pytest.mark.parametrize("inplace", [None, False, True, "empty"])
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_outputs_follow_the_input(
    service: AsyncSGLang, tokenizer: Any, model: Any, mode: str, pad_output: bool, inplace: Any
) -> None:
    policy = SGLangWrapper(
        service, input_mode=mode, generate_kwargs=SAMPLING, pad_output=pad_output, inplace=inplace
    )
    td = make_input(mode, CPU, tokenizer)
    out = policy(td)
    assert (out is td) == (inplace in (None, True))
    check_device(out, CPU)
    for row in out.unbind(0):
        full, mask = row["tokens"].full, row["masks"].all_assistant_mask
        prompt = full[row["masks"].all_attention_mask & ~mask].tolist()
        expected = torch.tensor(hf_log_probs(model, prompt, full[mask].tolist()))
        torch.testing.assert_close(row["log_probs"].full[mask], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["history", "text"])
def test_an_input_without_data_of_its_own(service: AsyncSGLang, tokenizer: Any, mode: str) -> None:
    """Chats and texts are no tensors: they can be on any device."""
    policy = SGLangWrapper(service, input_mode=mode, generate_kwargs=SAMPLING)
    check_device(policy(make_input(mode, META, tokenizer)), META)


def test_ids_without_data_are_refused(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=SAMPLING)
    with pytest.raises(InputError, match="meta"):
        policy(make_input("tokens", META, tokenizer))


@pytest.mark.parametrize("source", [None, CPU], ids=["plain", "cpu"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_another_device_for_the_outputs(
    service: AsyncSGLang, tokenizer: Any, mode: str, source: torch.device | None
) -> None:
    """New TensorDicts are where ``device`` says; one that is written into keeps its device."""
    policy = SGLangWrapper(
        service, input_mode=mode, generate_kwargs=SAMPLING, device="meta", inplace=False
    )
    check_device(policy(make_input(mode, source, tokenizer)), META)
    empty = policy.get_new_version(inplace="empty")
    check_device(empty(make_input(mode, source, tokenizer)), META)
    into = policy.get_new_version(inplace=True)
    if source is not None:
        check_device(into(make_input(mode, source, tokenizer)), source)
    target = TensorDict(batch_size=2, device="cpu")
    check_device(policy(make_input(mode, source, tokenizer), tensordict_out=target), CPU)


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_samples_and_awaited_calls(
    service: AsyncSGLang, tokenizer: Any, mode: str, device: str | None
) -> None:
    policy = SGLangWrapper(
        service, input_mode=mode, generate_kwargs=SAMPLING, num_samples=2, device=device
    )
    expected = CPU if device is None else torch.device(device)
    out = policy(make_input(mode, CPU, tokenizer))
    assert out.batch_size == (2, 2)
    check_device(out, expected)
    check_device(asyncio.run(policy.agenerate(make_input(mode, CPU, tokenizer))), expected)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_scores(
    service: AsyncSGLang, tokenizer: Any, model: Any, mode: str, pad_output: bool
) -> None:
    policy = SGLangWrapper(
        service, input_mode=mode, generate_kwargs=SAMPLING, inplace=False, pad_output=pad_output
    )
    scorer = policy.get_new_version(generate=False)
    sampled = policy(make_input(mode, CPU, tokenizer))
    scores = scorer(sampled)
    assert scores.device == CPU
    for row in scores.unbind(0):
        ids = row["tokens"].full[row["masks"].all_attention_mask].tolist()
        scored = row["log_probs"].full[row["masks"].all_attention_mask]
        expected = torch.tensor(hf_log_probs(model, ids[:1], ids[1:]))
        torch.testing.assert_close(scored[1:], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_several_turns(service: AsyncSGLang, tokenizer: Any, device: str) -> None:
    """The second turn begins with the first one's tokens, also where they have no data here."""
    policy = SGLangWrapper(service, generate_kwargs=SAMPLING)
    first = policy(make_input("history", torch.device(device), tokenizer))
    first_ids = [] if device == "meta" else [r["tokens"].full.tolist() for r in first.unbind(0)]
    question = History.from_chats([[{"role": "user", "content": "go on"}]] * 2).to(device)
    asked = lazy_stack(
        [
            lazy_stack([*full.unbind(0), *more.unbind(0)])
            for full, more in zip(first["history"].full.unbind(0), question.unbind(0), strict=True)
        ]
    )
    first.set("history", ChatHistory(prompt=asked, batch_size=2))
    second = policy(first)
    check_device(second, torch.device(device))
    assert [len(row["history"].full.role) for row in second.unbind(0)] == [4, 4]
    if device == "cpu":
        for one, other in zip(first_ids, second.unbind(0), strict=True):
            assert other["tokens"].prompt[: len(one)].tolist() == one


def test_a_partial_rollout_goes_on(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, generate_kwargs=SAMPLING, inplace=False, partial_rollouts=True)
    done = policy(make_input("history", CPU, tokenizer))
    check_device(policy.resume(done), CPU)


class LengthReward(Transform):
    """An environment of TorchRL with a device needs a reward; here it counts sampled tokens."""

    def _step(self, tensordict: Any, next_tensordict: Any) -> Any:
        counts = [float(len(row["tokens"].response)) for row in tensordict.unbind(0)]
        reward = torch.tensor(counts, device=tensordict.device)[:, None]
        return next_tensordict.set("reward", reward)

    def transform_reward_spec(self, reward_spec: Any) -> Any:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1), device=reward_spec.device)
        return reward_spec


@pytest.mark.parametrize("env_device", [None, "cpu"])
@pytest.mark.parametrize("policy_device", [None, "cpu"])
def test_in_an_environment(
    service: AsyncSGLang, tokenizer: Any, env_device: str | None, policy_device: str | None
) -> None:
    """TorchRL's recipe gives its environment a device."""
    policy = SGLangWrapper(service, generate_kwargs=SAMPLING, device=policy_device)
    loader = DataLoader(QUESTIONS * 4, batch_size=2, collate_fn=lambda queries: {"query": queries})
    env = ChatEnv.from_dataloader(
        loader, batch_size=(2,), tokenizer=tokenizer, input_mode="history", device=env_device
    ).append_transform(LengthReward())
    with set_list_to_stack(True):
        batch = env.rollout(1, policy, break_when_any_done=False)
    assert batch.device == (None if env_device is None else CPU)
    for row in batch[:, 0].unbind(0):
        assert row["history"].full.role == ["user", "assistant"]
        assert row["tokens"].full.device == CPU
        assert row["next", "reward"].item() == 4
