"""GRPO on a real SGLang server, on a CPU, in a few minutes: a random model learns to do as told.

This file is the whole training loop. `task.py` holds the prompts and the reward, `tiny_model.py`
makes the model, `report.py` writes down what happened.

    python examples/demo.py [--iterations N] [--seed N] [--model DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Report, Sample, TrainingLog, write_report
from task import HELD_OUT_PHRASES, NUM_TOKENS, TRAIN_PHRASES, Question, make_questions, score
from tensordict import TensorDictBase
from tiny_model import make_tiny_model
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper

DEVICE = "cpu"
# Of the trainer and of the server. With so small a model more of them mostly wait for each other.
NUM_THREADS = 1


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """The knobs of the training; a group is the answers to one and the same prompt."""

    num_prompts: int = 12
    group_size: int = 8
    num_minibatches: int = 4
    learning_rate: float = 5e-4
    clip_epsilon: float = 0.2
    max_grad_norm: float = 1.0

    @property
    def batch_size(self) -> int:
        return self.num_prompts * self.group_size


class TaskReward(Transform):
    """Scores the sampled tokens of every answer, and ends the conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        answers = tensordict.get(("tokens", "response"), as_list=True)
        rewards = [
            score(self.tokenizer.batch_decode(ids.unsqueeze(-1)), kind)
            for ids, kind in zip(answers, tensordict["kind"], strict=True)
        ]
        done = torch.ones(len(rewards), 1, dtype=torch.bool)
        # GRPOLoss wants advantages of [batch, time, 1], so a step's reward is [batch, 1, 1].
        next_tensordict["reward"] = torch.tensor(rewards).view(-1, 1, 1)
        next_tensordict["done"] = done
        next_tensordict["terminated"] = done.clone()
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


def make_env(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_prompts: int,
    repeats: int,
    shuffle_seed: int | None = None,
) -> EnvBase:
    """An environment that asks ``num_prompts`` questions at a time, each of them ``repeats`` times.

    With a seed the questions come in a random order, without one in theirs.
    """
    loader = DataLoader(
        questions,
        batch_size=num_prompts,
        shuffle=shuffle_seed is not None,
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
        collate_fn=lambda rows: {
            "query": [row.prompt for row in rows],
            "kind": [row.kind for row in rows],
        },
    )
    env = ChatEnv.from_dataloader(
        loader, repeats=repeats, batch_size=(num_prompts * repeats,), input_mode="history"
    )
    return env.append_transform(InitTracker()).append_transform(TaskReward(tokenizer))


class Trainer:
    """GRPO: the answers to a prompt compete, and those above their group's mean become likelier."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GRPOConfig
    ) -> None:
        self.model = model
        self.config = config
        # In tokens mode the loss sees the very ids that were sampled. A text would be tokenised
        # again, and rarely to the same ids.
        actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)
        self.loss = GRPOLoss(actor, clip_epsilon=config.clip_epsilon, entropy_bonus=False)
        self.advantage = MCAdvantage(grpo_size=config.group_size)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=0.0
        )

    def step(self, batch: TensorDictBase) -> None:
        """Goes over the batch once, in minibatches."""
        batch = self.advantage.inv(
            batch.select(
                "query", "tokens", "masks", "log_probs", ("next", "reward"), ("next", "done")
            )
        )
        for rows in torch.randperm(len(batch)).chunk(self.config.num_minibatches):
            loss = self.loss(batch[rows])
            self.optimizer.zero_grad()
            loss.loss_objective.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()


def train(
    collector: LLMCollector,
    trainer: Trainer,
    scheme: SGLangWeightSyncScheme,
    num_iterations: int,
) -> TrainingLog:
    """Collects a batch, learns from it, pushes the new weights; over and over."""
    log = TrainingLog()
    started = time.perf_counter()
    bar = tqdm(timed(collector), total=num_iterations, desc="GRPO", dynamic_ncols=True)
    for batch, rollout_s in bar:
        trainer.step(batch)
        collector.update_policy_weights_(trainer.model)
        push = scheme.last_push
        log.add(
            reward=mean_reward(batch),
            num_tokens=num_sampled_tokens(batch),
            rollout_s=rollout_s,
            push_s=push.total_s,
        )
        bar.set_postfix(
            {
                "reward": f"{log.rewards[-1]:.2f}",
                "tokens/s": f"{log.num_tokens[-1] / rollout_s:.0f}",
                "weights": f"v{push.version}",
                "sync": f"{1000 * push.total_s:.0f}ms",
            }
        )
    log.train_s = time.perf_counter() - started
    return log


def timed(collector: LLMCollector) -> Iterator[tuple[TensorDictBase, float]]:
    """The collector's batches, each with the seconds that collecting it took."""
    batches = iter(collector)
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def mean_reward(batch: TensorDictBase) -> float:
    return batch["next", "reward"].mean().item()


