"""Samples ``min_new_tokens`` on servers without a tokenizer, which refuse it, in two requests.

A request becomes two: the first of exactly so many tokens, with every id that ends a row ruled out
by a bias, and the second goes on from it. That is what a server with a tokenizer does with the
logits of these tokens, so that the log-probs are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError, ResponseError, UnsupportedOptionError
from ..servers.info import Features
from .completion import Completion, joined
from .partial import sampling_left
from .request import GenerateRequest
from .room import num_tokens, room_for

# Added to the logits of ids that are ruled out: JSON has no infinity, and no logit gets near it.
RULED_OUT = -1e9


@dataclass(frozen=True, kw_only=True)
class TwoParts:
    """How the servers of a batch are asked for a fewest number of tokens.

    Attributes:
        eos_ids: ids at which they end a row by themselves.
        max_input_len: what a prompt has to be shorter than; None: not told.
    """

    eos_ids: tuple[int, ...]
    max_input_len: int | None

    def apply(self, request: GenerateRequest) -> bool:
        """Whether a request has to be sent as two."""
        return not request.scoring and request.sampling.min_new_tokens > 0

    def first(self, request: GenerateRequest) -> GenerateRequest:
        """The request of exactly ``min_new_tokens`` tokens."""
        sampling = request.sampling
        biases = dict(sampling.logit_bias or {})
        biases |= dict.fromkeys((*self.eos_ids, *sampling.stop_token_ids), RULED_OUT)
        fewest = sampling.min_new_tokens
        changed = replace(
            sampling, max_new_tokens=fewest, min_new_tokens=0, logit_bias=biases or None
        )
        return replace(request, sampling=changed)

    def rest(
        self, request: GenerateRequest, first: Completion, sample: int, seeded: bool
    ) -> GenerateRequest | None:
        """The request that goes on from a sample's first part; None: that is the whole.

        Args:
            request: the whole one.
            first: what its first part came to.
            sample: which sample this is.
            seeded: samples have seeds of their own, see `GenerateRequest.bodies`.

        Raises:
            ResponseError: the first part ended at an id that was not known to end a row.
        """
        done, sampling = len(first.output_ids), request.sampling
        if first.finish_type == "stop":
            raise ResponseError(
                f"request {request.rid} ended with {first.matched_stop!r} after {done} tokens, "
                f"before min_new_tokens={sampling.min_new_tokens}: the files of the model do not "
                "name this id as its EOS. Start the servers with their tokenizer."
            )
        held = num_tokens(request) + done
        if (
            first.finish_type == "abort"
            or done >= sampling.max_new_tokens
            or room_for(held, self.max_input_len) == 0
        ):
            return None
        left = replace(sampling_left(sampling, done, stops_matched=True), n=1)
        if seeded or sampling.sampling_seed is not None:
            left = replace(left, sampling_seed=request.seeds()[sample])
        return replace(
            request,
            input_ids=(*(request.input_ids or ()), *first.output_ids),
            sampling=left,
            returns=replace(request.returns, input_log_probs=False),
            processor=None if request.processor is None else request.processor.after(done),
            rid=f"{request.rid}-rest{sample}",
        )


def both(first: Completion, rest: Completion) -> Completion:
    """The two parts of a sample as one, under the id of the first."""
    return replace(joined(first, rest), rid=first.rid)


def check_parts(batch: Sequence[GenerateRequest], features: Features) -> None:
    """Raises for requests that have to be sent as two, and can't be.

    Raises:
        UnsupportedOptionError: a session, nobody knows what ends a row, or something that SGLang
            would begin again in the second part.
    """
    for index, request in enumerate(batch):
        fewest = request.sampling.min_new_tokens
        if features.tokenizer or request.scoring or fewest == 0:
            continue
        try:
            _check(request, features)
        except ConfigError as error:
            raise UnsupportedOptionError(
                f"prompt {index}: min_new_tokens={fewest} is sent in two requests to servers "
                f"without a tokenizer (skip_tokenizer_init), which is not possible here: {error}"
            ) from error


def _check(request: GenerateRequest, features: Features) -> None:
    fewest = request.sampling.min_new_tokens
    if request.session is not None:
        raise UnsupportedOptionError("a session would hold them as two turns.")
    if features.eos_ids is None:
        raise UnsupportedOptionError(
            "the model's config.json is not on this machine, or does not say its eos_token_id, so "
            "that nobody knows which ids to rule out."
        )
    if fewest < request.sampling.max_new_tokens:
        sampling_left(request.sampling, fewest, stops_matched=True)
        if request.processor is not None:
            request.processor.after(fewest)
