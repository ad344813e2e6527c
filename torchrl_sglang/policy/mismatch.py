"""Measures how far the policy that sampled is from the one that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..errors import InputError

LogProbRows = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Differences over the tokens that both sides have a log-prob for.

    With ``d = trainer - behaviour`` per token and ``r = exp(d)``, the importance ratio:

    Attributes:
        num_tokens: how many tokens were compared.
        kl: mean of ``-d``: the estimate of KL(behaviour, trainer) that is unbiased, in nats.
        kl_k3: mean of ``r - 1 - d``: the same with less variance, and never negative.
        ratio_mean: mean of ``r``; 1 where both are the same policy.
        ratio_min, ratio_max: the extremes of ``r``.
        ess: effective sample size as a share: ``sum(r)^2 / (n * sum(r^2))``, 1 at best.
        max_abs_diff: largest ``|d|``.
        mean_abs_diff: mean ``|d|``.

    Source: J. Schulman, "Approximating KL Divergence" (k1, k3); Kong's effective sample size.
    """

    num_tokens: int
    kl: float
    kl_k3: float
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    ess: float
    max_abs_diff: float
    mean_abs_diff: float

    def asdict(self, prefix: str = "mismatch/") -> dict[str, float]:
        """For a logger: every number under a prefix."""
        return {prefix + name: value for name, value in asdict(self).items()}


@torch.no_grad()
def mismatch(
    behaviour: LogProbRows, trainer: LogProbRows, mask: LogProbRows | None = None
) -> Mismatch:
    """Compares the log-probs that came with a rollout with those of the trainer's model.

    One pass over the tokens on their device and one transfer: cheap enough for every batch.

    Args:
        behaviour: log-probs of the tokens when they were sampled, ``[..., time]``, or a list of
            rows ``[time]``; such as ``td.get(("log_probs", "full"), as_list=True)``.
        trainer: log-probs of the same tokens, in the same shape.
        mask: True for the tokens to compare (``all_assistant_mask``); by default those for which
            both are finite. Where it is True, both have to be finite.

    Raises:
        InputError: other shapes, nothing to compare, or a log-prob that is not finite.
    """
    first, second = _flat(behaviour, "behaviour"), _flat(trainer, "trainer")
    if first.shape != second.shape:
        raise InputError(
            f"behaviour has {first.numel()} log-probs, trainer {second.numel()}: they should be of "
            "the same tokens."
        )
    chosen = first.isfinite() & second.isfinite()
    if mask is not None:
        wanted = _flat(mask, "mask").bool()
        if wanted.shape != first.shape:
            raise InputError(f"the mask has {wanted.numel()} values for {first.numel()} log-probs.")
        if not bool((chosen | ~wanted).all()):
            raise InputError("a log-prob is not finite where the mask is True.")
        chosen = wanted
    diff = (second.to(torch.float64) - first.to(torch.float64))[chosen]
    if diff.numel() == 0:
        raise InputError("there is no token to compare: no log-prob is finite on both sides.")
    ratio = diff.exp()
    numbers = torch.stack(
        [
            -diff.mean(),
            (ratio - 1 - diff).mean(),
            ratio.mean(),
            ratio.min(),
            ratio.max(),
            ratio.sum() ** 2 / (ratio.numel() * (ratio**2).sum()),
            diff.abs().max(),
            diff.abs().mean(),
        ]
    ).tolist()
    kl, kl_k3, mean, low, high, ess, most, usual = numbers
    return Mismatch(
        num_tokens=diff.numel(),
        kl=kl,
        kl_k3=kl_k3,
        ratio_mean=mean,
        ratio_min=low,
        ratio_max=high,
        ess=ess,
        max_abs_diff=most,
        mean_abs_diff=usual,
    )


def _flat(rows: LogProbRows, name: str) -> torch.Tensor:
    if isinstance(rows, torch.Tensor):
        return rows.reshape(-1)
    if not rows:
        raise InputError(f"{name} is empty.")
    return torch.cat([row.reshape(-1) for row in rows])
