"""Several turns without drift: the tokens of a turn begin the prompt of the next, always."""

from __future__ import annotations

from helpers.prompts import QUESTIONS
import copy
import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.servers import needs_xgrammar
from tensordict import TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data.llm import History
from torchrl.envs import InitTracker, StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens
from transformers import AutoTokenizer

from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.policy.prompts.turns import (
    SENTINEL,
    SpecialTokens,
    Turn,
    TurnMemory,
    chat_key,
    continued,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:tensordict"),
]

SAMPLING = {"max_new_tokens": 24}
LAYOUTS = pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])


@pytest.fixture(autouse=True)
def lists_stack() -> Iterator[None]:
    with set_list_to_stack(True):
        yield


@pytest.fixture
def eos_pads(model_path: Any) -> Any:
    """A tokenizer whose pad token is its EOS, as that of many models."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Ask(Transform):
    """The user speaks after each answer of the assistant."""

    def __init__(self, what: str = "go on") -> None:
        super().__init__()
        self._what = what

    def _step(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        if "history" in next_td:
            turn = History(role="user", content=self._what, batch_size=())
            rows = next_td["history"].prompt.unbind(0)
            next_td["history"].prompt = lazy_stack(
                [row.append(turn, inplace=False, dim=-1) for row in rows]
            )
        else:
            prompts = [
                f"{text}\n<|im_start|>user\n{self._what}<|im_end|>\n<|im_start|>assistant\n"
                for text in next_td["text"].prompt
            ]
            next_td["text"].prompt = prompts
        return next_td


def make_env(
    tokenizer: Any, mode: str = "history", questions: Sequence[str] = QUESTIONS, turns: int = 99
) -> Any:
    loader = DataLoader(
        list(questions) * 40,
        batch_size=len(questions),
        collate_fn=lambda queries: {"query": queries},
    )
    env = ChatEnv.from_dataloader(
        loader, batch_size=(len(questions),), tokenizer=tokenizer, input_mode=mode
    )
    if mode != "tokens":
        env = env.append_transform(Ask())
    return env.append_transform(InitTracker()).append_transform(StepCounter(max_steps=turns))


def split(row: Any) -> tuple[list[int], list[int]]:
    """Prompt and sampled ids of one turn, by the masks."""
    full = row["tokens"].full
    every, answer = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
    assert every.shape == answer.shape == full.shape
    assert not (answer & ~every).any()
    return full[every & ~answer].tolist(), full[answer].tolist()


def drifted(dialogs: Sequence[Sequence[Any]]) -> int:
    """How many turns do not begin with the tokens of the turn before."""
    count = 0
    for turns in dialogs:
        for one, other in itertools.pairwise(turns):
            tokens = [i for part in split(one) for i in part]
            prompt, _ = split(other)
            assert len(prompt) > len(tokens)
            count += prompt[: len(tokens)] != tokens
    return count


def dialogs_of(rollout: Any) -> list[list[Any]]:
    """For each row of an env its turns."""
    return [list(row.unbind(0)) for row in rollout.unbind(0)]


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


# Templates that change what was said

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + CONTENT + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Thoughts are kept in answers after the last question and dropped from those before, as Qwen3 does.
THOUGHTS = """\
{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set answer = message['content'].split('</think>')[-1].lstrip('\\n') -%}
{%- if loop.index0 > ns.last -%}
{%- set thought = message['content'].split('</think>')[0].split('<think>')[-1] -%}
{%- set thought = thought if '</think>' in message['content'] else '' -%}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
{{- answer + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TEMPLATES = {
    "plain": CHATML.replace("CONTENT", "message['content']"),
    "trimmed": CHATML.replace("CONTENT", "message['content'] | trim"),
    "upper": CHATML.replace("CONTENT", "message['content'] | upper"),
    "shortened": CHATML.replace("CONTENT", "message['content'][-4:]"),
    "thoughts": THOUGHTS,
    "counted": "{{- messages | length ~ ' messages\\n' -}}"
    + CHATML.replace("CONTENT", "message['content']"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_change_answers(service: AsyncSGLang, tokenizer: Any, template: str) -> None:
    """The answer stays as it was sampled, and what is said after it is there."""
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        chat_template=TEMPLATES[template],
        generate_kwargs={"max_new_tokens": 20},
        pad_output=template == "thoughts",
    )
    dialogs = dialogs_of(make_env(tokenizer, "history", QUESTIONS[:4]).rollout(3, policy))
    assert drifted(dialogs) == 0
    for turns in dialogs:
        for one, other in itertools.pairwise(turns):
            before = [i for part in split(one) for i in part]
            new = tokenizer.decode(split(other)[0][len(before) :])
            closing = "" if before[-1] == tokenizer.eos_token_id else "<|im_end|>"
            said = (
                "GO ON" if template == "upper" else "o on" if template == "shortened" else "go on"
            )
            asked = f"\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
            assert new == closing + asked


def test_thoughts_are_kept_in_tokens(service: AsyncSGLang, tokenizer: Any) -> None:
    """Though the template drops them from earlier answers, with and without the carried tokens."""
    thought = "<think>\nhm hm\n</think>\n\nyes"
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        chat_template=THOUGHTS,
        generate_kwargs={"max_new_tokens": 30, "regex": "<think>\nhm hm\n</think>\n\nyes"},
        inplace=False,
    )
    chat = [{"role": "user", "content": "hello"}]
    first = policy(chats(chat))[0]
    assert first["text"].response.removesuffix("<|im_end|>") == thought
    tokens = first["tokens"].full.tolist()
    chat += [{"role": "assistant", "content": thought}, {"role": "user", "content": "and?"}]
    rendered = tokenizer.apply_chat_template(chat, chat_template=THOUGHTS, tokenize=False)
    assert "hm hm" not in rendered
    carrying = lazy_stack([first.clone().set("history", chats(chat)[0]["history"])])
    for td in (chats(chat), carrying):
        prompt = policy(td)[0]["tokens"].prompt.tolist()
        assert prompt[: len(tokens)] == tokens
        assert tokenizer.decode(prompt[len(tokens) :]).endswith(
            "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_template_that_leaves_answers_out(service: AsyncSGLang, tokenizer: Any) -> None:
    """There is nothing to go on from then: the prompt is what the template writes."""
    template = CHATML.replace(
        "CONTENT", "(message['content'] if message['role'] == 'user' else '')"
    )
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, chat_template=template, generate_kwargs=SAMPLING
    )
    rollout = make_env(tokenizer).rollout(3, policy)
    for turns in dialogs_of(rollout):
        for turn in turns:
            assert tokenizer.decode(split(turn)[0]) == turn["text"].prompt


# One text, several tokens


def chats(*messages: list[dict[str, str]]) -> TensorDict:
    return lazy_stack(
        [
            TensorDict(history=ChatHistory(prompt=history, batch_size=()), batch_size=())
            for history in History.from_chats(list(messages))
        ]
    )


def test_rows_that_differ_in_their_tool_calls_alone(service: AsyncSGLang, tokenizer: Any) -> None:
    """Contents may be the same; each goes on with the call that it had."""
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        chat_template=CHATML.replace(
            "CONTENT", "message['content'] + message['tool_calls'] | default('') | string"
        ),
        generate_kwargs={"regex": "done", "max_new_tokens": 12},
        inplace=False,
    )
    rows = []
    for tool in ("add", "sub"):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": tool}}]}
        rows.append([{"role": "user", "content": "1 2"}, call, {"role": "tool", "content": "ok"}])
    answers = [{"role": "assistant", "content": "done"}, {"role": "user", "content": "thanks"}]
    first = policy(chats(*rows))
    again = policy(chats(*[[*row, *answers] for row in rows]))
    for before, after, tool in zip(first.unbind(0), again.unbind(0), ("add", "sub"), strict=True):
        tokens = before["tokens"].full.tolist()
        assert after["tokens"].prompt.tolist()[: len(tokens)] == tokens
        assert tool in tokenizer.decode(tokens)


def text_rows(*texts: str) -> TensorDict:
    rows = [TensorDict(text=Text(prompt=text, batch_size=()), batch_size=()) for text in texts]
    return lazy_stack(rows)


TWINS = {"regex": "----------------", "max_new_tokens": 30}  # in tokens of one or two hyphens


def twins_of(policy: SGLangWrapper, mode: str) -> tuple[TensorDict, list[list[int]]]:
    """A turn in which rows have one text and different tokens, and the rows' tokens."""
    needs_xgrammar("gives a text that is certain its canonical tokens")
    chat = [{"role": "user", "content": "hello"}]
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    td = chats(*[chat] * 8) if mode == "history" else text_rows(*[text] * 8)
    out = policy(td, temperature=3.0)
    full = [row["tokens"].full[row["masks"].all_attention_mask].tolist() for row in out.unbind(0)]
    assert len({tuple(ids) for ids in full}) > 1
    assert len({policy.tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in full}) == 1
    return out, full


@LAYOUTS
@pytest.mark.parametrize("text_key", ["text", None])
@pytest.mark.parametrize("mode", ["history", "text"])
def test_rows_of_one_text_and_different_tokens(
    service: AsyncSGLang, tokenizer: Any, mode: str, text_key: str | None, pad_output: bool
) -> None:
    """Each goes on with its own, which the TensorDict carries from turn to turn."""
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        tokenizer=tokenizer,
        generate_kwargs=TWINS,
        pad_output=pad_output,
        text_key=text_key,
    )
    td, full = twins_of(policy, mode)
    env = ChatEnv(batch_size=(8,), tokenizer=tokenizer, input_mode=mode)
    if mode == "text" and text_key is None:
        return  # there is no text to go on from
    td = env.append_transform(Ask()).step_mdp(env.step(td))
    out = policy(td)
    for row, tokens in zip(out.unbind(0), full, strict=True):
        assert split(row)[0][: len(tokens)] == tokens


