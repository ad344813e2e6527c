"""`SGLangWrapper`: modes, layouts, batch dimensions, and what it refuses."""

from __future__ import annotations

from helpers.prompts import QUESTIONS
import asyncio
from typing import Any

import pytest
import torch
from helpers.servers import hf_log_probs
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens, TransformersWrapper

from torchrl_sglang import AsyncSGLang, BehaviourLogProbWarning, SGLangWrapper
from torchrl_sglang.errors import (
    ConfigError,
    EmptyBatchError,
    EmptyPromptError,
    InputError,
    InputTypeError,
    PromptTooLongError,
    TokenizerError,
    UnsupportedOptionError,
)

SAMPLING = {"max_new_tokens": 5, "ignore_eos": True}
SHAPES = [(), (6,), (2, 3)]


def ragged_ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(question)["input_ids"] for question in QUESTIONS]


def make_input(mode: str, shape: tuple[int, ...], tokenizer: Any) -> TensorDict:
    """The same six prompts (or the first alone) in any mode and batch shape."""
    if mode == "history":
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        rows = [
            TensorDict(history=ChatHistory(prompt=history, batch_size=()), batch_size=())
            for history in History.from_chats(chats)
        ]
    elif mode == "text":
        rows = [TensorDict(text=Text(prompt=q, batch_size=()), batch_size=()) for q in QUESTIONS]
    else:
        rows = [
            TensorDict(tokens=Tokens(prompt=torch.tensor(ids), batch_size=()), batch_size=())
            for ids in ragged_ids(tokenizer)
        ]
    if not shape:
        return rows[0]
    stacked = lazy_stack(rows)
    return stacked if len(shape) == 1 else stacked.reshape(shape)


def rows_of(td: Any) -> list[Any]:
    if not td.batch_size:
        return [td]
    return list(td.reshape(-1).unbind(0)) if td.ndim > 1 else list(td.unbind(0))


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_every_mode_layout_and_shape(
    service: AsyncSGLang,
    tokenizer: Any,
    model: Any,
    mode: str,
    shape: tuple[int, ...],
    pad_output: bool,
) -> None:
    policy = SGLangWrapper(
        service, input_mode=mode, generate_kwargs=SAMPLING, pad_output=pad_output, inplace=False
    )
    out = policy(make_input(mode, shape, tokenizer))
    assert out.batch_size == torch.Size(shape)
    keys = {"text", "tokens", "masks", "log_probs", "rollout"}
    keys |= {"history"} if mode == "history" else set()
    assert set(out.keys()) == keys == set(policy.out_keys)
    for row in rows_of(out):
        check_row(row, tokenizer, model, mode, pad_output)


