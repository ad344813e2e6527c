"""Rows of TensorDicts: made, taken apart and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from helpers.prompts import QUESTIONS
from helpers.servers import hf_log_probs


def token_rows(*prompts: Sequence[int]) -> TensorDict:
    return lazy_stack(
        [
            TensorDict(tokens=Tokens(prompt=torch.tensor(p), batch_size=()), batch_size=())
            for p in prompts
        ]
    )


# A push that fails


def tokens_of(*ids: int) -> TensorDict:
    tokens = Tokens(prompt=torch.tensor(ids), batch_size=())
    return lazy_stack([TensorDict(tokens=tokens, batch_size=())])


PAD, EOS = 0, 2  # of the tiny model's tokenizer; 0 is also what separates documents


def ragged(*rows: list[int], **flags: Any) -> Any:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(r), **flags)) for r in rows])


def dense(*rows: list[int], **flags: Any) -> TensorDict:
    tokens = Tokens(prompt=torch.tensor(rows), batch_size=len(rows), **flags)
    return TensorDict(tokens=tokens, batch_size=len(rows))


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
    return shaped(rows, shape)


def shaped(rows: Sequence[TensorDict], shape: tuple[int, ...]) -> TensorDict:
    """Rows in a batch of a shape; the first alone for one without dimensions."""
    if not shape:
        return rows[0]
    stacked = lazy_stack(list(rows))
    return stacked if len(shape) == 1 else stacked.reshape(shape)


def rows_of(td: Any) -> list[Any]:
    if not td.batch_size:
        return [td]
    return list(td.reshape(-1).unbind(0)) if td.ndim > 1 else list(td.unbind(0))


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
