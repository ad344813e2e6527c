"""A completion is cut at the stop string that the server did not see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchrl_sglang import Completion, GenerateRequest
from torchrl_sglang.generate.completion import VersionSpan
from torchrl_sglang.policy.requests.stops import cut_at_stops


def test_a_cut_completion(tokenizer: Any) -> None:
    """What belongs to a token goes with it, and characters of several tokens stay whole."""
    ids = tokenizer("ab é cd")["input_ids"]
    count = len(ids)
    whole = Completion(
        rid="a",
        output_ids=ids,
        log_probs=[-float(i) for i in range(count)],
        text=None,
        finish_type="abort",
        matched_stop=None,
        prompt_tokens=3,
        cached_tokens=0,
        version_spans=(
            VersionSpan(version="1", start=0, end=2),
            VersionSpan(version="2", start=2, end=count - 1),
            VersionSpan(version="3", start=count - 1, end=count),
        ),
        top_log_probs=[[(-1.0, i)] for i in range(count)],
        sampling_mask=[[i] for i in ids],
        sampling_log_probs=[-0.5] * count,
        hidden_states=[[[0.0], [0.0], [0.0]], *([1.0] for _ in range(count - 1))],
    )
    request = GenerateRequest(input_ids=(5, 6, 7))

    def cut(*stops: str) -> Completion:
        return cut_at_stops([whole], [request], [stops], tokenizer)[0]

    for stop in (tokenizer.decode(ids[:1]), "b", "é", "b é", "cd", "d"):
        length = next(k for k in range(1, count + 1) if stop in tokenizer.decode(ids[:k]))
        one = cut("zzz", stop)
        assert (one.output_ids, one.finish_type, one.matched_stop) == (ids[:length], "stop", stop)
        for name in ("log_probs", "top_log_probs", "sampling_mask", "sampling_log_probs"):
            assert getattr(one, name) == getattr(whole, name)[:length]
        assert one.hidden_states == (whole.hidden_states or [])[:length]
        spans = one.version_spans
        last = whole.version_spans[len(spans) - 1]
        assert spans == (*whole.version_spans[: len(spans) - 1], replace(last, end=length))
        assert last.start < length <= last.end
    assert cut("d", "cd").matched_stop == "d"  # the first in the list, as SGLang says it
    assert cut("zzz") is whole
    assert cut() is whole
