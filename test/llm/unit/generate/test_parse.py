"""The strict reading of answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.parts import parse_completion
from torchrl_sglang import Completion, GenerateRequest, VersionSpan
from torchrl_sglang.errors import RequestAbortedError, ResponseError
from torchrl_sglang.generate.request import Returns

REQUEST = GenerateRequest(input_ids=(1, 2, 3), rid="r1")

Change = Callable[[dict[str, Any]], object]


def answer() -> dict[str, Any]:
    """What SGLang 0.5.23 answers to `REQUEST`, as far as it matters here."""
    return {
        "text": "ab",
        "output_ids": [7, 8, 9],
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "stop", "matched": 9},
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "cached_tokens": 2,
            "weight_version": "5",
            "weight_versions": [
                {"version": "4", "start": 0, "end": 1},
                {"version": "5", "start": 1, "end": 3},
            ],
            "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None], [0.0, 9, None]],
        },
    }


def changed(change: Change) -> dict[str, Any]:
    made = answer()
    change(made)
    return made


def meta(**values: Any) -> Change:
    return lambda made: made["meta_info"].update(values)


def without(name: str) -> Change:
    return lambda made: made.pop(name, None) or made["meta_info"].pop(name, None)


def test_a_whole_answer() -> None:
    assert parse_completion(answer(), REQUEST) == Completion(
        rid="r1",
        output_ids=[7, 8, 9],
        log_probs=[-0.5, -1.5, 0.0],
        text="ab",
        finish_type="stop",
        matched_stop=9,
        prompt_tokens=3,
        cached_tokens=2,
        version_spans=(
            VersionSpan(version="4", start=0, end=1),
            VersionSpan(version="5", start=1, end=3),
        ),
    )


def test_log_probs_that_were_not_asked_for() -> None:
    request = GenerateRequest(input_ids=(1, 2, 3), rid="r1", return_log_probs=False)
    completion = parse_completion(changed(without("output_token_logprobs")), request)
    assert completion.log_probs is None


def test_a_server_without_a_tokenizer() -> None:
    assert parse_completion(changed(without("text")), REQUEST).text is None


@pytest.mark.parametrize(
    ("change", "version"),
    [
        (without("weight_versions"), "5"),
        (meta(weight_versions=None), "5"),
        (meta(weight_versions=[]), "5"),
        (
            lambda made: (without("weight_versions")(made), without("weight_version")(made)),
            "default",
        ),
    ],
    ids=["absent", "null", "empty", "no version at all"],
)
def test_servers_that_know_one_version_per_request(change: Change, version: str) -> None:
    spans = parse_completion(changed(change), REQUEST).version_spans
    assert spans == (VersionSpan(version=version, start=0, end=3),)


def test_length_is_a_reason_to_finish() -> None:
    completion = parse_completion(changed(meta(finish_reason={"type": "length"})), REQUEST)
    assert completion.finish_type == completion.finish_reason == "length"
    assert completion.matched_stop is None


def test_an_aborted_request_is_no_completion() -> None:
    reason = {"type": "abort", "message": "out of pages"}
    says = "r1 was aborted after 3 tokens: out of pages.*partial_rollouts.*partial_allowed"
    with pytest.raises(RequestAbortedError, match=says):
        parse_completion(changed(meta(finish_reason=reason)), REQUEST)


REQUIRED = ["output_ids", "meta_info", "id", "finish_reason", "completion_tokens"]


@pytest.mark.parametrize("name", [*REQUIRED, "prompt_tokens", "output_token_logprobs"])
def test_what_an_answer_may_not_lack(name: str) -> None:
    with pytest.raises(ResponseError, match=f"r1: the answer lacks.*{name}"):
        parse_completion(changed(without(name)), REQUEST)


@pytest.mark.parametrize("name", [*REQUIRED, "output_token_logprobs"])
def test_null_is_no_answer_either(name: str) -> None:
    garbled = answer()
    (garbled if name in garbled else garbled["meta_info"])[name] = None
    with pytest.raises(ResponseError, match="r1"):
        parse_completion(garbled, REQUEST)


@pytest.mark.parametrize("whole", [None, [], "busy", 3, {"error": "busy"}, [answer()]], ids=str)
def test_what_is_no_answer_at_all(whole: Any) -> None:
    with pytest.raises(ResponseError, match="request r1: the answer lacks"):
        parse_completion(whole, REQUEST)


def rows(*values: Any) -> Change:
    ids = [7, 8, 9]
    return meta(output_token_logprobs=[[v, i, None] for v, i in zip(values, ids, strict=False)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (meta(id="r2"), "got the answer of request 'r2'"),
        (meta(finish_reason={"type": "tired"}), "unknown finish reason"),
        (meta(completion_tokens=4), "3 output ids, completion_tokens=4"),
        (lambda made: made.update(output_ids=[]), "0 output ids"),
        (
            lambda made: (made.update(output_ids=[]), meta(completion_tokens=0)(made)),
            "0 output ids, completion_tokens=0",
        ),
        (meta(output_token_logprobs=[]), "log-probs for 0 tokens"),
        (rows(-1.0, -1.0), "log-probs for 2 tokens do not belong to the 3"),
        (
            meta(output_token_logprobs=[[-1.0, 7], [-1.0, 8], [-1.0, 8]]),
            "do not belong to the 3 output ids",
        ),
        (rows(-1.0, math.nan, -1.0), "not finite"),
        (rows(-1.0, -math.inf, -1.0), "not finite"),
        (rows(math.inf, -math.inf, -1.0), "not finite"),
        (meta(output_token_logprobs=[[]]), "lacks what was asked for.*IndexError"),
        (rows(-1.0, None, -1.0), "token 1 sampled: do the weights hold NaN"),
        (rows(-1.0, -1.0, math.nan), "token 2 sampled: do the weights hold NaN"),
        (rows(-1.0, "-1.0", -1.0), "lacks what was asked for"),
        (
            meta(weight_versions=[{"version": "4", "start": 0, "end": 2}]),
            "do not cover 3 tokens",
        ),
        (
            meta(weight_versions=[{"version": "4", "start": 1, "end": 3}]),
            "do not cover 3 tokens",
        ),
        (
            meta(
                weight_versions=[
                    {"version": "4", "start": 0, "end": 1},
                    {"version": "5", "start": 2, "end": 3},
                ]
            ),
            "do not cover 3 tokens",
        ),
        (
            meta(
                weight_versions=[
                    {"version": "4", "start": 0, "end": 3},
                    {"version": "5", "start": 3, "end": 1},
                    {"version": "6", "start": 1, "end": 3},
                ]
            ),
            "do not cover 3 tokens",
        ),
        (meta(weight_versions=[{"start": 0, "end": 3}]), "lacks what was asked for.*version"),
        (meta(weight_versions=3), "lacks what was asked for"),
    ],
)
def test_answers_that_must_not_be_trained_on(change: Change, says: str) -> None:
    with pytest.raises(ResponseError, match=says):
        parse_completion(changed(change), REQUEST)


@pytest.mark.parametrize("ids", ["789", [7, 8.5, 9]], ids=str)
def test_output_ids_are_a_list_of_integers(ids: Any) -> None:
    request = GenerateRequest(input_ids=(1, 2, 3), rid="r1", return_log_probs=False)
    with pytest.raises(ResponseError):
        parse_completion(changed(lambda made: made.update(output_ids=ids)), request)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)

PLACES = [("text",), ("output_ids",), ("meta_info",)] + [
    ("meta_info", name) for name in answer()["meta_info"]
]


@given(st.sampled_from(PLACES), JSON)
def test_a_garbled_answer_is_read_or_refused_with_our_error(
    place: tuple[str, ...], value: Any
) -> None:
    garbled = answer()
    target = garbled if len(place) == 1 else garbled[place[0]]
    target[place[-1]] = value
    try:
        completion = parse_completion(garbled, REQUEST)
    except (ResponseError, RequestAbortedError):
        return
    assert len(completion.output_ids) == len(completion.log_probs or ()) == 3
    assert all(map(math.isfinite, completion.log_probs or ()))
    assert completion.version_spans[-1].end == 3


@pytest.mark.parametrize("value", [None, math.nan, -math.inf])
@pytest.mark.parametrize("name", ["input_token_logprobs", "output_token_sampling_logprobs"])
def test_no_log_prob_may_be_null(name: str, value: Any) -> None:
    """SGLang writes null for what is not finite, as JSON has nothing else."""
    returns = Returns(input_log_probs=True, sampling_mask=True)
    request = GenerateRequest(input_ids=(1, 2, 3), rid="r1", returns=returns)
    found = {
        "input_token_logprobs": [[None, 1, None], [-1.0, 2, None], [-1.0, 3, None]],
        "output_token_sampling_mask": [[7], [8], [9]],
        "output_token_sampling_logprobs": [-1.0, -1.0, -1.0],
    }
    assert parse_completion(changed(meta(**found)), request).sampling_log_probs == [-1.0] * 3
    if name == "input_token_logprobs":
        found[name][2][0] = value
    else:
        found[name][2] = value
    with pytest.raises(ResponseError, match=r"that of token 2.*do the weights hold NaN"):
        parse_completion(changed(meta(**found)), request)


def test_top_log_probs_of_tokens_that_are_ruled_out() -> None:
    """By a mask, a grammar or a bias; where all are null, no distribution was there."""
    request = GenerateRequest(input_ids=(1, 2, 3), rid="r1", returns=Returns(top_log_probs=2))
    position = [[-0.1, 7, None], [None, 8, None]]
    found = parse_completion(changed(meta(output_top_logprobs=[position] * 3)), request)
    assert found.top_log_probs == [[(-0.1, 7), (-math.inf, 8)]] * 3
    lost = [[None, 7, None], [None, 8, None]]
    with pytest.raises(ResponseError, match=r"that of token 1.*do the weights hold NaN"):
        parse_completion(changed(meta(output_top_logprobs=[position, lost, position])), request)


@pytest.mark.parametrize("place", ["prompt", "sampled"])
def test_a_hidden_state_may_not_be_null(place: str) -> None:
    returns = Returns(hidden_states=True)
    request = GenerateRequest(input_ids=(1, 2, 3), rid="r1", returns=returns)
    states: Any = [[[1.0, 2.0]], [1.0, 2.0], [3.0, 4.0]]
    assert parse_completion(changed(meta(hidden_states=states)), request).hidden_states == states
    (states[0][0] if place == "prompt" else states[2])[1] = None
    with pytest.raises(ResponseError, match=r"hidden state is not finite.*NaN"):
        parse_completion(changed(meta(hidden_states=states)), request)


@pytest.mark.parametrize(
    ("states", "num_tokens", "read"),
    [
        ([[[0.0], [1.0]], [2.0], [3.0]], 3, [[[0.0], [1.0]], [2.0], [3.0]]),
        # Retracted after two tokens: prompt and both tokens again, of which one was cached.
        ([[[0.0], [1.0]], [2.0], [[8.0], [3.0]], [4.0]], 4, [[[0.0], [1.0]], [2.0], [3.0], [4.0]]),
        ([[[1.0]], [[9.0], [2.0]], [[9.0], [3.0]]], 3, [[[1.0]], [2.0], [3.0]]),
        ([[[1.0]], [2.0], [3.0]], 2, [[[1.0]], [2.0]]),  # drafted and not kept
        ([[[1.0]], [2.0]], 3, None),
        ([[[1.0]], [[2.0]], [3.0]], 2, None),
        ([], 1, None),
    ],
)
def test_hidden_states_are_one_per_token(
    states: list[Any], num_tokens: int, read: list[Any] | None
) -> None:
    request = GenerateRequest(
        input_ids=(5, 6), return_log_probs=False, returns=Returns(hidden_states=True)
    )
    meta = {
        "id": request.rid,
        "finish_reason": {"type": "length"},
        "prompt_tokens": 2,
        "completion_tokens": num_tokens,
        "hidden_states": states,
    }
    answer = {"output_ids": [7] * num_tokens, "meta_info": meta}
    if read is None:
        with pytest.raises(ResponseError, match=f"not of the {num_tokens} output ids"):
            parse_completion(answer, request)
    else:
        assert parse_completion(answer, request).hidden_states == read