def test_without_the_carried_tokens_the_latest_turn_is_taken(
    service: AsyncSGLang, tokenizer: Any
) -> None:
    """A loop of one's own that hands on nothing but the chat: one of the twins' tokens."""
    policy = SGLangWrapper(service, tokenizer=tokenizer, generate_kwargs=TWINS, inplace=False)
    out, full = twins_of(policy, "history")
    prompts = [row["history"].full for row in out.unbind(0)]
    go_on = History(role="user", content="go on", batch_size=())
    td = lazy_stack(
        [
            TensorDict(
                history=ChatHistory(
                    prompt=prompt.append(go_on, inplace=False, dim=-1), batch_size=()
                ),
                batch_size=(),
            )
            for prompt in prompts
        ]
    )
    for row in policy(td).unbind(0):
        assert any(split(row)[0][: len(tokens)] == tokens for tokens in full)


def test_a_loop_of_ones_own_in_text(service: AsyncSGLang, tokenizer: Any) -> None:
    """A text that goes on without an addition is known by the TensorDict that carries the turn."""
    policy = SGLangWrapper(
        service,
        input_mode="text",
        tokenizer=tokenizer,
        generate_kwargs={"max_new_tokens": 12, "ignore_eos": True},
        inplace=False,
    )
    texts = [f"{question} " for question in QUESTIONS]
    before: list[list[int]] = [[] for _ in texts]
    td = text_rows(*texts)
    for _ in range(4):
        out = policy(td)
        for row, tokens in zip(out.unbind(0), before, strict=True):
            assert row["tokens"].prompt.tolist()[: len(tokens)] == tokens
        before = [row["tokens"].full.tolist() for row in out.unbind(0)]
        texts = [row["text"].full for row in out.unbind(0)]
        td = out.set("text", text_rows(*texts)["text"])


