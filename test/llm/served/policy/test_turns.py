"""Turns without drift: the tokens of a turn begin the prompt of the next, however it ended."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors.llm import LLMCollector
from torchrl.modules.llm.policies import Tokens
from transformers import AutoTokenizer

from helpers.marks import LISTS_STACK, QUIET
from helpers.prompts import QUESTIONS
from helpers.turns import LAYOUTS, dialogs_of, drifted, make_env, split
from torchrl_sglang import AsyncSGLang, SGLangWrapper

pytestmark = [*QUIET, LISTS_STACK]


SAMPLING = {"max_new_tokens": 24}


@pytest.fixture
def eos_pads(model_path: Any) -> Any:
    """A tokenizer whose pad token is its EOS, as that of many models."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def without_memory(policy: SGLangWrapper) -> SGLangWrapper:
    """The policy as if it forgot, and as if no TensorDict carried anything."""
    memory = policy._settled.prompts.memory
    memory.keep = lambda turn: None  # type: ignore[method-assign]
    policy._settled.prompts.__dict__.update(tokens_key=None)
    return policy


# In TorchRL's own loops


@LAYOUTS
@pytest.mark.parametrize("mode", ["history", "text"])
def test_a_rollout(service: AsyncSGLang, tokenizer: Any, mode: str, pad_output: bool) -> None:
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        tokenizer=tokenizer,
        generate_kwargs=SAMPLING,
        pad_output=pad_output,
    )
    dialogs = dialogs_of(make_env(tokenizer, mode).rollout(4, policy))
    assert [len(turns) for turns in dialogs] == [4] * len(QUESTIONS)
    assert drifted(dialogs) == 0
    for turns in dialogs:
        check_dialog(turns, tokenizer, mode)


def check_dialog(turns: Sequence[Any], tokenizer: Any, mode: str) -> None:
    """What is new in a prompt is what was said; what is marked is what was sampled."""
    for turn in turns:
        _prompt, sampled = split(turn)
        assert tokenizer.decode(sampled) == turn["text"].response
        assert turn["text"].full == turn["text"].prompt + turn["text"].response
        scores = turn["log_probs"].full[turn["masks"].all_assistant_mask]
        assert not scores.isnan().any()
        assert turn["log_probs"].prompt.isnan().all()
        if mode == "history":
            assert turn["history"].full.content[-1:] == turn["history"].response.content
    for one, other in itertools.pairwise(turns):
        before = [i for part in split(one) for i in part]
        new = tokenizer.decode(split(other)[0][len(before) :])
        ended = before[-1] == tokenizer.eos_token_id
        closing = "" if ended or mode == "text" else "<|im_end|>"
        asked = "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
        assert new == closing + asked


@pytest.mark.parametrize("mode", ["history", "text"])
def test_it_drifts_without_memory(service: AsyncSGLang, tokenizer: Any, mode: str) -> None:
    """So the test above can fail: text that is tokenised again gives other tokens."""
    policy = SGLangWrapper(service, input_mode=mode, tokenizer=tokenizer, generate_kwargs=SAMPLING)
    rollout = make_env(tokenizer, mode).rollout(3, without_memory(policy))
    assert drifted(dialogs_of(rollout)) > 0


@LAYOUTS
@pytest.mark.parametrize("mode", ["history", "text"])
def test_a_collector(service: AsyncSGLang, tokenizer: Any, mode: str, pad_output: bool) -> None:
    """Over batches that begin in mid-dialog, and dialogs that end and begin anew."""
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        tokenizer=tokenizer,
        generate_kwargs=SAMPLING,
        pad_output=pad_output,
    )
    collector = LLMCollector(
        make_env(tokenizer, mode, QUESTIONS[:4], turns=3),
        policy=policy,
        dialog_turns_per_batch=8,
        total_dialog_turns=32,
    )
    try:
        steps = [list(row.unbind(0)) for row in torch.cat(list(collector), -1).unbind(0)]
    finally:
        collector.shutdown()
    for turns in steps:
        assert len(turns) == 8
        begins = [turn["is_init"].item() for turn in turns]
        assert begins == [True, False, False, True, False, False, True, False]
        assert drifted([turns[:3], turns[3:6], turns[6:]]) == 0
        for begin in (0, 3, 6):  # nothing of the dialog before is left
            prompt, _ = split(turns[begin])
            assert tokenizer.decode(prompt).count("<|im_start|>") == 2


