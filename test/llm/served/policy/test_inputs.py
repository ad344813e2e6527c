"""What users hand in: taken as they mean it, or refused before anything is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens
from transformers import AutoTokenizer

from helpers.rows import EOS, dense, ragged
from helpers.servers import hf_log_probs
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.errors import (
    ConfigError,
    EmptyPromptError,
    InputError,
    InputTypeError,
    TokenizerError,
)

SAMPLING = {"max_new_tokens": 4, "ignore_eos": True}
# Without the end of a turn, which a message leaves out of a text.
UNENDED = {**SAMPLING, "logit_bias": {2: -100.0}}

HI, GO = {"role": "user", "content": "hi"}, {"role": "user", "content": "go on"}

OPEN = "'<|im_start|>' + m['role'] + '\\n'"

CHATML = (
    "{% for m in messages %}{{ " + OPEN + " + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def asked(*chats: list[dict[str, Any]], part: str = "prompt") -> TensorDict:
    history = ChatHistory(**{part: History.from_chats(list(chats))}, batch_size=len(chats))
    return TensorDict(history=history, batch_size=len(chats))


def texts(*rows: Any) -> Any:
    return lazy_stack([TensorDict(text=Text(prompt=row)) for row in rows])


def tokens(*rows: list[int]) -> Any:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(row))) for row in rows])


@pytest.fixture
def sent(service: AsyncSGLang, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every request that goes to a server."""
    requests: list[Any] = []
    complete = service.complete

    def recorded(batch: Any, *args: Any) -> Any:
        requests.extend(batch)
        return complete(batch, *args)

    monkeypatch.setattr(service, "complete", recorded)
    return requests


def own_tokenizer(model_path: Any, **changes: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


# Where the outputs go


def test_a_locked_tensordict_is_refused_before_anything_is_sent(
    service: AsyncSGLang, sent: list[Any]
) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=SAMPLING)
    for call in (policy, policy.resume, lambda td: asyncio.run(policy.agenerate(td))):
        with pytest.raises(InputError, match="locked"):
            call(tokens([5, 6]).lock_())
    with pytest.raises(InputError, match="locked"):
        policy(tokens([5, 6]), tensordict_out=TensorDict(batch_size=1).lock_())
    assert sent == []
    for inplace in (False, "empty"):
        out = policy.get_new_version(inplace=inplace)(tokens([5, 6]).lock_())
        assert out[0]["tokens"].response.shape == (4,)


def test_outputs_that_have_no_place(service: AsyncSGLang, sent: list[Any]) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=SAMPLING)
    with pytest.raises(InputError, match=r"batch size \(1,\).*\(3,\)"):
        policy(tokens([5, 6]), tensordict_out=TensorDict(batch_size=3))
    samples = policy.get_new_version(num_samples=2)
    with pytest.raises(InputError, match=r"\(1, 2\)"):
        samples(tokens([5, 6]), tensordict_out=TensorDict(batch_size=1))
    assert samples(tokens([5, 6]), tensordict_out=TensorDict(batch_size=(1, 2))).shape == (1, 2)
    sent.clear()
    nested = policy.get_new_version(text_key=("a", "text"))
    with pytest.raises(InputError, match="value of its own"):
        nested(tokens([5, 6]).set("a", torch.zeros(1)))
    assert sent == []


@pytest.mark.parametrize("given", ["hello", ["hello"], {"text": "hello"}, None])
def test_what_is_no_tensordict(service: AsyncSGLang, given: Any) -> None:
    for inplace in (None, False):
        policy = SGLangWrapper(service, input_mode="text", inplace=inplace)
        with pytest.raises(InputTypeError, match=r"called with a TensorDict"):
            policy(given)


# Text


@pytest.mark.parametrize("mode", ["history", "text"])
def test_half_a_character_is_refused(service: AsyncSGLang, sent: list[Any], mode: str) -> None:
    broken = "ab\ud83dcd"
    policy = SGLangWrapper(service, input_mode=mode, generate_kwargs=SAMPLING)
    td = texts("fine", broken) if mode == "text" else asked([HI], [{**HI, "content": broken}])
    with pytest.raises(InputError, match="row 1 has half a character"):
        policy(td)
    scorer = policy.get_new_version(generate=False, input_key=(mode, "prompt"))
    with pytest.raises(InputError, match="row 1"):
        scorer(td)
    assert sent == []