def test_an_eos_that_the_user_writes_again(service: AsyncSGLang, tokenizer: Any) -> None:
    """Left out of the text, it is in the tokens all the same: once is enough."""
    policy = SGLangWrapper(
        service,
        input_mode="text",
        tokenizer=tokenizer,
        generate_kwargs={"regex": "hm", "max_new_tokens": 20, "no_stop_trim": False},
    )
    td = policy(TensorDict(text=Text(prompt=["hello", "no"], batch_size=2), batch_size=2))
    full = [row["tokens"].full.tolist() for row in td.unbind(0)]
    assert [ids[-1] for ids in full] == [tokenizer.eos_token_id] * 2
    texts = td["text"].full
    assert texts == ["hellohm", "nohm"]
    td["text"] = Text(prompt=[text + "<|im_end|>\nand?" for text in texts], batch_size=2)
    for row, tokens in zip(policy(td).unbind(0), full, strict=True):
        assert split(row)[0] == [*tokens, *tokenizer("\nand?")["input_ids"]]


@LAYOUTS
@pytest.mark.parametrize("mode", ["history", "text"])
def test_another_dialog_in_the_same_tensordict(
    service: AsyncSGLang, tokenizer: Any, mode: str, pad_output: bool
) -> None:
    """What is left of the dialog before does not leak into one that begins anew."""
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        tokenizer=tokenizer,
        generate_kwargs=SAMPLING,
        pad_output=pad_output,
    )

    def asked(*questions: str) -> TensorDict:
        if mode == "history":
            return chats(*[[{"role": "user", "content": q}] for q in questions])
        return text_rows(*questions)

    td = policy(asked("hello", "no"))
    td[mode] = asked("another", "one")[mode]
    for row, what in zip(policy(td).unbind(0), ("another", "one"), strict=True):
        prompt = f"<|im_start|>user\n{what}<|im_end|>\n<|im_start|>assistant\n"
        assert split(row)[0] == tokenizer(prompt if mode == "history" else what)["input_ids"]


