"""Several turns where a template changes answers, or one text has several tokens."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens

from helpers.marks import LISTS_STACK, QUIET
from helpers.prompts import QUESTIONS
from helpers.servers import needs_xgrammar
from helpers.turns import LAYOUTS, Ask, dialogs_of, drifted, make_env, split
from torchrl_sglang import AsyncSGLang, SGLangWrapper

pytestmark = [*QUIET, LISTS_STACK]


SAMPLING = {"max_new_tokens": 24}


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