class Root(SGLangWrapper):
    """A policy that notes what is left of the turn before when it is called."""

    def forward(self, tensordict: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("seen", []).append(
            {
                name: sorted(map(str, tensordict[0].get(name).keys()))
                for name in ("history", "tokens", "text", "masks")
                if name in tensordict
            }
        )
        return super().forward(tensordict, **kwargs)


def test_what_torchrl_carries_from_turn_to_turn(service: AsyncSGLang, tokenizer: Any) -> None:
    """What the environment does not write stays in the root, and with it the tokens."""
    whole = ["full", "padded", "prompt", "response"]
    masks = ["all_assistant_mask", "all_attention_mask", "padded"]
    for mode in ("history", "text"):
        policy = Root(service, input_mode=mode, tokenizer=tokenizer, generate_kwargs=SAMPLING)
        make_env(tokenizer, mode).rollout(2, policy)
        first, second = policy.seen
        assert first == {mode: ["prompt"]}
        text = ["prompt"] if mode == "text" else ["full", "prompt", "response"]
        expected = {"tokens": whole, "text": text, "masks": masks}
        assert second == expected | ({"history": ["prompt"]} if mode == "history" else {})


@LAYOUTS
def test_tokens_mode(service: AsyncSGLang, eos_pads: Any, pad_output: bool) -> None:
    """The full tokens of a turn are the prompt of the next, EOS and padding included."""
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        tokenizer=eos_pads,
        generate_kwargs={"max_new_tokens": 40},
        pad_output=pad_output,
    )
    bias_to_end = {"logit_bias": {eos_pads.eos_token_id: 4.0}}
    env = make_env(eos_pads, "tokens", questions=["1", "2", "3", "1"])  # TorchRL stacks these
    td, dialogs, ended = env.reset(), [[] for _ in range(4)], 0
    for _ in range(4):
        td = policy(td, **bias_to_end)
        for turns, row in zip(dialogs, td.unbind(0), strict=True):
            turns.append(row.clone())
            ended += split(row)[1][-1] == eos_pads.eos_token_id
        if pad_output:
            td = env.step_mdp(env.step(td))
        else:  # TorchRL's own step does not take ragged rows
            for row in td.unbind(0):
                row["tokens"] = Tokens(prompt=row["tokens"].full, batch_size=())
    assert ended > 4
    for turns in dialogs:
        for one, other in itertools.pairwise(turns):
            assert split(other)[0] == [i for part in split(one) for i in part]


# EOS as the pad


@LAYOUTS
@pytest.mark.parametrize("masks_key", ["masks", None])
@pytest.mark.parametrize("mode", ["history", "text"])
def test_eos_is_kept_where_it_pads(
    service: AsyncSGLang, eos_pads: Any, mode: str, masks_key: str | None, pad_output: bool
) -> None:
    """Rows that end with it and rows that are padded with it, with and without masks to tell."""
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        tokenizer=eos_pads,
        generate_kwargs={"max_new_tokens": 12},
        pad_output=pad_output,
        masks_key=masks_key,
    )
    sent = recorded(policy)
    rows = TensorDict(
        logit_bias=[
            {eos_pads.eos_token_id: bias} for bias in (-100.0, 100.0, 3.0, 3.0, -100.0, 3.0)
        ],
        max_new_tokens=torch.tensor([3, 12, 12, 12, 12, 12]),
        batch_size=6,
    )
    env = make_env(eos_pads, mode)
    td = env.reset()
    for _ in range(3):
        td = env.step_mdp(env.step(policy(td.set("sampling", rows))))
    check_sent(sent, eos_pads)


def recorded(policy: SGLangWrapper) -> list[list[tuple[list[int], list[int]]]]:
    """Every call's prompts as they were sent, with what came back, one list per call."""
    sent: list[list[tuple[list[int], list[int]]]] = []
    complete = policy.service.complete

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(service, name)

        def complete(self, batch: Any, *args: Any) -> Any:
            completions = complete(batch, *args)
            sent.append(
                [
                    (list(request.input_ids), list(completion.output_ids))
                    for request, completion in zip(batch, completions, strict=True)
                ]
            )
            return completions

    service = policy.service
    policy.service = Recording()  # type: ignore[assignment]
    return sent