def test_masks_of_the_dialog_before_do_not_cut_a_prompt(
    service: AsyncSGLang, tokenizer: Any
) -> None:
    """Even where they happen to be as long as the new prompt."""
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        tokenizer=tokenizer,
        generate_kwargs={"max_new_tokens": 5, "ignore_eos": True},
        pad_output=True,
    )
    pad = tokenizer.pad_token_id
    prompts = torch.tensor([[pad, pad, pad, 50, 51], [52, 53, 54, 55, 56]])
    td = policy(TensorDict(tokens=Tokens(prompt=prompts, batch_size=2), batch_size=2))
    masks = torch.stack([row["masks"].all_attention_mask for row in td.unbind(0)])
    assert masks.shape == (2, 10)
    assert not masks.all()
    new = torch.arange(60, 80).reshape(2, 10)
    td["tokens"] = Tokens(prompt=new, batch_size=2)
    assert [split(row)[0] for row in policy(td).unbind(0)] == new.tolist()
    # Masks that do belong to the prompt are followed, whatever the padding is.
    padded = torch.tensor([[0, 0, 50, pad, 60]])
    own = Masks(all_attention_mask=torch.tensor([[False, False, True, True, True]]), batch_size=1)
    td = TensorDict(tokens=Tokens(prompt=padded, batch_size=1), masks=own, batch_size=1)
    assert split(policy(td)[0])[0] == [50, pad, 60]


