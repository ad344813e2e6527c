"""Joins the turns of a rollout to one row per conversation, with each sampled token in it once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import (
    LazyStackedTensorDict,
    MetaData,
    NestedKey,
    TensorDict,
    TensorDictBase,
    is_tensor_collection,
    lazy_stack,
)
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from ..errors import ConfigError, EmptyBatchError, InputError
from .outputs.texts import non_tensor
from .prompts.padding import below

Rewards = Literal["sum", "turns"]
REWARDS: tuple[Rewards, ...] = ("sum", "turns")
NOT_SAMPLED = -1  # in place of a turn or a version

# Of a step, what is made anew, or is not the conversation's.
_MADE = ("tokens", "masks", "log_probs", "text", "history", "rollout")


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Where the outputs of the policy and of the environment are."""

    tokens: NestedKey
    masks: NestedKey
    log_probs: NestedKey
    rollout: NestedKey | None
    reward: NestedKey
    done: NestedKey


@dataclass(kw_only=True)
class _Turn:
    """One step: its ids, which of them were sampled, and what belongs to these."""

    step: TensorDictBase
    ids: torch.Tensor
    sampled: torch.Tensor
    log_probs: torch.Tensor
    versions: torch.Tensor | None


@dataclass(kw_only=True)
class _Row:
    """Turns that go on from each other: the tokens of each are the beginning of the next's."""

    turns: list[_Turn] = field(default_factory=list)

    def goes_on(self, turn: _Turn) -> bool:
        """Whether a turn's prompt begins with all tokens of the row so far."""
        if not self.turns:
            return True
        before = self.turns[-1].ids
        num_prompt = int((~turn.sampled).cumprod(0).sum())
        return len(before) <= num_prompt and torch.equal(turn.ids[: len(before)], before)


def conversations(
    batch: TensorDictBase,
    *,
    rewards: Rewards = "sum",
    tokens_key: NestedKey = "tokens",
    masks_key: NestedKey = "masks",
    log_probs_key: NestedKey = "log_probs",
    rollout_key: NestedKey | None = "rollout",
    reward_key: NestedKey = ("next", "reward"),
    done_key: NestedKey = ("next", "done"),
) -> LazyStackedTensorDict:
    """Rows for training on whole conversations, made of a rollout of their turns.

    A collector's batch has one row per turn, of which each trains the tokens that it sampled. Here
    the turns of a conversation become one row, in which every token stands once and every token
    that was sampled, in any turn, is marked. What users, tools and templates wrote is not.

    A turn whose prompt does not begin with the tokens of the turn before (a template that drops
    thoughts and a policy with ``carry_turns=False``, or an environment that rewrites messages)
    starts a row of its own: no token is marked that the model had not before it when it was
    sampled. ``("conversation", "part")`` counts these rows.

    Args:
        batch: ``[*batch, turns]``, as TorchRL's ``env.rollout`` and ``LLMCollector`` give it; a
            conversation ends where ``done_key`` is True, or with the batch.
        rewards: ``"sum"``: of all turns of the conversation, in each of its rows; ``"turns"``: one
            for each turn of the row.
        tokens_key: where the policy wrote its tokens.
        masks_key: where it wrote its masks.
        log_probs_key: where it wrote its log-probs.
        rollout_key: where it wrote the rows' facts; None: the versions are left out.
        reward_key: where the environment wrote rewards.
        done_key: where it wrote what is done.

    Returns:
        A lazy stack of rows of ``T`` tokens each: ``tokens.full`` int64 ``[T]``;
        ``masks.all_assistant_mask`` bool ``[T]``, True for sampled tokens;
        ``masks.all_attention_mask`` bool ``[T]``, True; ``log_probs.full`` float32 ``[T]``, NaN for
        the others; ``rollout.policy_version`` int64 ``[T]``, -1 for the others; the reward under
        ``reward_key``, of a turn's shape, or with a dimension of turns before it; the other keys of
        the last turn's ``"next"``;
        ``history.full`` and ``text.full`` of the last turn; the input's own keys of the first; and
        ``conversation``: ``index`` int64 ``[]`` of the conversation, ``part`` and ``num_parts`` of
        the row in it, ``num_turns`` of the row, and ``turn`` int64 ``[T]``, the turn of the row
        that sampled each token, -1 for the others.

    Raises:
        InputError: something is missing, or no turns.
        ConfigError: an unknown kind of rewards.
    """
    if rewards not in REWARDS:
        raise ConfigError(f"rewards must be one of {REWARDS}, got {rewards!r}.")
    if batch.ndim == 0:
        raise InputError("a rollout has a dimension of turns; got a TensorDict without any.")
    if 0 in batch.batch_size:
        raise EmptyBatchError(f"the batch is empty: batch size {tuple(batch.batch_size)}.")
    keys = _Keys(
        tokens=tokens_key,
        masks=masks_key,
        log_probs=log_probs_key,
        rollout=rollout_key,
        reward=reward_key,
        done=done_key,
    )
    rows = []
    for index, steps in enumerate(_episodes(batch, keys)):
        parts = _parts([_read(step, keys) for step in steps])
        total = torch.stack(_rewards(steps, keys)).sum(0)
        for number, part in enumerate(parts):
            place = {"index": index, "part": number, "num_parts": len(parts)}
            rows.append(_row(part, place, total if rewards == "sum" else None, keys))
    return lazy_stack(rows)


def _episodes(batch: TensorDictBase, keys: _Keys) -> Iterator[list[TensorDictBase]]:
    """The turns of each conversation, in order."""
    size = batch.batch_size
    for row in [batch] if batch.ndim == 1 else batch.reshape(-1, size[-1]).unbind(0):
        steps: list[TensorDictBase] = []
        for step in row.unbind(-1):
            steps.append(step)
            if bool(_required(step, keys.done).any()):
                yield steps
                steps = []
        if steps:
            yield steps


