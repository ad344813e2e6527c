"""`SGLangWrapper`: modes, layouts, batch dimensions and outputs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tensordict import TensorDict, set_list_to_stack
from torchrl.modules.llm.policies import Tokens

from helpers.rows import check_row, make_input, rows_of
from torchrl_sglang import AsyncSGLang, SGLangWrapper

SAMPLING = {"max_new_tokens": 5, "ignore_eos": True}

SHAPES = [(), (6,), (2, 3)]


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