@LAYOUTS
def test_several_samples_of_a_turn(service: AsyncSGLang, tokenizer: Any, pad_output: bool) -> None:
    """Each sample is a dialog of its own from there on."""
    policy = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        generate_kwargs=SAMPLING,
        num_samples=3,
        pad_output=pad_output,
        inplace=False,
    )
    out = policy(chats([{"role": "user", "content": "hello"}], [{"role": "user", "content": "no"}]))
    env = ChatEnv(batch_size=(6,), tokenizer=tokenizer).append_transform(Ask())
    flat = out.reshape(-1)
    full = [[i for part in split(row) for i in part] for row in flat.unbind(0)]
    td = env.step_mdp(env.step(flat))
    single = policy.get_new_version(num_samples=None)
    for row, tokens in zip(single(td).unbind(0), full, strict=True):
        assert split(row)[0][: len(tokens)] == tokens


def test_text_that_goes_on_in_a_tensordict_of_its_own(service: AsyncSGLang, tokenizer: Any) -> None:
    """Nothing is carried: the policy knows the text where a special token follows the answer."""
    policy = SGLangWrapper(
        service, input_mode="text", tokenizer=tokenizer, generate_kwargs=SAMPLING, inplace=False
    )
    texts = ["the quick", "hello"]
    before: list[list[int]] = [[], []]
    for _ in range(3):
        out = policy(text_rows(*texts))
        for row, text, tokens in zip(out.unbind(0), texts, before, strict=True):
            prompt = row["tokens"].prompt.tolist()
            assert prompt[: len(tokens)] == tokens
            assert row["text"].prompt == text == tokenizer.decode(prompt)
        before = [row["tokens"].full.tolist() for row in out.unbind(0)]
        closed = [row["text"].full.removesuffix("<|im_end|>") for row in out.unbind(0)]
        texts = [text + "<|im_end|>\nand so on" for text in closed]


PLAIN = {"max_new_tokens": 3, "ignore_eos": True, "logit_bias": {0: -100.0, 1: -100.0, 2: -100.0}}


@pytest.mark.parametrize("said", ["", "e quick fox", " and so on", "\n", "h"])
def test_a_fresh_text_that_begins_like_an_earlier_turn(
    service: AsyncSGLang, tokenizer: Any, said: str
) -> None:
    """What a text becomes does not depend on what another was answered before."""
    policy = SGLangWrapper(
        service, input_mode="text", tokenizer=tokenizer, generate_kwargs=PLAIN, inplace=False
    )
    out = policy(text_rows("T"))
    fresh = out[0]["text"].full + said
    ids = tokenizer(fresh)["input_ids"]
    again = policy(text_rows(fresh))
    assert again[0]["tokens"].prompt.tolist() == ids
    # The same in a TensorDict that says so is the next turn.
    carried = lazy_stack([out[0].clone().set("text", Text(prompt=fresh, batch_size=()))])
    tokens = out[0]["tokens"].full.tolist()
    expected = [*tokens, *(tokenizer(said)["input_ids"] if said else [])]
    assert policy(carried)[0]["tokens"].prompt.tolist() == expected
    # And not where the environment began anew, and the old tokens were left.
    carried = carried.clone().set("is_init", torch.ones(1, 1, dtype=torch.bool))
    assert policy(carried)[0]["tokens"].prompt.tolist() == ids


def test_an_answer_without_text_is_followed_by_nothing(
    service: AsyncSGLang, tokenizer: Any
) -> None:
    """A text says nothing of it: the same prompt again is not the next turn."""
    policy = SGLangWrapper(
        service,
        input_mode="text",
        tokenizer=tokenizer,
        generate_kwargs={"logit_bias": {2: 100.0}, "no_stop_trim": False},
    )
    td = policy(text_rows("hello"))
    assert td[0]["tokens"].response.tolist() == [tokenizer.eos_token_id]
    assert td[0]["text"].full == "hello"
    prompt = tokenizer("hello")["input_ids"]
    for again in (td, text_rows("hello")):
        assert policy(again)[0]["tokens"].prompt.tolist() == prompt


