"""`mismatch`: how far two sets of log-probs are apart."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_sglang import mismatch
from torchrl_sglang.errors import InputError

NAN = float("nan")


def test_the_same_policy() -> None:
    log_probs = torch.randn(4, 7) - 3
    found = mismatch(log_probs, log_probs.clone())
    assert (found.num_tokens, found.kl, found.kl_k3, found.ess) == (28, 0.0, 0.0, 1.0)
    assert (found.ratio_min, found.ratio_mean, found.ratio_max) == (1.0, 1.0, 1.0)


def test_numbers_worked_out_by_hand() -> None:
    found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0 + math.log(3)]))
    assert found.kl == pytest.approx(-math.log(3) / 2)
    assert found.kl_k3 == pytest.approx((3 - 1 - math.log(3)) / 2)
    assert (found.ratio_min, found.ratio_max) == pytest.approx((1.0, 3.0))
    assert found.ess == pytest.approx(16 / (2 * 10))
    assert found.max_abs_diff == pytest.approx(math.log(3))
    assert found.mean_abs_diff == pytest.approx(math.log(3) / 2)


def test_the_estimates_of_kl_agree_with_the_exact_one() -> None:
    torch.manual_seed(0)
    behaviour = torch.randn(50).log_softmax(-1)
    trainer = (behaviour + 0.3 * torch.randn(50)).log_softmax(-1)
    exact = (behaviour.exp() * (behaviour - trainer)).sum().item()
    sampled = torch.multinomial(behaviour.exp(), 200_000, replacement=True)
    found = mismatch(behaviour[sampled], trainer[sampled])
    assert found.kl == pytest.approx(exact, rel=0.1)
    assert found.kl_k3 == pytest.approx(exact, rel=0.1)
    assert found.ratio_mean == pytest.approx(1.0, abs=0.01)


def test_prompts_and_padding_do_not_count() -> None:
    behaviour = torch.tensor([[NAN, -1.0, -2.0, 0.0]])
    trainer = torch.tensor([[-9.0, -1.0, -2.5, 0.0]])
    mask = torch.tensor([[False, True, True, False]])
    assert mismatch(behaviour, trainer).num_tokens == 3
    assert mismatch(behaviour, trainer, mask).num_tokens == 2
    assert mismatch(behaviour, trainer, mask).max_abs_diff == pytest.approx(0.5)


def test_ragged_rows() -> None:
    rows = [torch.tensor([NAN, -1.0]), torch.tensor([-2.0, -3.0, -4.0])]
    found = mismatch(rows, [row + 0.1 for row in rows])
    assert found.num_tokens == 4
    assert found.kl == pytest.approx(-0.1, abs=1e-6)


def test_half_precision_is_not_summed_in_half_precision() -> None:
    behaviour = torch.full((10_000,), -1.0, dtype=torch.bfloat16)
    found = mismatch(behaviour, behaviour)
    assert (found.kl, found.ess) == (0.0, 1.0)


def test_for_a_logger() -> None:
    found = mismatch(torch.tensor([-1.0]), torch.tensor([-1.5])).asdict("kl/")
    assert found["kl/num_tokens"] == 1
    assert found["kl/kl"] == pytest.approx(0.5)


def test_what_can_not_be_compared() -> None:
    with pytest.raises(InputError, match="same tokens"):
        mismatch(torch.zeros(3), torch.zeros(4))
    with pytest.raises(InputError, match="no token"):
        mismatch(torch.full((3,), NAN), torch.zeros(3))
    with pytest.raises(InputError, match="not finite"):
        mismatch(torch.tensor([NAN]), torch.zeros(1), torch.tensor([True]))
    with pytest.raises(InputError, match="empty"):
        mismatch([], [])
    with pytest.raises(InputError, match="mask has 2"):
        mismatch(torch.zeros(3), torch.zeros(3), torch.ones(2))
