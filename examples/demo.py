"""GRPO on a real SGLang server, on a CPU, in a few minutes: a random model learns to do as told.

The whole of a TorchRL training loop in one file. `task.py` holds the prompts and the reward,
`tiny_model.py` makes the model, `report.py` writes down what happened.

    python examples/demo.py [--iterations N] [--seed N] [--model DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Report, Sample, TrainingLog, write_report
from task import HELD_OUT_PHRASES, TRAIN_PHRASES, Question, make_questions, score
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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper

DEVICE = "cpu"


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """The knobs of the training; these values learn from any seed tried."""

    prompts_per_batch: int = 12
    group_size: int = 8
    max_new_tokens: int = 16
    num_minibatches: int = 2
    learning_rate: float = 1e-3
    clip_epsilon: float = 0.2
    max_grad_norm: float = 1.0

    @property
    def batch_size(self) -> int:
        return self.prompts_per_batch * self.group_size


class TaskReward(Transform):
    """Scores the sampled tokens of every answer and ends the conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        answers = tensordict.get(("tokens", "response"), as_list=True)
        rewards = [
            score(self.split(answer), kind, num_tokens=self.max_new_tokens)
            for answer, kind in zip(answers, tensordict["kind"], strict=True)
        ]
        # [batch, 1, 1]: GRPOLoss wants an advantage with a time and a feature dimension.
        next_tensordict["reward"] = torch.tensor(rewards).view(-1, 1, 1)
        next_tensordict["done"] = torch.ones(len(rewards), 1, dtype=torch.bool)
        next_tensordict["terminated"] = next_tensordict["done"].clone()
        return next_tensordict

    def split(self, token_ids: torch.Tensor) -> list[str]:
        return self.tokenizer.batch_decode(token_ids.unsqueeze(-1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


def make_env(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_prompts: int,
    repeats: int,
    max_new_tokens: int,
    seed: int | None = None,
) -> EnvBase:
    """An environment that asks ``num_prompts`` questions at a time, each of them ``repeats`` times.

    The repeats of a question are its GRPO group. With a seed the questions come in random order.
    """
    loader = DataLoader(
        questions,
        batch_size=num_prompts,
        shuffle=seed is not None,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        collate_fn=lambda items: {
            "query": [item.prompt for item in items],
            "kind": [item.kind for item in items],
        },
    )
    env = ChatEnv.from_dataloader(
        loader, repeats=repeats, batch_size=(num_prompts * repeats,), input_mode="history"
    )
    return env.append_transform(InitTracker()).append_transform(
        TaskReward(tokenizer, max_new_tokens)
    )


class Trainer:
    """GRPO: samples of one prompt compete with each other, and the better ones become likelier."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GRPOConfig,
    ) -> None:
        self.config = config
        # In tokens mode the loss sees the very ids that were sampled: text would be tokenised
        # again, and differently.
        actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)
        self.loss_module = GRPOLoss(actor, clip_epsilon=config.clip_epsilon, entropy_bonus=False)
        self.advantage = MCAdvantage(grpo_size=config.group_size)
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0
        )

    def step(self, batch: TensorDictBase) -> None:
        """One pass over the batch, in minibatches."""
        batch = self.advantage.inv(
            batch.select("tokens", "masks", "log_probs", "query", "next")
        )
        for rows in torch.randperm(len(batch)).chunk(self.config.num_minibatches):
            loss = self.loss_module(batch[rows])
            self.optimizer.zero_grad()
            loss.loss_objective.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.optimizer.step()


def train(
    collector: LLMCollector,
    trainer: Trainer,
    model: PreTrainedModel,
    scheme: SGLangWeightSyncScheme,
    num_iterations: int,
) -> TrainingLog:
    """Collects, learns and pushes the new weights, ``num_iterations`` times."""
    log = TrainingLog()
    bar = tqdm(timed(collector), total=num_iterations, desc="GRPO", unit="it", dynamic_ncols=True)
    started = time.perf_counter()
    for batch, rollout_s in bar:
        trainer.step(batch)
        collector.update_policy_weights_(model)
        log.add(
            reward=mean_reward(batch),
            num_tokens=num_sampled_tokens(batch),
            rollout_s=rollout_s,
            push_s=scheme.last_push.total_s,
        )
        bar.set_postfix(
            reward=f"{log.rewards[-1]:.2f}",
            tok_s=f"{log.num_tokens[-1] / rollout_s:.0f}",
            version=scheme.last_push.version,
            sync_ms=f"{1000 * scheme.last_push.total_s:.0f}",
        )
    log.train_s = time.perf_counter() - started
    return log


def timed(batches: LLMCollector) -> Iterator[tuple[TensorDictBase, float]]:
    """The batches of a collector, each with the seconds that it took."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def mean_reward(batch: TensorDictBase) -> float:
    return batch["next", "reward"].mean().item()


def num_sampled_tokens(batch: TensorDictBase) -> int:
    return sum(len(ids) for ids in batch.view(-1).get(("tokens", "response"), as_list=True))


def to_samples(batch: TensorDictBase) -> list[Sample]:
    batch = batch.view(-1)
    rewards = batch["next", "reward"].flatten().tolist()
    texts = batch["text"].response
    return [
        Sample(*row) for row in zip(batch["query"], texts, rewards, strict=True)
    ]


@torch.no_grad()
def max_log_prob_error(model: PreTrainedModel, batch: TensorDictBase) -> float:
    """Largest gap between the server's log-prob of a sampled token and the trainer's model.

    The server computes in bf16, so the trainer's weights are cast to it before they are compared.
    """
    served = copy.deepcopy(model).to(torch.bfloat16)
    errors = []
    for row in batch.view(-1).unbind(0):
        ids, sampled = row["tokens"].full, row["masks"].all_assistant_mask
        log_probs = served(ids[None]).logits[0, :-1].float().log_softmax(-1)
        ours = log_probs.gather(-1, ids[1:, None])[:, 0]
        errors.append((ours - row["log_probs"].full[1:])[sampled[1:]].abs().max())
    return torch.stack(errors).max().item()


def run(
    model_path: Path, *, num_iterations: int, seed: int, config: GRPOConfig | None = None
) -> Report:
    """Starts the servers, trains, and measures on questions that were never trained on."""
    config = config or GRPOConfig()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    env = make_env(
        make_questions(TRAIN_PHRASES),
        tokenizer,
        num_prompts=config.prompts_per_batch,
        repeats=config.group_size,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
    )
    held_out = make_questions(HELD_OUT_PHRASES)
    held_out_env = make_env(
        held_out,
        tokenizer,
        num_prompts=len(held_out),
        repeats=4,
        max_new_tokens=config.max_new_tokens,
    )
    with AsyncSGLang.from_pretrained(str(model_path), device=DEVICE, random_seed=seed) as service:
        policy = SGLangWrapper(
            service,
            input_mode="history",
            generate_kwargs={"max_new_tokens": config.max_new_tokens, "temperature": 1.0},
        )
        scheme = SGLangWeightSyncScheme(service)
        collector = LLMCollector(
            env,
            policy=policy,
            dialog_turns_per_batch=config.batch_size,
            total_dialog_turns=num_iterations * config.batch_size,
            weight_updater=scheme,
            track_policy_version=True,
        )
        before = held_out_env.rollout(1, policy)
        trainer = Trainer(model, tokenizer, config)
        log = train(collector, trainer, model, scheme, num_iterations)
        after = held_out_env.rollout(1, policy)
        return Report(
            log=log,
            held_out_before=mean_reward(before),
            held_out_after=mean_reward(after),
            max_log_prob_error=max_log_prob_error(model, after),
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
    disable_progress_bar()
    model_path = args.model or make_tiny_model(args.out / "model", seed=args.seed)
    print(f"Starting SGLang on {model_path} ...", flush=True)
    report = run(model_path, num_iterations=args.iterations, seed=args.seed)
    print(write_report(report, args.out))


if __name__ == "__main__":
    main()
