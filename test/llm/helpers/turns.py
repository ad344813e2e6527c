"""Dialogs of several turns in TorchRL's environments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from tensordict import TensorDictBase, lazy_stack
from torch.utils.data import DataLoader
from torchrl.data.llm import History
from torchrl.envs import InitTracker, StepCounter, Transform
from torchrl.envs.llm import ChatEnv

from helpers.prompts import QUESTIONS

LAYOUTS = pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])


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
