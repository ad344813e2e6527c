"""Requests with ids outside of the vocabulary."""

from __future__ import annotations

from typing import Any

from torchrl_sglang import GenerateRequest, SamplingParams
from torchrl_sglang.errors import InputError, UnsupportedOptionError
from torchrl_sglang.generate.request import Returns

SIZE = 512  # of the model that the shared server runs

# What ends SGLang 0.5.23, and what is said of it.
DEADLY: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"input_ids": (5, SIZE, 6)},
        InputError,
        r"prompt 1 has the id 512, at position 1: .* ids from 0 to 511",
    ),
    ({"input_ids": (-100, 5)}, InputError, r"prompt 1 has the id -100, at position 0: "),
    (
        {"returns": Returns(top_log_probs=SIZE + 1)},
        UnsupportedOptionError,
        r"prompt 1: top_log_probs=513, but the model's vocabulary has 512 ids",
    ),
    (
        {"sampling": SamplingParams(max_new_tokens=4, min_new_tokens=2, stop_token_ids=(600,))},
        UnsupportedOptionError,
        r"prompt 1: stop_token_ids has the id 600, .* ids from 0 to 511",
    ),
    # Harmless by itself; beside a request with min_new_tokens it is not.
    (
        {"sampling": SamplingParams(max_new_tokens=4, stop_token_ids=(3, 600))},
        UnsupportedOptionError,
        r"prompt 1: stop_token_ids has the id 600",
    ),
    (
        {"sampling": SamplingParams(max_new_tokens=4, logit_bias={3: 1.0, 512: 1.0})},
        UnsupportedOptionError,
        r"prompt 1: logit_bias has the id 512",
    ),
]


def request(**changes: Any) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    return GenerateRequest(**{"input_ids": (5, 6), "sampling": sampling, **changes})