def check_row(row: Any, tokenizer: Any, model: Any, mode: str, padded: bool) -> None:
    """Everything in one row fits together, and its log-probs are a Hugging Face forward's."""
    tokens, masks, log_probs = row["tokens"], row["masks"], row["log_probs"]
    assert (tokens.padded, masks.padded, log_probs.padded) == (padded, padded, padded)
    prompt, response, full = tokens.prompt, tokens.response, tokens.full
    assert torch.equal(full, torch.cat([prompt, response]))
    attended, assistant = masks.all_attention_mask, masks.all_assistant_mask
    assert attended.dtype == assistant.dtype == torch.bool
    assert attended.shape == assistant.shape == full.shape == log_probs.full.shape
    # The sampled tokens are the last five attended ones, and nothing else is marked.
    assert assistant.nonzero().squeeze(-1).tolist() == attended.nonzero().squeeze(-1).tolist()[-5:]
    assert torch.equal(log_probs.full.isnan(), ~assistant if not padded else log_probs.full.isnan())
    assert log_probs.prompt.isnan().all()
    assert torch.equal(log_probs.full[assistant], log_probs.response[:5])
    prompt_ids = full[attended & ~assistant].tolist()
    expected = hf_log_probs(model, prompt_ids, full[assistant].tolist())
    torch.testing.assert_close(log_probs.response, torch.tensor(expected), atol=0.02, rtol=0)
    text = row["text"]
    assert text.prompt == tokenizer.decode(prompt_ids)
    assert text.response == tokenizer.decode(full[assistant])
    assert text.full == text.prompt + text.response
    if mode == "history":
        turns = row["history"].full
        assert turns.role == ["user", "assistant"]
        content = text.response.removesuffix(tokenizer.eos_token)
        assert row["history"].response.content == [content]
        assert text.prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_lists_need_not_stack(
    service: AsyncSGLang, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Sampling and scoring leave TensorDict's switch as the user has it, and work either way."""
    policy = SGLangWrapper(service, input_mode=mode, generate_kwargs=SAMPLING, inplace=False)
    scorer = policy.get_new_version(generate=False)
    td = make_input(mode, (6,), tokenizer)
    with set_list_to_stack(mode == "history"):  # TorchRL's own History wants it
        monkeypatch.setattr(set_list_to_stack, "__enter__", lambda self: pytest.fail("flipped"))
        out = policy(td)
        scored = scorer(out)
        asyncio.run(policy.agenerate(td))
    for row, score in zip(rows_of(out), rows_of(scored), strict=True):
        assert score["log_probs"].full.shape == score["tokens"].full.shape
        assert mode != "tokens" or torch.equal(score["tokens"].full, row["tokens"].full)
        assert mode != "text" or score["text"].full == row["text"].full


def test_padded_and_ragged_agree(service: AsyncSGLang, tokenizer: Any) -> None:
    greedy = {"max_new_tokens": 8, "temperature": 0.0}
    outs = [
        SGLangWrapper(service, input_mode="tokens", generate_kwargs=greedy, pad_output=pad)(
            make_input("tokens", (6,), tokenizer)
        )
        for pad in (False, True)
    ]
    for ragged, padded in zip(*(rows_of(out) for out in outs), strict=True):
        attended = padded["masks"].all_attention_mask
        assert torch.equal(ragged["tokens"].full, padded["tokens"].full[attended])
        kept = padded["log_probs"].full[attended]
        torch.testing.assert_close(
            ragged["log_probs"].full, kept, equal_nan=True, atol=0.01, rtol=0
        )
    prompts = outs[1]["tokens"].prompt
    assert prompts[3, 0] == tokenizer.pad_token_id  # prompts are padded on the left
    assert (prompts[:, -1] != tokenizer.pad_token_id).all()


def test_the_prompt_is_tokenised_once(service: AsyncSGLang, tokenizer: Any) -> None:
    """What is sent is what is returned: the server counts the same tokens."""
    policy = SGLangWrapper(service, input_mode="history", generate_kwargs=SAMPLING)
    seen: list[Any] = []
    complete = service.complete

    def record(batch: Any, *others: Any) -> Any:
        completions = complete(batch, *others)
        seen.extend(zip(batch, completions, strict=True))
        return completions

    policy.service = service
    service.complete = record  # type: ignore[method-assign]
    try:
        out = policy(make_input("history", (6,), tokenizer))
    finally:
        del service.complete
    for row, (request, completion) in zip(rows_of(out), seen, strict=True):
        assert request.text is None
        assert row["tokens"].prompt.tolist() == list(request.input_ids)
        assert completion.prompt_tokens == len(request.input_ids)
        assert row["tokens"].response.tolist() == completion.output_ids


def test_eos_is_kept_in_tokens_and_left_out_of_history(
    service: AsyncSGLang, tokenizer: Any
) -> None:
    sampling = {"max_new_tokens": 64, "logit_bias": {tokenizer.eos_token_id: 3.0}}
    policy = SGLangWrapper(service, generate_kwargs=sampling, inplace=False)
    ended = []
    for _ in range(20):
        out = policy(make_input("history", (6,), tokenizer))
        ended += [r for r in rows_of(out) if r["tokens"].response[-1] == tokenizer.eos_token_id]
        if ended:
            break
    row = ended[0]
    assert row["text"].response.endswith("<|im_end|>")
    assert "<|im_end|>" not in row["history"].response.content[0]
    assert row["masks"].all_assistant_mask[-1]


def test_left_padded_prompts_lose_their_padding(service: AsyncSGLang, tokenizer: Any) -> None:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = torch.tensor([[pad, pad, 50, eos, 60], [51, 52, 53, 54, 55]])
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs=SAMPLING)
    out = policy(TensorDict(tokens=Tokens(prompt=prompts, batch_size=2), batch_size=2))
    sent = [row["tokens"].prompt.tolist() for row in rows_of(out)]
    assert sent == [[50, eos, 60], [51, 52, 53, 54, 55]]