def test_a_policy_that_was_copied(service: AsyncSGLang, tokenizer: Any) -> None:
    """A copy has no memory, and does with what the TensorDict carries."""
    policy = SGLangWrapper(service, tokenizer=tokenizer, generate_kwargs=SAMPLING)
    env = make_env(tokenizer)
    td = policy(env.reset())
    full = [[i for part in split(row) for i in part] for row in td.unbind(0)]
    copied = pickle.loads(pickle.dumps(policy))
    assert len(policy._settled.prompts.memory) == len(QUESTIONS)
    assert len(copied._settled.prompts.memory) == 0
    out = copied(env.step_mdp(env.step(td)))
    for row, tokens in zip(out.unbind(0), full, strict=True):
        assert split(row)[0][: len(tokens)] == tokens
    copied.service.shutdown()


# The memory


def a_turn(*ids: int, text: str = "", chat: Any = None) -> Turn:
    return Turn(ids=ids, text=text or repr(ids), chat=chat if chat is not None else ids)


def test_turns_are_found_by_tokens_and_by_chat() -> None:
    memory = TurnMemory()
    memory.keep(a_turn(1, 2, chat="c"))
    memory.keep(a_turn(3, 4, chat="c"))
    memory.keep(a_turn(5, chat="d"))
    assert list(memory.find("c").ids) == [3, 4]  # type: ignore[union-attr]  # the latest
    assert memory.with_tokens([1, 2]).chat == "c"  # type: ignore[union-attr]
    assert memory.with_tokens([1]) is None
    assert memory.find("e") is None
    assert len(memory) == 3


def test_the_memory_is_bounded() -> None:
    memory = TurnMemory(max_tokens=10)
    for index in range(6):
        memory.keep(a_turn(index, index, index))
    assert len(memory) == 3
    assert [memory.find((i, i, i)) is not None for i in range(6)] == [False] * 3 + [True] * 3
    assert len(memory._latest) == 3
    memory.find((3, 3, 3))  # used, so the next to go is another
    memory.keep(a_turn(9, 9, 9))
    assert memory.find((3, 3, 3)) is not None
    assert memory.with_tokens([4, 4, 4]) is None
    # The same turn again takes no more room; one that is too large is kept alone.
    for _ in range(20):
        memory.keep(a_turn(9, 9, 9))
    assert memory._num_tokens == sum(len(turn.ids) for turn in memory._turns.values()) <= 10
    memory.keep(a_turn(*range(50)))
    assert len(memory) == 1
    assert memory.find(tuple(range(50))) is not None


def test_the_longest_text_that_a_text_begins_with() -> None:
    memory = TurnMemory(max_tokens=40)
    texts = ["a", "ab", "abcd", "abce", "abd", "b", "ba", "abcdx"]
    for index, text in enumerate(texts):
        memory.keep(a_turn(index, 7, chat=text))
    memory.keep(a_turn(99, chat="abd"))
    memory.keep(a_turn(98, chat=("a", "tuple")))

    def begins(text: str) -> Any:
        turn = memory.begins(text, lambda turn: True)
        return None if turn is None else turn.chat

    made = ["".join(letters) for n in range(7) for letters in itertools.product("abcdx", repeat=n)]
    for text in made:
        expected = [known for known in texts if text.startswith(known)]
        assert begins(text) == (max(expected, key=len) if expected else None), text
        shorter = [known for known in expected if len(known) != 2]
        found = memory.begins(text, lambda turn: len(turn.chat) != 2)
        assert (found and found.chat) == (max(shorter, key=len) if shorter else None), text
    latest = memory.begins("abdd", lambda turn: True)
    assert list(latest.ids) == [99]  # type: ignore[union-attr]
    for index in range(100, 120):  # pushes all others out
        memory.keep(a_turn(index, 7, chat=str(index)))
    assert [begins(text) for text in made] == [None] * len(made)
    assert memory._texts == sorted(str(index) for index in range(100, 120))


