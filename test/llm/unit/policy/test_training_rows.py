"""One row per conversation: what goes on, where it ends, and its rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from helpers.marks import QUIET
from torchrl_sglang import conversations
from torchrl_sglang.errors import ConfigError, EmptyBatchError, InputError

pytestmark = QUIET


def step(prompt: list[int], answer: list[int], reward: Any = 1.0, done: bool = False) -> TensorDict:
    ids = torch.tensor([*prompt, *answer])
    mask = torch.arange(len(ids)) >= len(prompt)
    log_probs = torch.where(mask, -ids.float(), torch.nan)
    reward = torch.tensor(reward).view(-1) if not isinstance(reward, torch.Tensor) else reward
    return TensorDict(
        {
            "tokens": Tokens(full=ids),
            "masks": Masks(all_attention_mask=torch.ones_like(mask), all_assistant_mask=mask),
            "log_probs": LogProbs(full=log_probs),
            "kind": f"kind {prompt[0]}",
            "next": TensorDict({"reward": reward, "done": torch.tensor([done])}),
        }
    )


def test_a_conversation_ends_where_it_is_done() -> None:
    steps = [
        step([1, 2], [3], done=True),
        step([1, 2], [3]),
        step([1, 2, 3, 4], [5, 6], 2.0, done=True),
        step([7], [8]),
    ]
    rows = list(conversations(lazy_stack(steps)).unbind(0))
    assert [row["tokens"].full.tolist() for row in rows] == [[1, 2, 3], [1, 2, 3, 4, 5, 6], [7, 8]]
    assert [row["next", "reward"].item() for row in rows] == [1.0, 3.0, 1.0]
    assert [bool(row["next", "done"]) for row in rows] == [True, True, False]
    assert [row["kind"] for row in rows] == ["kind 1", "kind 1", "kind 7"]
    mask = rows[1]["masks"].all_assistant_mask
    assert mask.tolist() == [False, False, True, False, True, True]
    assert rows[1]["log_probs"].full[mask].tolist() == [-3.0, -5.0, -6.0]
    assert "rollout" not in rows[1].keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        (step([1, 2, 3], [4]), 1),  # nothing in between
        (step([1, 2, 9, 4], [5]), 2),  # another token where one was sampled
        (step([1, 2], [3, 4]), 2),  # asked the same again: the answer is not its prompt's
        (step([2, 3], [4]), 2),
        (step([1, 2, 3], []), 1),  # aborted before it began
    ],
)
def test_what_goes_on(second: TensorDict, parts: int) -> None:
    rows = conversations(lazy_stack([step([1, 2], [3]), second]))
    assert len(rows) == parts


def test_rewards_per_token_are_summed() -> None:
    steps = [step([1, 2], [3], torch.ones(1, 1)), step([1, 2, 3], [4, 5], torch.ones(2, 1))]
    assert conversations(lazy_stack(steps))[0]["next", "reward"].tolist() == [3.0]
    rows = conversations(lazy_stack(steps), rewards="turns")
    assert rows[0]["next", "reward"].tolist() == [[1.0], [2.0]]


def test_more_dimensions_and_other_keys() -> None:
    steps = [step([1, 2], [3]), step([1, 2, 3], [4])]
    batch = lazy_stack([lazy_stack([lazy_stack(steps)] * 2)] * 3)
    assert batch.batch_size == (3, 2, 2)
    assert len(conversations(batch)) == 6
    renamed = lazy_stack([s.rename_key_("tokens", "ids") for s in map(TensorDict.clone, steps)])
    assert conversations(renamed, tokens_key="ids")[0]["ids"].full.tolist() == [1, 2, 3, 4]


def test_what_is_no_rollout() -> None:
    good = step([1, 2], [3])
    with pytest.raises(InputError, match="dimension of turns"):
        conversations(good)
    with pytest.raises(ConfigError, match="rewards"):
        conversations(lazy_stack([good]), rewards="mean")  # type: ignore[arg-type]
    for missing in ("tokens", "masks", "log_probs", ("next", "reward"), ("next", "done")):
        with pytest.raises(InputError, match="no tensor under"):
            conversations(lazy_stack([good.clone().exclude(missing)]))
    odd = good.clone()
    odd["masks"].all_assistant_mask = torch.tensor([True, False, True])
    with pytest.raises(InputError, match="not sampled behind"):
        conversations(lazy_stack([odd]))
    with pytest.raises(EmptyBatchError):
        conversations(lazy_stack([lazy_stack([good])])[:0])
