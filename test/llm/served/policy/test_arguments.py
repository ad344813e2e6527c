"""`SGLangWrapper`: its arguments, their names, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, set_list_to_stack
from torchrl.modules.llm.policies import ChatHistory, Tokens, TransformersWrapper

from helpers.rows import make_input, rows_of
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