def test_finding_a_beginning_is_quick_among_many() -> None:
    """Also among texts that are made to be looked at one by one."""
    memory = TurnMemory()
    for index in range(3000):
        memory.keep(a_turn(index, chat="x" * (5000 - index) + "a"))
    start = time.thread_time()
    assert memory.begins("x" * 5001, lambda turn: True) is None
    found = memory.begins("x" * 4000 + "abc", lambda turn: True)
    assert found.chat == "x" * 4000 + "a"  # type: ignore[union-attr]
    assert time.thread_time() - start < 0.5


def test_an_older_turn_that_goes_leaves_the_latest_of_its_chat() -> None:
    memory = TurnMemory(max_tokens=4)
    for ids in ([1, 1], [2, 2], [3, 3]):
        memory.keep(a_turn(*ids, chat="c"))
    assert memory.with_tokens([1, 1]) is None
    assert list(memory.find("c").ids) == [3, 3]  # type: ignore[union-attr]


def test_the_memory_in_many_threads() -> None:
    memory = TurnMemory(max_tokens=50)
    start = threading.Barrier(8)

    def use(seed: int) -> None:
        start.wait()
        for index in range(400):
            ids = (seed, index % 7, index % 3)
            memory.keep(a_turn(*ids, chat=index % 5))
            found = memory.find(index % 5)
            assert found is None or found.chat == index % 5
            known = memory.with_tokens(ids)
            assert known is None or tuple(known.ids) == ids

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert memory._num_tokens == sum(len(turn.ids) for turn in memory._turns.values()) <= 50
    assert set(memory._latest.values()) <= set(memory._turns)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_memory_is_empty(copier: Callable[[TurnMemory], TurnMemory]) -> None:
    memory = TurnMemory(max_tokens=7)
    memory.keep(a_turn(1, 2))
    copied = copier(memory)
    assert len(copied) == 0
    for index in range(9):
        copied.keep(a_turn(index))
    assert len(copied) == 7
    assert len(memory) == 1


def test_what_identifies_a_chat() -> None:
    one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat_key(one) == chat_key([dict(message) for message in one])
    others = [
        one[:1],
        [one[0], {"role": "assistant", "content": "c"}],
        [{"role": "system", "content": "a"}, one[1]],
        [one[0], {"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
        [one[0], {"role": "assistant", "content": "[{'type': 'text', 'text': 'b'}]"}],
        [one[0], one[1] | {"tool_calls": [{"function": {"name": "f"}}]}],
        [one[0], one[1] | {"tool_calls": [{"function": {"name": "g"}}]}],
        [one[0] | {"tool_responses": ["4"]}, one[1]],
        [one[0] | {"tool_responses": ["5"]}, one[1]],
    ]
    assert len({chat_key(chat) for chat in [one, *others]}) == 1 + len(others)


def test_what_says_nothing_of_a_chat() -> None:
    chat = [{"role": "user", "content": "a"}]
    for extra in ({"is_complete": True}, {"tool_calls": None}, {"tool_responses": []}):
        assert chat_key([chat[0] | extra]) == chat_key(chat)


def test_tokens_of_a_prompt_that_goes_on() -> None:
    def render(messages: Any, generate: bool) -> str:
        text = "".join(f"[{m['role']}:{m['content'].strip()}]" for m in messages)
        return text + ("[assistant:" if generate else "")

    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a "}]
    turn = Turn(ids=[1, 2, 3], text="[user:q][assistant: a ")
    prompt = render([*chat, {"role": "user", "content": "r"}], True)
    assert not prompt.startswith(turn.text)
    ids = continued(
        turn,
        [*chat, {"role": "user", "content": "r"}],
        1,
        prompt,
        render=render,
        encode=encode,
        after=lambda ids, text: encode(text),
        special=SpecialTokens(),
    )
    assert ids == [1, 2, 3, *encode("][user:r][assistant:")]
    assert SENTINEL not in prompt