def num_sampled_tokens(batch: TensorDictBase) -> int:
    return sum(len(ids) for ids in batch.view(-1).get(("tokens", "response"), as_list=True))


def to_samples(batch: TensorDictBase) -> list[Sample]:
    rows = batch.view(-1)
    rewards = rows["next", "reward"].flatten().tolist()
    return list(map(Sample, rows["query"], rows["text"].response, rewards))


@torch.no_grad()
def log_prob_errors(model: PreTrainedModel, batch: TensorDictBase) -> torch.Tensor:
    """For every sampled token, how far the server's log-prob is from the trainer's own.

    The trainer's weights are cast to what the server computes with: bf16, and a head in fp32.
    """
    served = copy.deepcopy(model).to(torch.bfloat16)
    head = served.lm_head.weight.float()
    errors = []
    for row in batch.view(-1).unbind(0):
        ids, sampled = row["tokens"].full, row["masks"].all_assistant_mask
        hidden = served.model(ids[None]).last_hidden_state[0, :-1]
        log_probs = (hidden.float() @ head.T).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        errors.append((log_probs - row["log_probs"].full[1:])[sampled[1:]].abs())
    return torch.cat(errors)


def run(model_path: Path, *, num_iterations: int, seed: int) -> Report:
    """Starts the engine, trains, and measures on questions that were never trained on."""
    config = GRPOConfig()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    env = make_env(
        make_questions(TRAIN_PHRASES),
        tokenizer,
        num_prompts=config.num_prompts,
        repeats=config.group_size,
        shuffle_seed=seed,
    )
    held_out = make_questions(HELD_OUT_PHRASES)
    held_out_env = make_env(held_out, tokenizer, num_prompts=len(held_out), repeats=4)
    with (
        AsyncSGLang.from_pretrained(
            str(model_path),
            device=DEVICE,
            random_seed=seed,
            enable_fp32_lm_head=True,
            server_env={"OMP_NUM_THREADS": str(NUM_THREADS)},
        ) as service,
        closing(SGLangWeightSyncScheme(service)) as scheme,
    ):
        policy = SGLangWrapper(
            service, input_mode="history", generate_kwargs={"max_new_tokens": NUM_TOKENS}
        )
        collector = LLMCollector(
            env,
            policy=policy,
            dialog_turns_per_batch=config.batch_size,
            total_dialog_turns=num_iterations * config.batch_size,
            weight_updater=scheme,
            track_policy_version=True,
        )
        before = held_out_env.rollout(1, policy)
        log = train(collector, Trainer(model, tokenizer, config), scheme, num_iterations)
        after = held_out_env.rollout(1, policy)
        return Report(
            log=log,
            held_out_before=mean_reward(before),
            held_out_after=mean_reward(after),
            log_prob_errors=log_prob_errors(model, after).tolist(),
            samples_before=to_samples(before),
            samples_after=to_samples(after),
            sglang_version=service.sglang_version,
            router_version=service.router_version,
            device=DEVICE,
            seed=seed,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=80, help="batches to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder of a model; a tiny one by default")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="for the results")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error("--iterations must be at least 1")
    torch.set_num_threads(NUM_THREADS)
    disable_progress_bar()
    # TorchRL's own: LLMCollector takes nothing else yet.
    warnings.filterwarnings("ignore", message="Using WeightUpdaterBase", category=Warning)
    model_path = args.model or make_tiny_model(args.out / "model", seed=args.seed)
    print(f"Starting SGLang on {model_path} ...", flush=True)
    report = run(model_path, num_iterations=args.iterations, seed=args.seed)
    print(write_report(report, args.out))


if __name__ == "__main__":
    main()
