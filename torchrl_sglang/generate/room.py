"""Fits requests into a server's context. Needs only the standard library.

``max_new_tokens`` is a maximum: a request is asked for what fits, and ends with ``"length"`` there.
SGLang itself refuses a request whose maximum reaches beyond the context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import PromptTooLongError
from .request import GenerateRequest

# A server tells its max_req_input_len M: a prompt has to be shorter, and prompt and new tokens are
# cut at M + 4, without a word (SGLang's init_req_max_new_tokens).
BEYOND_LONGEST_INPUT = 4

# How it refuses a request whose prompt it has counted itself: a text, or one with media.
REFUSAL = re.compile(
    r"maximum context length of (\d+) tokens.* (\d+) tokens from the input", re.DOTALL
)


def longest_input(told: Iterable[int | None]) -> int | None:
    """The smallest of the ``max_req_input_len`` of servers that share requests; None: not told."""
    return min((each for each in told if each is not None), default=None)


def room_for(num_tokens: int, longest: int | None) -> int | None:
    """New tokens that fit behind a prompt of so many; 0: it is refused; None: nobody knows."""
    if longest is None:
        return None
    return longest + BEYOND_LONGEST_INPUT - num_tokens if num_tokens < longest else 0


def room_behind(request: GenerateRequest, longest: int | None) -> int | None:
    """Same as `room_for`; the length of a text only the server knows."""
    return None if request.input_ids is None else room_for(num_tokens(request), longest)


def num_tokens(request: GenerateRequest) -> int:
    """Tokens of the prompt, and of what its session holds; media are only their placeholders."""
    before = () if request.session is None else request.session.before
    return len(before) + len(request.input_ids or ())


def check_room(batch: Sequence[GenerateRequest], longest: int | None, model: str) -> None:
    """Raises for prompts that do not leave the room that they have to.

    Args:
        batch: the requests.
        longest: the servers' ``max_req_input_len``; None: not told.
        model: what is served, for the message.

    Raises:
        PromptTooLongError: no room for one token, for ``min_new_tokens``, or, where a request is
            not to be fitted, for ``max_new_tokens``.
    """
    for index, request in enumerate(batch):
        room = room_behind(request, longest)
        if room is None or longest is None:
            continue
        prompt = f"prompt {index} has {num_tokens(request)} tokens"
        if room == 0:
            raise PromptTooLongError(
                f"{prompt}; {model} takes at most {longest - 1}. Shorten it, or serve with a "
                "longer context_length (or more max_total_tokens, where memory is what bounds it)."
            )
        needed = _needed(request)
        if needed is not None and room < needed[1]:
            name, least = needed
            raise PromptTooLongError(
                f"{prompt}, which leaves room for {room} new ones, and {name}={least}: together "
                f"more than the {longest + BEYOND_LONGEST_INPUT} that {model} takes. Shorten the "
                f"prompt, ask for fewer{_way_out(name)}, or serve with a longer context_length."
            )


def _needed(request: GenerateRequest) -> tuple[str, int] | None:
    """The option that says how many new tokens there have to be room for."""
    if request.scoring:
        return None
    name = "min_new_tokens" if request.fit_context else "max_new_tokens"
    return name, getattr(request.sampling, name)


def _way_out(name: str) -> str:
    return "" if name == "min_new_tokens" else ", take what fits (fit_context=True)"


def fitted(batch: Sequence[GenerateRequest], longest: int | None) -> list[GenerateRequest]:
    """The requests, each asking for no more than what fits; they passed `check_room`."""
    return [_fitted(request, room_behind(request, longest)) for request in batch]


def fitted_to_refusal(request: GenerateRequest, refusal: str) -> GenerateRequest | None:
    """A request that fits, by what the server counted; None: that is not why it was refused.

    Args:
        request: what was refused.
        refusal: the server's answer.
    """
    told = REFUSAL.search(refusal)
    if told is None or not request.fit_context or request.scoring:
        return None
    room = int(told[1]) - int(told[2])
    if not max(1, request.sampling.min_new_tokens) <= room < request.sampling.max_new_tokens:
        return None
    return replace(_fitted(request, room), rid=f"{request.rid}-fitted")  # never one id twice


def _fitted(request: GenerateRequest, room: int | None) -> GenerateRequest:
    if room is None or request.scoring or request.sampling.max_new_tokens <= room:
        return request
    return replace(request, sampling=replace(request.sampling, max_new_tokens=room))