def check_sent(sent: list[list[tuple[list[int], list[int]]]], tokenizer: Any) -> None:
    """Prompts begin with what was sent and sampled before, and no EOS follows another."""
    ended = cut = 0
    for before, after in itertools.pairwise(sent):
        for (prompt, sampled), (longer, _) in zip(before, after, strict=True):
            tokens = [*prompt, *sampled]
            assert longer[: len(tokens)] == tokens
            new = tokenizer.decode(longer[len(tokens) :])
            if sampled[-1] == tokenizer.eos_token_id:
                ended += 1
                assert new.startswith("\n<|im_start|>user")
            else:
                cut += 1
                assert new.startswith(("<|im_end|>\n<|im_start|>user", "\n<|im_start|>user"))
    assert ended > 0
    assert cut > 0


# How an answer ends


@pytest.mark.parametrize("mode", ["history", "text"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5, "ignore_eos": True},
        {"max_new_tokens": 60, "logit_bias": 5.0},
        {"max_new_tokens": 60, "stop": ["e", "<"]},
        {"max_new_tokens": 60, "stop": ["e"], "no_stop_trim": False},
        {"max_new_tokens": 30, "logit_bias": 5.0, "stop": ["e"], "no_stop_trim": False},
        {"max_new_tokens": 30, "logit_bias": 5.0, "stop": ["end"], "no_stop_trim": True},
        {"max_new_tokens": 30, "logit_bias": 5.0, "no_stop_trim": False},
        {"max_new_tokens": 30, "logit_bias": 5.0, "skip_special_tokens": True},
    ],
    ids=[
        "length",
        "eos",
        "stop",
        "stop left out",
        "stop in eos left out",
        "stop in eos",
        "eos left out",
        "specials left out",
    ],
)
def test_every_ending(
    service: AsyncSGLang, tokenizer: Any, options: dict[str, Any], mode: str
) -> None:
    """Whatever text and messages leave out of an answer, its tokens stay."""
    options = dict(options)
    if "logit_bias" in options:
        options["logit_bias"] = {tokenizer.eos_token_id: options["logit_bias"]}
    policy = SGLangWrapper(service, input_mode=mode, tokenizer=tokenizer, generate_kwargs=options)
    sent = recorded(policy)
    dialogs = dialogs_of(make_env(tokenizer, mode, QUESTIONS[:4] * 3).rollout(3, policy))
    # A text can't tell of an answer that has no text.
    silent = mode == "text" and bool(
        options.get("skip_special_tokens") or options.get("no_stop_trim") is False
    )
    said = [not silent or all(turn["text"].response for turn in turns) for turns in dialogs]
    assert any(said)
    assert drifted([turns for turns, whole in zip(dialogs, said, strict=True) if whole]) == 0
    for before, after in itertools.pairwise(sent):
        for (prompt, sampled), (longer, _), whole in zip(before, after, said, strict=True):
            if not whole:
                continue
            new = tokenizer.decode(longer[len(prompt) + len(sampled) :])
            ended = sampled[-1] == tokenizer.eos_token_id
            closing = "" if ended or mode == "text" else "<|im_end|>"
            assert new == f"{closing}\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"


def test_a_stop_that_the_template_writes_too(service: AsyncSGLang, tokenizer: Any) -> None:
    """``<`` ends the answer, and begins what the template writes after it."""
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        generate_kwargs={"max_new_tokens": 20, "regex": "hm<hm", "stop": "<"},
    )
    env = make_env(tokenizer)
    first = policy(env.reset())
    assert first["text"].response == ["hm<"] * len(QUESTIONS)
    full = [row["tokens"].full.tolist() for row in first.unbind(0)]
    for row, tokens in zip(policy(env.step_mdp(env.step(first))).unbind(0), full, strict=True):
        prompt, _ = split(row)
        assert prompt[: len(tokens)] == tokens
        assert tokenizer.decode(prompt[len(tokens) :]).startswith("<|im_end|>\n<|im_start|>user")