def test_rows_that_differ_in_what_they_hold(service: AsyncSGLang, sent: list[Any]) -> None:
    for mode, td in (
        ("text", texts("fine")),
        ("history", asked([HI])),
        ("tokens", tokens([5, 6])),
    ):
        policy = SGLangWrapper(service, input_mode=mode, generate_kwargs=SAMPLING)
        for rows in ([td[0], TensorDict(x=1)], [TensorDict(x=1), td[0]]):
            with pytest.raises(InputError, match="of the batch lack"):
                policy(lazy_stack([row.clone() for row in rows]))
    with pytest.raises(InputTypeError, match="row 1 is a"):
        SGLangWrapper(service, input_mode="text")(texts("fine", 3))
    assert sent == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_that_is_truncated_says_what_its_tokens_say(
    service: AsyncSGLang, model_path: Any, side: str
) -> None:
    tokenizer = own_tokenizer(model_path, truncation_side=side)
    policy = SGLangWrapper(
        service,
        input_mode="text",
        tokenizer=tokenizer,
        tokenizer_kwargs={"truncation": True, "max_length": 3},
        generate_kwargs=SAMPLING,
    )
    td = policy(texts("a", "a policy acts, the environment answers"))
    for row in td.unbind(0):
        assert len(row["tokens"].prompt) <= 3
        assert row["text"].prompt == tokenizer.decode(row["tokens"].prompt)
        assert row["text"].full == row["text"].prompt + row["text"].response
    # A turn that goes on has no more room than another.
    again = policy(td.set("text", texts(*[full + " and" for full in td["text"].full])["text"]))
    assert all(len(row["tokens"].prompt) <= 3 for row in again.unbind(0))


# Chats


def test_messages_without_content(service: AsyncSGLang, tokenizer: Any) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    template = (
        "{% for m in messages %}{{ " + OPEN + " + m['content'] }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, chat_template=template, generate_kwargs=SAMPLING
    )
    chat = [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat.append({"role": "tool", "content": "2"})
    prompt = policy(asked(chat))[0]["text"].prompt
    assert '<|im_start|>assistant\n{"name": "add"' in prompt
    scorer = policy.get_new_version(generate=False, inplace=False)
    row = scorer(asked(chat, part="full"))[0]
    said = tokenizer.decode(row["tokens"].full[row["masks"].all_assistant_mask])
    assert said == '{"name": "add", "arguments": {"a": 1}}<|im_end|>'


def test_chats_that_a_template_refuses(service: AsyncSGLang, sent: list[Any]) -> None:
    refuses = "{{ raise_exception('roles must alternate') }}" + CHATML
    with pytest.raises(InputError, match=r"row 0.*roles must alternate"):
        SGLangWrapper(service, chat_template=refuses)(asked([HI]))
    fails = CHATML.replace("m['content']", "m['missing'] + m['content']")
    with pytest.raises(InputError, match="row 0"):
        SGLangWrapper(service, chat_template=fails)(asked([HI]))
    silent = "{% for m in messages %}{% endfor %}"
    with pytest.raises(EmptyPromptError, match="prompt 0"):
        SGLangWrapper(service, chat_template=silent)(asked([HI]))
    assert sent == []


def test_a_tokenizer_with_several_templates(service: AsyncSGLang, model_path: Any) -> None:
    named = {"default": CHATML, "tool_use": CHATML.replace("assistant", "caller"), "short": "hi"}
    tokenizer = own_tokenizer(model_path, chat_template=named)

    def prompt(**kwargs: Any) -> str:
        policy = SGLangWrapper(service, tokenizer=tokenizer, generate_kwargs=SAMPLING, **kwargs)
        return str(policy(asked([HI]))[0]["text"].prompt)

    assert prompt().endswith("assistant\n")
    assert prompt(tokenizer_kwargs={"tools": [{"name": "add"}]}).endswith("caller\n")
    assert prompt(chat_template="short") == "hi"
    assert prompt(tokenizer_kwargs={"chat_template": "short"}) == "hi"
    with pytest.raises(TokenizerError, match=r"\['one', 'two'\]"):
        SGLangWrapper(
            service, tokenizer=own_tokenizer(model_path, chat_template={"one": "1", "two": "2"})
        )
    with pytest.raises(TokenizerError, match="list"):
        SGLangWrapper(service, tokenizer=own_tokenizer(model_path, chat_template=[CHATML]))
    for template in (7, {"a": "b"}):
        with pytest.raises(ConfigError, match="Jinja"):
            SGLangWrapper(service, tokenizer=tokenizer, chat_template=template)
    with pytest.raises(ConfigError, match="no Jinja"):
        SGLangWrapper(service, tokenizer=tokenizer, chat_template="{% for %}")


def test_options_for_the_template(service: AsyncSGLang) -> None:
    template = CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}"

    def policy(**kwargs: Any) -> SGLangWrapper:
        return SGLangWrapper(
            service, chat_template=template, generate_kwargs=SAMPLING, tokenizer_kwargs=kwargs
        )

    assert policy()(asked([HI]))[0]["text"].prompt.endswith("assistant\n")
    quiet = policy(enable_thinking=False)
    assert quiet(asked([HI]))[0]["text"].prompt.endswith("<think></think>")
    plain = policy(
        padding=True, return_tensors="pt", add_generation_prompt=True, add_special_tokens=False
    )
    assert plain(asked([HI]))[0]["text"].prompt.endswith("assistant\n")
    for wrong, said in (
        ({"enable_thinkin": False}, r"'enable_thinkin'.*enable_thinking"),
        ({"truncation": True}, "truncation"),
        ({"max_length": 7}, "max_length"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"add_special_tokens": True}, "add_special_tokens"),
    ):
        with pytest.raises(ConfigError, match=said):
            policy(**wrong)


