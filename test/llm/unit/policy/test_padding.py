"""Which ids of a row are padding: what a mask, an option or the layout says, not a guess alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Masks, Tokens

from helpers.rows import EOS, PAD, dense, ragged
from torchrl_sglang.errors import EmptyPromptError, InputError
from torchrl_sglang.policy.prompts.chats import ChatFormat
from torchrl_sglang.policy.prompts.padding import Row, prompt_masks
from torchrl_sglang.policy.prompts.read import PromptSpec, read_prompts


def nested(*rows: list[int]) -> TensorDict:
    ids = torch.nested.nested_tensor([torch.tensor(r) for r in rows], layout=torch.jagged)
    return TensorDict({"tokens": TensorDict({"prompt": ids}, len(rows))}, len(rows))


class Named:
    """As much of a tokenizer as tokens mode looks at."""

    def __init__(self, pad: int, eos: int, bos: int | None) -> None:
        self.pad_token_id, self.eos_token_id, self.bos_token_id = pad, eos, bos


OWN_PAD = Named(PAD, EOS, None)

ONE_FOR_ALL = Named(EOS, EOS, EOS)  # as GPT-2 and Pythia have it

EOS_PADS = Named(EOS, EOS, 1)


def ids_of(td: Any, tokenizer: Any) -> list[list[int]]:
    chats = ChatFormat(tokenizer=tokenizer, template=None)
    spec = PromptSpec(mode="tokens", input_key=("tokens", "prompt"), chats=chats)
    return read_prompts(td, spec).ids


@pytest.mark.parametrize("tokenizer", [OWN_PAD, ONE_FOR_ALL, EOS_PADS, None])
@pytest.mark.parametrize("make", [ragged, nested])
def test_ragged_rows_have_no_padding(make: Any, tokenizer: Any) -> None:
    rows = [[EOS, 5, 6, 7], [PAD, 5, 6], [5, 6, PAD], [5, EOS], [EOS], [EOS, EOS, 5, PAD, PAD]]
    assert ids_of(make(*rows), tokenizer) == rows


@pytest.mark.parametrize(
    ("tokenizer", "rows", "expected"),
    [
        (OWN_PAD, [[PAD, 5, 6], [7, 8, 9]], [[5, 6], [7, 8, 9]]),
        (OWN_PAD, [[5, 6, PAD], [7, PAD, 9]], [[5, 6], [7, PAD, 9]]),
        (OWN_PAD, [[PAD, PAD, 6], [PAD, 8, 9]], [[6], [8, 9]]),  # part of a padded batch
        (OWN_PAD, [[EOS, 5, 6], [EOS, 8, 9]], [[EOS, 5, 6], [EOS, 8, 9]]),
        (ONE_FOR_ALL, [[EOS, 5, 6]], [[EOS, 5, 6]]),
        (ONE_FOR_ALL, [[EOS, EOS, 6], [EOS, 8, 9]], [[EOS, 6], [EOS, 8, 9]]),
        (ONE_FOR_ALL, [[EOS, EOS, 6], [7, 8, 9]], [[6], [7, 8, 9]]),
        (ONE_FOR_ALL, [[EOS]], [[EOS]]),
        (ONE_FOR_ALL, [[5, 6, EOS], [5, EOS, EOS]], [[5, 6, EOS], [5, EOS]]),
        (EOS_PADS, [[EOS, EOS, 6], [1, 8, 9]], [[6], [1, 8, 9]]),
        (None, [[PAD, 5, 6], [5, 6, PAD]], [[PAD, 5, 6], [5, 6, PAD]]),
    ],
)
def test_pads_at_the_ends_of_a_padded_tensor(
    tokenizer: Any, rows: list[list[int]], expected: list[list[int]]
) -> None:
    assert ids_of(dense(*rows), tokenizer) == expected


def test_what_tokens_say_of_themselves_comes_first() -> None:
    rows = [[PAD, 5, 6], [5, 6, PAD]]
    assert ids_of(dense(*rows, padded=False), OWN_PAD) == rows
    assert ids_of(ragged(*rows, padded=False), OWN_PAD) == rows
    assert ids_of(ragged(*rows, padded=True), OWN_PAD) == [[5, 6], [5, 6]]


@pytest.mark.parametrize("make", [ragged, dense])
@pytest.mark.parametrize("where", ["masks", "attention_mask"])
def test_a_mask_says_what_is_padding(make: Any, where: str) -> None:
    rows = [[PAD, EOS, 5, 6], [7, PAD, 8, PAD]]
    keep = torch.tensor([[False, True, True, True], [True, True, True, False]])
    td = make(*rows)
    if where == "masks":
        masks = Masks(all_attention_mask=keep, batch_size=2)
        td = lazy_stack([r.clone().set("masks", masks[i]) for i, r in enumerate(td.unbind(0))])
    else:
        td = lazy_stack([r.clone().set(where, keep[i].long()) for i, r in enumerate(td.unbind(0))])
    assert ids_of(td, ONE_FOR_ALL) == [[EOS, 5, 6], [7, PAD, 8]]


def test_rows_may_differ_in_what_they_have() -> None:
    """One row has a mask, another has none."""
    rows = [r.clone() for r in ragged([PAD, 5, 6], [PAD, 7]).unbind(0)]
    rows[0]["attention_mask"] = torch.tensor([0, 1, 1])
    assert ids_of(lazy_stack(rows), OWN_PAD) == [[5, 6], [PAD, 7]]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_row_without_ids_is_named(order: list[int]) -> None:
    rows = [ragged([5, 6])[0], TensorDict(other=torch.zeros(1))]
    td = lazy_stack([rows[index] for index in order])
    with pytest.raises(InputError, match=rf"rows \[{order.index(1)}\]"):
        ids_of(td, OWN_PAD)
    with pytest.raises(InputError, match="lacks"):
        ids_of(lazy_stack([rows[1], rows[1].clone()]), OWN_PAD)


@pytest.mark.parametrize(
    "ids", [torch.tensor([True, False]), torch.tensor([1.0]), torch.tensor([[1, 2]])]
)
def test_what_are_no_ids(ids: torch.Tensor) -> None:
    td = lazy_stack([TensorDict(tokens=Tokens(prompt=value)) for value in (torch.tensor([5]), ids)])
    with pytest.raises(InputError, match="row 1"):
        ids_of(td, OWN_PAD)


def test_padding_alone_is_an_empty_prompt() -> None:
    with pytest.raises(EmptyPromptError, match="prompt 0"):
        ids_of(dense([PAD, PAD], [5, 6]), OWN_PAD)


def test_the_callers_mask_comes_before_one_that_was_left_over() -> None:
    row = Row(ids=torch.tensor([0, 0, 5, 6]), padded=True)
    stale = TensorDict(all_attention_mask=torch.ones(1, 4, dtype=torch.bool), batch_size=1)
    td = TensorDict(
        masks=stale, attention_mask=torch.tensor([[False, False, True, True]]), batch_size=1
    )
    [mask] = prompt_masks(td, [row], "masks", "attention_mask")
    assert mask is not None
    assert mask.tolist() == [False, False, True, True]
    [mask] = prompt_masks(td.exclude("attention_mask"), [row], "masks", "attention_mask")
    assert mask is not None
    assert mask.all()
