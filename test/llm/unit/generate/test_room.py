"""What fits into the context is asked for; what does not fit at all is refused by its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang import GenerateRequest, SamplingParams
from torchrl_sglang.errors import PromptTooLongError
from torchrl_sglang.generate.request import Media, SessionTurn
from torchrl_sglang.generate.room import (
    check_room,
    fitted,
    fitted_to_refusal,
    longest_input,
    room_for,
)

LONGEST = 20  # a server's max_req_input_len

ASKED = 8


def of_length(length: int, **fields: Any) -> GenerateRequest:
    options = {k: fields.pop(k) for k in ("min_new_tokens", "max_new_tokens") if k in fields}
    sampling = SamplingParams(max_new_tokens=ASKED).updated(options)
    return GenerateRequest(input_ids=(5,) * length, sampling=sampling, **fields)


def test_room() -> None:
    assert longest_input([None, 30, LONGEST]) == LONGEST
    assert longest_input([None]) is None
    assert room_for(5, None) is None
    assert [room_for(n, LONGEST) for n in (18, 19, 20, 99)] == [6, 5, 0, 0]


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (of_length(16), 8),
        (of_length(17), 7),
        (of_length(19), 5),
        (of_length(19, max_new_tokens=2), 2),
        (GenerateRequest(text="a", sampling=SamplingParams(max_new_tokens=99)), 99),
        (of_length(3, session=SessionTurn(session_id="s", worker_url="w", before=(5,) * 15)), 6),
        (of_length(19, media=Media(images=("a",))), 5),
        (of_length(19, scoring=True), 8),  # it asks for none
    ],
)
def test_what_is_asked_for(request_: GenerateRequest, asked: int) -> None:
    check_room([request_], LONGEST, "/m")
    (made,) = fitted([request_], LONGEST)
    assert made.sampling.max_new_tokens == asked
    assert made.rid == request_.rid
    assert fitted([request_], None) == [request_]
    check_room([request_], None, "/m")


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (of_length(20), "prompt 1 has 20 tokens; /m takes at most 19"),
        (of_length(20, scoring=True), "prompt 1 has 20 tokens"),
        (
            of_length(18, min_new_tokens=7),
            "prompt 1 has 18 tokens, which leaves room for 6 new ones, and min_new_tokens=7",
        ),
        (
            of_length(17, fit_context=False),
            "prompt 1 has 17 tokens.*room for 7.*max_new_tokens=8.*the 24 that.*fit_context=True",
        ),
        (
            of_length(5, session=SessionTurn(session_id="s", worker_url="w", before=(5,) * 15)),
            "prompt 1 has 20 tokens",
        ),
    ],
)
def test_what_does_not_fit(request_: GenerateRequest, says: str) -> None:
    with pytest.raises(PromptTooLongError, match=says):
        check_room([of_length(1), request_], LONGEST, "/m")


def test_what_the_server_counted() -> None:
    said = (
        "Requested token count exceeds the model's maximum context length of 2048 tokens. You "
        "requested a total of 3501 tokens: 1501 tokens from the input messages and 2000 tokens for "
        "the completion."
    )
    asked = GenerateRequest(text="a", sampling=SamplingParams(max_new_tokens=2000))
    smaller = fitted_to_refusal(asked, said)
    assert smaller is not None
    assert smaller.sampling.max_new_tokens == 547
    assert smaller.rid != asked.rid
    assert fitted_to_refusal(smaller, said) is None  # it would be refused for ever
    assert fitted_to_refusal(asked, "the text is too long") is None
    full = said.replace(" 1501 tokens from", " 2048 tokens from")
    assert fitted_to_refusal(asked, full) is None
    for other in (
        GenerateRequest(text="a", sampling=asked.sampling, fit_context=False),
        GenerateRequest(text="a", sampling=asked.sampling.updated({"min_new_tokens": 548})),
    ):
        assert fitted_to_refusal(other, said) is None