# A message that is continued


def begun(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_the_last_message_is_continued(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, generate_kwargs=UNENDED, continue_final_message=True
    )
    out = policy(asked([HI, begun("The answer")], [HI]))
    one, other = out.unbind(0)
    assert one["text"].prompt.endswith("<|im_start|>assistant\nThe answer")
    assert other["text"].prompt.endswith("<|im_start|>assistant\n")
    assert one["history"].full.role == ["user", "assistant"]
    whole = "The answer" + one["text"].response
    assert one["history"].full.content[-1] == one["history"].response.content[0] == whole
    assert one["history"].prompt.content == ["hi", "The answer"]
    assert other["history"].full.content == ["hi", other["text"].response]
    # The turn is known by its whole message.
    chat = [HI, begun(whole), GO]
    prompt = policy(asked(chat))[0]["tokens"].prompt.tolist()
    ids = one["tokens"].full.tolist()
    assert prompt[: len(ids)] == ids
    assert tokenizer.decode(prompt[len(ids) :]).startswith("<|im_end|>\n<|im_start|>user\ngo on")
    again = SGLangWrapper(
        service,
        tokenizer=tokenizer,
        generate_kwargs=SAMPLING,
        tokenizer_kwargs={"continue_final_message": True},
    )
    assert again(asked([HI, begun("x")]))[0]["text"].prompt.endswith("assistant\nx")


def test_what_can_not_be_continued(service: AsyncSGLang) -> None:
    for kwargs in ({"input_mode": "text"}, {"input_mode": "tokens"}, {"generate": False}):
        with pytest.raises(ConfigError, match="continue_final_message"):
            SGLangWrapper(service, continue_final_message=True, **kwargs)
    policy = SGLangWrapper(service, generate_kwargs=SAMPLING)
    text = policy(asked([HI, begun("x")]))[0]["text"].prompt
    assert text.endswith("x<|im_end|>\n<|im_start|>assistant\n")


def test_samples_of_a_message_that_is_continued(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(
        service, generate_kwargs=UNENDED, continue_final_message=True, num_samples=2
    )
    out = policy(asked([HI, begun("The")]))
    for row in out[0].unbind(0):
        assert row["history"].full.content == ["hi", "The" + row["text"].response]


# Tokens that are there already


def test_tokens_of_another_prompt_are_not_used(service: AsyncSGLang, tokenizer: Any) -> None:
    """`prefer_tokens` in a loop that adds messages and leaves the first turn's tokens."""
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, generate_kwargs=SAMPLING, prefer_tokens=True
    )
    td = policy(asked([HI], [GO]))
    for _ in range(3):
        before = [row["tokens"].full.tolist() for row in td.unbind(0)]
        chats = [[*row["history"].full.tolist(tolist_first=True), GO] for row in td.unbind(0)]
        td = td.set("history", asked(*chats)["history"])
        td = policy(td)
        for row, ids in zip(td.unbind(0), before, strict=True):
            prompt = row["tokens"].prompt.tolist()
            assert prompt[: len(ids)] == ids
            assert tokenizer.decode(prompt[len(ids) :]).startswith(
                "<|im_end|>\n<|im_start|>user\ngo"
            )


def test_tokens_of_this_prompt_are_used(service: AsyncSGLang, tokenizer: Any) -> None:
    """Row by row: of those that say what the chat says, whatever their tokens are."""
    the = {"role": "user", "content": "the"}
    text = tokenizer.apply_chat_template([the], add_generation_prompt=True, tokenize=False)
    usual = tokenizer(text, add_special_tokens=False)["input_ids"]
    before, after = text.split("the")
    pieces = [before, *"the", after]
    other = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    assert other != usual
    assert tokenizer.decode(other) == text
    ready = [other, [5, 6, 7], usual, other]
    rows = []
    for ids, row in zip(ready, asked([the], [the], [the], [GO]).unbind(0), strict=True):
        rows.append(row.clone().set("tokens", Tokens(prompt=torch.tensor(ids))))
    rows.append(asked([the])[0].clone())
    policy = SGLangWrapper(
        service, tokenizer=tokenizer, generate_kwargs=SAMPLING, prefer_tokens=True, inplace=False
    )
    out = policy(lazy_stack(rows))
    prompts = [row["tokens"].prompt.tolist() for row in out.unbind(0)]
    go = tokenizer(text.replace("the", "go on"), add_special_tokens=False)["input_ids"]
    assert prompts == [other, usual, usual, go, usual]


def test_turns_can_be_rendered_anew(service: AsyncSGLang, tokenizer: Any) -> None:
    for mode in ("history", "text"):
        policy = SGLangWrapper(
            service,
            input_mode=mode,
            tokenizer=tokenizer,
            generate_kwargs={"max_new_tokens": 12, "ignore_eos": True},
            carry_turns=False,
        )
        drifted = 0
        questions = [f"say {i}" for i in range(6)]
        if mode == "history":
            td = policy(asked(*[[{**HI, "content": q}] for q in questions]))
            chats = [[*r["history"].full.tolist(tolist_first=True), GO] for r in td.unbind(0)]
            before = [row["tokens"].full.tolist() for row in td.unbind(0)]
            td = policy(td.set("history", asked(*chats)["history"]))
        else:
            td = policy(texts(*questions))
            before = [row["tokens"].full.tolist() for row in td.unbind(0)]
            td = policy(td.set("text", texts(*[t + " go" for t in td["text"].full])["text"]))
        for row, ids in zip(td.unbind(0), before, strict=True):
            prompt = row["tokens"].prompt.tolist()
            assert prompt == tokenizer(row["text"].prompt, add_special_tokens=False)["input_ids"]
            drifted += prompt[: len(ids)] != ids
        assert drifted > 0  # what was sampled is rarely what the tokenizer gives


def test_a_bos_that_looks_like_a_pad_is_sent(
    service: AsyncSGLang, model_path: Any, model: Any
) -> None:
    """With the log-probs of what it belongs to, generating and scoring."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        tokenizer=tokenizer,
        generate_kwargs={"max_new_tokens": 4, "ignore_eos": True},
        inplace=False,
    )
    for td in (ragged([EOS, 5, 6, 7]), dense([EOS, 5, 6, 7])):
        out = policy(td)[0]
        assert out["tokens"].prompt.tolist() == [EOS, 5, 6, 7]
        expected = hf_log_probs(model, [EOS, 5, 6, 7], out["tokens"].response.tolist())
        torch.testing.assert_close(
            out["log_probs"].response, torch.tensor(expected), atol=0.02, rtol=0
        )
    scorer = policy.get_new_version(generate=False)
    rows = [TensorDict(tokens=Tokens(full=torch.tensor(r))) for r in ([EOS, 5, 6, 7], [EOS, 8])]
    scores = scorer(lazy_stack(rows))
    for row, ids in zip(scores.unbind(0), ([EOS, 5, 6, 7], [EOS, 8]), strict=True):
        assert row["tokens"].full.tolist() == ids
        expected = torch.tensor(hf_log_probs(model, ids[:1], ids[1:]))
        torch.testing.assert_close(row["log_probs"].full[1:], expected, atol=0.02, rtol=0)
