"""One row per conversation: every sampled token once, marked, with what sampled it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.data import Unbounded
from torchrl.data.llm import History
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss

from helpers.marks import QUIET
from helpers.servers import hf_log_probs
from torchrl_sglang import AsyncSGLang, SGLangWrapper, conversations

pytestmark = QUIET


QUESTIONS = ["the quick", "hello"]

SAMPLING = {"max_new_tokens": 10, "temperature": 1.0}


def joined(lists: Any) -> list[Any]:
    return [one for several in lists for one in several]


class Tool(Transform):
    """A tool answers the first turn, the user the others; each turn is worth its number."""

    def _step(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        prompts = next_td["history"].prompt
        number = len(prompts[0].role) // 2  # of the turn that has just ended
        role, said = ("tool", "<result>42</result>") if number == 1 else ("user", "go on")
        turn = History(role=role, content=said, batch_size=(), device=prompts.device)
        next_td["history"].prompt = lazy_stack(
            [row.append(turn, inplace=False, dim=-1) for row in prompts.unbind(0)]
        )
        next_td["reward"] = torch.full((*td.batch_size, 1), float(number))
        return next_td

    def transform_reward_spec(self, reward_spec: Any) -> Any:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1))
        return reward_spec


def rollout(service: AsyncSGLang, tokenizer: Any, turns: int = 3, **kwargs: Any) -> Any:
    """``[rows, turns]``"""
    loader = DataLoader(QUESTIONS * 9, batch_size=2, collate_fn=lambda rows: {"query": rows})
    env = ChatEnv.from_dataloader(
        loader, batch_size=(2,), tokenizer=tokenizer, input_mode="history"
    ).append_transform(Tool())
    kwargs.setdefault("generate_kwargs", SAMPLING)
    policy = SGLangWrapper(service, tokenizer=tokenizer, **kwargs)
    with set_list_to_stack(True):
        return env.rollout(turns, policy)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_three_turns_with_a_tool(
    service: AsyncSGLang, tokenizer: Any, model: Any, pad_output: bool
) -> None:
    """All that was sampled, once, with the log-probs of a Hugging Face forward of the whole."""
    batch = rollout(service, tokenizer, pad_output=pad_output)
    rows = conversations(batch)
    assert rows.batch_size == (2,)
    for row, steps in zip(rows.unbind(0), batch.unbind(0), strict=True):
        ids, mask = row["tokens"].full, row["masks"].all_assistant_mask
        answers = [s["tokens"].full[s["masks"].all_assistant_mask] for s in steps.unbind(0)]
        assert ids[mask].tolist() == torch.cat(answers).tolist()
        turn = row["conversation", "turn"]
        assert torch.equal(turn >= 0, mask)
        for number, answer in enumerate(answers):
            assert ids[turn == number].tolist() == answer.tolist()
        expected = torch.tensor(hf_log_probs(model, ids[:1].tolist(), ids[1:].tolist()))
        log_probs = row["log_probs"].full
        assert torch.equal(log_probs.isnan(), ~mask)
        torch.testing.assert_close(log_probs[1:][mask[1:]], expected[mask[1:]], atol=0.02, rtol=0)
        assert "42" not in tokenizer.decode(ids[mask])
        assert "<result>42</result>" in tokenizer.decode(ids[~mask])
        assert torch.equal(row["rollout", "policy_version"] >= 0, mask)
        last = steps[-1]
        assert tokenizer.decode(ids) == last["text"].full
        roles = row["history"].full.role
        assert roles == ["user", "assistant", "tool", "assistant", "user", "assistant"]
        assert row["next", "reward"].tolist() == [6.0]
        assert row["query"] == steps[0]["query"]
        facts = row["conversation"]
        assert (facts["part"].item(), facts["num_parts"].item()) == (0, 1)
        assert facts["num_turns"].item() == 3
    assert [row["conversation", "index"].item() for row in rows.unbind(0)] == [0, 1]


def test_rewards_by_turn(service: AsyncSGLang, tokenizer: Any) -> None:
    rows = conversations(rollout(service, tokenizer), rewards="turns")
    for row in rows.unbind(0):
        assert row["next", "reward"].tolist() == [[1.0], [2.0], [3.0]]


def test_what_is_written_anew_is_a_row_of_its_own(
    service: AsyncSGLang, tokenizer: Any, model: Any
) -> None:
    """Without carried turns the sampled tokens are tokenised anew: what differs is counted."""
    generate_kwargs = {"max_new_tokens": 16, "ignore_eos": True}
    batch = rollout(service, tokenizer, carry_turns=False, generate_kwargs=generate_kwargs)
    rows = list(conversations(batch).unbind(0))
    assert len(rows) > 2
    for index, steps in enumerate(batch.unbind(0)):
        parts = [row for row in rows if row["conversation", "index"].item() == index]
        assert [row["conversation", "part"].item() for row in parts] == list(range(len(parts)))
        assert {row["conversation", "num_parts"].item() for row in parts} == {len(parts)}
        assert sum(row["conversation", "num_turns"].item() for row in parts) == 3
        sampled = [r["tokens"].full[r["masks"].all_assistant_mask].tolist() for r in parts]
        answers = [s["tokens"].response.tolist() for s in steps.unbind(0)]
        assert joined(sampled) == joined(answers)
        for row in parts:
            assert row["next", "reward"].tolist() == [6.0]  # the conversation's
            ids, mask = row["tokens"].full, row["masks"].all_assistant_mask
            expected = torch.tensor(hf_log_probs(model, ids[:1].tolist(), ids[1:].tolist()))
            torch.testing.assert_close(
                row["log_probs"].full[1:][mask[1:]], expected[mask[1:]], atol=0.02, rtol=0
            )
    by_turn = conversations(batch, rewards="turns")
    rewards = [row["next", "reward"].flatten().tolist() for row in by_turn.unbind(0)]
    assert joined(rewards) == [1.0, 2.0, 3.0] * 2


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_grpo_takes_the_rows(service: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    """At the weights that sampled, no ratio differs from 1, and every sampled token counts."""
    with set_list_to_stack(True):
        rows = conversations(rollout(service, tokenizer))
        actor = TransformersWrapper(
            model.float(), tokenizer=tokenizer, input_mode="tokens", generate=False
        )
        loss = GRPOLoss(actor, clip_epsilon=0.2, entropy_bonus=False)
        advantage = torch.tensor([1.0, -1.0]).view(2, 1, 1)
        out = loss(lazy_stack([row.clone() for row in rows.unbind(0)]).set("advantage", advantage))
    assert out.ESS.item() > 0.99
    out.loss_objective.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert abs(out.kl_approx.item()) < 0.01