def _parts(turns: Sequence[_Turn]) -> list[_Row]:
    rows = [_Row()]
    for turn in turns:
        if not rows[-1].goes_on(turn):
            rows.append(_Row())
        rows[-1].turns.append(turn)
    return rows


def _required(step: TensorDictBase, key: NestedKey) -> torch.Tensor:
    value = step.get(key, None)
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"a turn has no tensor under {key!r}; it has {sorted(map(str, step.keys(True)))}. The "
            "policy writes it unless its output key is None."
        )
    return value.cpu()


def _read(step: TensorDictBase, keys: _Keys) -> _Turn:
    """A step without its padding."""
    kept = _required(step, below(keys.masks, "all_attention_mask"))
    sampled = _required(step, below(keys.masks, "all_assistant_mask"))[kept]
    versions = None
    if keys.rollout is not None:
        versions = step.get(below(keys.rollout, "policy_version"), None)
    turn = _Turn(
        step=step,
        ids=_required(step, below(keys.tokens, "full"))[kept],
        sampled=sampled,
        log_probs=_required(step, below(keys.log_probs, "full"))[kept],
        versions=None if versions is None else versions.cpu()[kept],
    )
    if not bool(sampled[int((~sampled).cumprod(0).sum()) :].all()):
        raise InputError(
            "a turn has tokens that were not sampled behind some that were: it is no output of a "
            "policy that samples."
        )
    return turn


def _rewards(steps: Sequence[TensorDictBase], keys: _Keys) -> list[torch.Tensor]:
    """The reward of each turn; of rewards per token the sum ``[1]``."""
    rewards = [_required(step, keys.reward) for step in steps]
    alike = len({reward.shape for reward in rewards}) == 1
    per_token = all(_is_per_token(s, r, keys) for s, r in zip(steps, rewards, strict=True))
    if alike and not per_token:
        return rewards
    return [reward.sum().view(1) for reward in rewards]


def _is_per_token(step: TensorDictBase, reward: torch.Tensor, keys: _Keys) -> bool:
    """Whether there is one for each sampled token of a turn, or for each that it has."""
    mask = _required(step, below(keys.masks, "all_assistant_mask"))
    return reward.ndim > 0 and reward.shape[0] in (int(mask.sum()), mask.numel())


def _row(
    row: _Row, place: Mapping[str, int], total: torch.Tensor | None, keys: _Keys
) -> TensorDict:
    """One row; ``total`` is the conversation's reward, None for one reward per turn."""
    first, last = row.turns[0].step, row.turns[-1].step
    ids = row.turns[-1].ids
    turn_of = torch.full(ids.shape, NOT_SAMPLED, dtype=torch.int64, device="cpu")
    log_probs = torch.full(ids.shape, math.nan, dtype=torch.float32, device="cpu")
    versions = torch.full(ids.shape, NOT_SAMPLED, dtype=torch.int64, device="cpu")
    for number, turn in enumerate(row.turns):
        where = turn.sampled.nonzero().squeeze(-1)
        turn_of[where] = number
        log_probs[where] = turn.log_probs[turn.sampled].float()
        if turn.versions is not None:
            versions[where] = turn.versions[turn.sampled]
    out = _kept(first, last, keys)
    out.set(keys.tokens, _whole(Tokens, {"full": ids}))
    masks = {
        "all_attention_mask": torch.ones(ids.shape, dtype=torch.bool, device="cpu"),
        "all_assistant_mask": turn_of >= 0,
    }
    out.set(keys.masks, _whole(Masks, masks))
    out.set(keys.log_probs, _whole(LogProbs, {"full": log_probs}))
    if keys.rollout is not None and row.turns[-1].versions is not None:
        out.set(below(keys.rollout, "policy_version"), versions)
    if total is None:
        total = torch.stack(_rewards([turn.step for turn in row.turns], keys))
    out.set(keys.reward, total)
    facts = {name: torch.tensor(n, dtype=torch.int64, device="cpu") for name, n in place.items()}
    num_turns = torch.tensor(len(row.turns), dtype=torch.int64, device="cpu")
    out.set("conversation", TensorDict({**facts, "num_turns": num_turns, "turn": turn_of}))
    device = last.device
    return out if device is None else out.to(device)


def _kept(first: TensorDictBase, last: TensorDictBase, keys: _Keys) -> TensorDict:
    """What a row has of its steps: inputs of the first, and what the last one came to."""
    out = TensorDict({}, batch_size=[])
    own = {keys.tokens, keys.masks, keys.log_probs, keys.rollout, *_MADE}
    for name in first.keys():  # noqa: SIM118  # iterating a TensorDict gives its rows
        if name not in own and name != "next":
            out.set(name, first.get(name))
    after = last.get("next", None)
    if is_tensor_collection(after):
        for name in after.keys():  # noqa: SIM118
            if name not in own:
                out.set(("next", name), after.get(name))
    for name, kind in (("history", ChatHistory), ("text", Text)):
        full = last.get((name, "full"), None)
        if full is not None:
            out.set(name, kind._from_tensordict(TensorDict({"full": _value(full)}, [])))
    return out


def _value(full: Any) -> Any:
    return non_tensor(full) if isinstance(full, str) else full


def _whole(kind: Any, values: Mapping[str, torch.Tensor]) -> Any:
    padded = MetaData(False, batch_size=[])
    return kind._from_tensordict(TensorDict({**values, "padded": padded}, batch_size=[]))
