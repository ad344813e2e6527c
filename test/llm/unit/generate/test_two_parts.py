"""``min_new_tokens`` where a server has no tokenizer: two requests for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from torchrl_sglang import Completion, GenerateRequest, SamplingParams
from torchrl_sglang.errors import ResponseError
from torchrl_sglang.generate.two_parts import RULED_OUT, TwoParts

EOS = 2


def part(request: GenerateRequest, ids: list[int], **changes: Any) -> Completion:
    whole = {
        "rid": request.rid,
        "output_ids": ids,
        "log_probs": None,
        "text": None,
        "finish_type": "length",
        "matched_stop": None,
        "prompt_tokens": 2,
        "cached_tokens": 0,
        "version_spans": (),
    }
    return Completion(**{**whole, **changes})


def test_the_two_requests() -> None:
    parts = TwoParts(eos_ids=(EOS,), max_input_len=9)
    sampling = SamplingParams(
        min_new_tokens=3, max_new_tokens=8, stop_token_ids=(7,), logit_bias={EOS: 1.0, 4: 2.0}
    )
    request = GenerateRequest(input_ids=(5, 6), sampling=sampling.updated({"n": 2}))
    first = parts.first(request)
    assert first.rid == request.rid
    assert (first.sampling.max_new_tokens, first.sampling.min_new_tokens) == (3, 0)
    assert first.sampling.logit_bias == {EOS: RULED_OUT, 7: RULED_OUT, 4: 2.0}
    done = part(request, [8, 8, 8])
    rest = parts.rest(request, done, 1, seeded=False)
    assert rest is not None
    assert rest.input_ids == (5, 6, 8, 8, 8)
    assert (rest.sampling.max_new_tokens, rest.sampling.min_new_tokens) == (5, 0)
    assert (rest.sampling.logit_bias, rest.sampling.n) == ({EOS: 1.0, 4: 2.0}, 1)
    assert rest.sampling.sampling_seed is None
    # A sample goes on under the seed that it had.
    seeded = parts.rest(request, done, 1, seeded=True)
    assert seeded is not None
    assert seeded.sampling.sampling_seed == request.seeds()[1]
    chosen = replace(request, sampling=request.sampling.updated({"seed": 7}))
    seeded = parts.rest(chosen, done, 1, seeded=False)
    assert seeded is not None
    assert seeded.sampling.sampling_seed == 8
    # What is whole.
    assert parts.rest(request, part(request, [8], finish_type="abort"), 0, seeded=False) is None
    assert parts.rest(request, part(request, [8] * 8), 0, seeded=False) is None
    assert parts.rest(request, part(request, [8] * 7), 0, seeded=False) is None  # no room
    with pytest.raises(ResponseError, match="ended with 9 after 1 tokens, before min_new_tokens=3"):
        parts.rest(request, part(request, [9], finish_type="stop", matched_stop=9), 0, seeded=False)
    assert not parts.apply(GenerateRequest(input_ids=(5,), scoring=True, sampling=sampling))