def test_an_attention_mask_decides_what_is_padding(service: AsyncSGLang, tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    td = TensorDict(
        tokens=Tokens(prompt=torch.tensor([[pad, pad, 50, 60]]), batch_size=1),
        attention_mask=torch.tensor([[False, True, True, True]]),
        batch_size=1,
    )
    out = SGLangWrapper(service, input_mode="tokens", generate_kwargs=SAMPLING)(td)
    assert out[0]["tokens"].prompt.tolist() == [pad, 50, 60]


@pytest.mark.parametrize("inplace", [True, False, "empty"])
def test_inplace(service: AsyncSGLang, tokenizer: Any, inplace: Any) -> None:
    policy = SGLangWrapper(service, input_mode="text", generate_kwargs=SAMPLING, inplace=inplace)
    td = make_input("text", (6,), tokenizer).set("other", torch.arange(6))
    out = policy(td)
    assert (out is td) == (inplace is True)
    assert ("other" in out) == (inplace is True)
    assert set(policy.out_keys) <= set(out.keys())


def test_tensordict_out(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, input_mode="text", generate_kwargs=SAMPLING)
    target = TensorDict(kept=torch.arange(6), batch_size=6)
    out = policy(make_input("text", (6,), tokenizer), tensordict_out=target)
    assert out is target
    assert set(out.keys()) == {"kept", *policy.out_keys}


def test_selected_outputs(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(
        service,
        input_mode="history",
        generate_kwargs=SAMPLING,
        text_key=None,
        masks_key=None,
        history_key=None,
        tokens_key=("agent", "tokens"),
        return_log_probs=False,
        rollout_key=None,
        inplace=False,
    )
    out = policy(make_input("history", (6,), tokenizer))
    assert policy.out_keys == [("agent", "tokens")]
    assert set(out.keys(True)) >= {"agent", ("agent", "tokens")}
    assert set(out.keys()) == {"agent"}


def test_sampling_options_per_call(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, input_mode="text", generate_kwargs=SAMPLING, inplace=False)
    td = make_input("text", (6,), tokenizer)
    first, second = (policy(td, temperature=0.0, max_new_tokens=3) for _ in range(2))
    for a, b in zip(rows_of(first), rows_of(second), strict=True):
        assert a["tokens"].response.tolist() == b["tokens"].response.tolist()
        assert len(a["tokens"].response) == 3


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")  # TorchRL's
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_structure_of_transformers_wrapper(
    service: AsyncSGLang, tokenizer: Any, model: Any, mode: str, pad_output: bool
) -> None:
    """Whatever TorchRL's own wrapper fills, ours fills with the same type, dtype and shape."""
    model.generation_config.min_new_tokens = 5  # which that wrapper does not pass on
    theirs = TransformersWrapper(
        model,
        tokenizer=tokenizer,
        input_mode=mode,
        generate_kwargs={"max_new_tokens": 5, "do_sample": True},
        chat_template=tokenizer.chat_template if mode == "history" else None,
        pad_output=pad_output,
        inplace=False,
    )
    ours = SGLangWrapper(
        service, input_mode=mode, generate_kwargs=SAMPLING, pad_output=pad_output, inplace=False
    )
    with set_list_to_stack(True):
        expected = theirs(make_input(mode, (6,), tokenizer))[1]
    got = ours(make_input(mode, (6,), tokenizer))[1]
    compared = 0
    for key, value in expected.items(True, True):
        if value is None:
            continue
        mine = got.get(key)
        if isinstance(value, torch.Tensor):
            assert mine.dtype == value.dtype, key
            if "full" in key or "prompt" in key:
                assert mine.shape == value.shape, key
            compared += 1
        else:
            assert type(mine) is type(value), key
    assert compared >= 4


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"pad_model_input": True}, "pad_model_input"),
        ({"layout": torch.jagged}, "layout"),
        ({"generate_kwargs": {"temprature": 1.0}}, "temperature"),
        ({"generate_kwargs": {"num_beams": 4}}, "beam"),
        ({"generate_kwargs": {"temperature": -1.0}}, "temperature"),
    ],
)
def test_unsupported_options_raise_at_construction(
    service: AsyncSGLang, kwargs: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match=match):
        SGLangWrapper(service, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"input_mode": "chat"},
        {"inplace": "yes"},
        {"pad_output": 1},
        {"chat_template": "x", "chat_template_name": "qwen"},
        {"tokenizer_kwargs": {"return_overflowing_tokens": True}},
        {
            "input_mode": "tokens",
            "text_key": None,
            "tokens_key": None,
            "masks_key": None,
            "log_probs_key": None,
            "rollout_key": None,
        },
    ],
)
def test_contradictions_raise_at_construction(service: AsyncSGLang, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SGLangWrapper(service, **kwargs)


def test_unknown_keyword_argument(service: AsyncSGLang) -> None:
    with pytest.raises(TypeError, match="generate_kwarg"):
        SGLangWrapper(service, generate_kwarg={})  # type: ignore[call-arg]


def test_truncation_is_told(service: AsyncSGLang) -> None:
    with pytest.warns(BehaviourLogProbWarning, match="top_p"):
        SGLangWrapper(service, generate_kwargs={"top_p": 0.9})


def test_no_tokenizer(service: AsyncSGLang, tmp_path: Any) -> None:
    with pytest.raises(TokenizerError, match="tokenizer="):
        SGLangWrapper(service, tokenizer=str(tmp_path))


def test_a_tokenizer_without_chat_template(service: AsyncSGLang, model_path: Any) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(model_path)
    plain.chat_template = None
    with pytest.raises(TokenizerError, match="chat_template"):
        SGLangWrapper(service, tokenizer=plain)
    assert SGLangWrapper(service, tokenizer=plain, chat_template_name="chatml_format")


def test_empty_batch(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens")
    td = TensorDict(
        tokens=Tokens(prompt=torch.zeros(0, 3, dtype=torch.int64), batch_size=0), batch_size=0
    )
    with pytest.raises(EmptyBatchError):
        policy(td)


def test_empty_prompt(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, input_mode="tokens")
    prompts = torch.tensor([[50, 60], [tokenizer.pad_token_id] * 2])
    with pytest.raises(EmptyPromptError, match="prompt 1"):
        policy(TensorDict(tokens=Tokens(prompt=prompts, batch_size=2), batch_size=2))


def test_prompt_longer_than_the_context(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens")
    prompts = torch.full((1, 4000), 50)
    with pytest.raises(PromptTooLongError, match="4000 tokens"):
        policy(TensorDict(tokens=Tokens(prompt=prompts, batch_size=1), batch_size=1))


def test_missing_and_wrong_input(service: AsyncSGLang) -> None:
    with pytest.raises(InputError, match="lacks"):
        SGLangWrapper(service)(TensorDict(other=torch.zeros(2), batch_size=2))
    floats = TensorDict(tokens=TensorDict(prompt=torch.rand(2, 3), batch_size=2), batch_size=2)
    with pytest.raises(InputError, match="float32"):
        SGLangWrapper(service, input_mode="tokens")(floats)
    words = TensorDict(history=TensorDict(prompt=torch.zeros(2), batch_size=2), batch_size=2)
    with pytest.raises(InputError, match="History"):
        SGLangWrapper(service)(words)


def test_input_of_another_type_is_a_type_error_too(service: AsyncSGLang) -> None:
    """TorchRL's wrappers raise TypeError; an `InputError` it is all the same."""
    for wrong in (ChatHistory(prompt="hello"), TensorDict(prompt=torch.zeros(2), batch_size=2)):
        with pytest.raises(TypeError, match="History") as raised:
            SGLangWrapper(service)(TensorDict(history=wrong, batch_size=2))
        assert isinstance(raised.value, InputTypeError)
        assert isinstance(raised.value, InputError)
    numbers = TensorDict(text=TensorDict(prompt=torch.zeros(2), batch_size=2), batch_size=2)
    with pytest.raises(TypeError, match="strings"):
        SGLangWrapper(service, input_mode="text")(numbers)


@pytest.mark.parametrize("strategy", ["", "_sft", "_rlhf", "_generic"])
def test_get_dist_is_refused(service: AsyncSGLang, strategy: str) -> None:
    policy = SGLangWrapper(service, generate=False)
    name = f"_get{strategy}_dist" if strategy else "get_dist"
    with pytest.raises(NotImplementedError, match="does not return logits"):
        getattr(policy, name)(TensorDict())


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_the_names_of_torchrl_s_wrappers(
    service: AsyncSGLang, tokenizer: Any, mode: str, generate: bool
) -> None:
    options = {"max_new_tokens": 7} if generate else None
    policy = SGLangWrapper(
        model=service, input_mode=mode, generate=generate, generate_kwargs=options, masks_key=None
    )
    assert policy.model is policy.service is service
    returned = {"text": policy.return_text, "tokens": policy.return_tokens}
    returned |= {"masks": policy.return_masks, "history": policy.return_history}
    assert returned == {key: key in policy.out_keys for key in returned}
    assert policy.generate_kwargs == (options or {})
    assert policy.sampling_params.max_tokens == (7 if generate else 128)
    assert policy.tokenizer_kwargs == {}
    assert policy.chat_template == (tokenizer.chat_template if mode == "history" else None)
    assert policy.chat_template_name is None
    assert policy.attention_mask_key == "attention_mask"
    assert policy.padding_value == tokenizer.pad_token_id
    assert policy.pad_model_input is False


def test_the_names_follow_what_was_given(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(
        service,
        chat_template_name="qwen",
        attention_mask_key=("mine", "mask"),
        tokenizer_kwargs={"add_special_tokens": False},
    )
    for wrapper in (policy, policy.get_new_version(model=service)):
        assert wrapper.chat_template_name == "qwen"
        assert "<tool_call>" in wrapper.chat_template
        assert wrapper.attention_mask_key == ("mine", "mask")
        assert wrapper.tokenizer_kwargs == {"add_special_tokens": False}


def test_the_service_under_one_of_its_names(service: AsyncSGLang) -> None:
    assert SGLangWrapper(model=service.server_url).service is service
    for both in ({"service": service, "model": service}, {}):
        with pytest.raises(ConfigError, match="exactly one"):
            SGLangWrapper(**both)
    with pytest.raises(ConfigError, match="an AsyncSGLang or the URL"):
        SGLangWrapper(torch.nn.Linear(1, 1))


def test_a_tokenizer_that_cleans_spaces_up(service: AsyncSGLang, model_path: Any) -> None:
    from transformers import AutoTokenizer

    cleaning = AutoTokenizer.from_pretrained(model_path, clean_up_tokenization_spaces=True)
    policy = SGLangWrapper(service, tokenizer=cleaning, input_mode="text", generate_kwargs=SAMPLING)
    out = policy(make_input("text", (6,), cleaning))
    for row in rows_of(out):
        ids = row["tokens"].response.tolist()
        assert row["text"].response == cleaning.decode(ids, skip_special_tokens=False)
