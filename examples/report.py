"""What the demo measured, and the files it leaves: metrics.json, reward.png and rollouts.txt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """One answer to one question."""

    prompt: str
    response: str
    reward: float


@dataclass(kw_only=True)
class TrainingLog:
    """One entry per iteration, and the seconds that the whole training took."""

    rewards: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    rollout_s: list[float] = field(default_factory=list)
    push_s: list[float] = field(default_factory=list)
    train_s: float = 0.0

    def add(self, *, reward: float, num_tokens: int, rollout_s: float, push_s: float) -> None:
        self.rewards.append(reward)
        self.num_tokens.append(num_tokens)
        self.rollout_s.append(rollout_s)
        self.push_s.append(push_s)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a run leaves behind.

    ``held_out_*``: mean rewards of questions that were never trained on. ``log_prob_errors``: after
    the last push, the server's log-probs against the trainer's, one per sampled token.
    """

    log: TrainingLog
    held_out_before: float
    held_out_after: float
    log_prob_errors: list[float]
    samples_before: list[Sample]
    samples_after: list[Sample]
    sglang_version: str
    router_version: str | None
    device: str
    seed: int

    def metrics(self) -> dict[str, Any]:
        """Seconds end in ``_s``; ``tokens_per_s`` counts sampled tokens while collecting."""
        log = self.log
        return {
            "reward_first": fmean(log.rewards[:5]),
            "reward_last": fmean(log.rewards[-5:]),
            "held_out_before": self.held_out_before,
            "held_out_after": self.held_out_after,
            "num_iterations": len(log.rewards),
            "num_pushes": len(log.push_s),
            "train_s": log.train_s,
            "tokens_per_s": sum(log.num_tokens) / sum(log.rollout_s),
            "push_s_median": median(log.push_s),
            "max_logprob_error": max(self.log_prob_errors),
            "mean_logprob_error": fmean(self.log_prob_errors),
            "sglang_version": self.sglang_version,
            "router_version": self.router_version,
            "device": self.device,
            "seed": self.seed,
            "rewards": log.rewards,
        }


def write_report(report: Report, folder: Path) -> str:
    """Writes the files into ``folder`` and returns a short summary to print."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = report.metrics()
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "rollouts.txt").write_text(format_samples(report), encoding="utf-8")
    plot_rewards(report, folder / "reward.png")
    return summarise(metrics, folder)


def summarise(metrics: dict[str, Any], folder: Path) -> str:
    """A few lines for the terminal."""
    return """
reward      {reward_first:.2f} -> {reward_last:.2f}   (first and last 5 of {num_iterations} batches)
held out    {held_out_before:.2f} -> {held_out_after:.2f}   (questions never trained on)
training    {train_s:.0f} s, {tokens_per_s:.0f} sampled tokens/s
weights     {num_pushes} pushes of {push_ms:.0f} ms each
log-probs   server and trainer differ by {mean_logprob_error:.4f}, at most {max_logprob_error:.4f}
engine      SGLang {sglang_version}, sglang-router {router_version}, {device}
files       {folder}/metrics.json, reward.png, rollouts.txt""".format(
        **metrics, push_ms=1000 * metrics["push_s_median"], folder=folder
    )


def format_samples(report: Report, every: int = 6) -> str:
    """Some of the held-out questions, with the answers before and after the training."""
    lines = []
    for title, samples in (
        ("Before the training", report.samples_before),
        ("After the training", report.samples_after),
    ):
        lines += [title, "-" * len(title)]
        lines += [f"{s.reward:.2f}  {s.prompt!r}  ->  {s.response!r}" for s in samples[::every]]
        lines.append("")
    return "\n".join(lines)


def plot_rewards(report: Report, path: Path) -> None:
    """The mean reward of every batch, and the held-out questions before and after."""
    from matplotlib.figure import Figure

    rewards = report.log.rewards
    ends: Sequence[int] = (0, len(rewards))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(rewards)), rewards, label="training batches")
    axes.plot(ends, (report.held_out_before, report.held_out_after), "o", label="held-out prompts")
    axes.set(xlabel="weight pushes", ylabel="mean reward", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
