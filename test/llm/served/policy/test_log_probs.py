"""What each setting does to the reported log-prob, and what `log_probs_mode` makes of it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from helpers.behaviour import (
    assert_close,
    check_kept,
    chosen,
    full_log_probs,
    hf_logits,
    renormalised,
)
from helpers.servers import needs
from torchrl_sglang import AsyncSGLang, BehaviourLogProbWarning, SamplingParams, SGLangWrapper
from torchrl_sglang.errors import ConfigError, UnsupportedOptionError

PROMPTS = [[i, 2 * i + 3, 77, 100 + i] for i in range(3, 9)]

LENGTH = 10

EOS = 2


def make_input(prompts: Sequence[Sequence[int]] = PROMPTS) -> Any:
    rows = [Tokens(prompt=torch.tensor(prompt), batch_size=()) for prompt in prompts]
    return lazy_stack([TensorDict(tokens=row, batch_size=()) for row in rows])


def make_policy(service: AsyncSGLang, options: dict[str, Any], **kwargs: Any) -> SGLangWrapper:
    options = {"max_new_tokens": LENGTH, "ignore_eos": True, **options}
    return SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=options, inplace=False, **kwargs
    )


def reference(row: Any, model: Any, sampling: SamplingParams, **kwargs: Any) -> torch.Tensor:
    """Hugging Face's log-probs for one row of the outputs, before truncation."""
    prompt, response = row["tokens"].prompt.tolist(), row["tokens"].response.tolist()
    return full_log_probs(hf_logits(model, prompt, response), response, sampling, **kwargs)


# Each line of the table: the options; whether the log-prob that is reported is that of the
# distribution sampled from; and whether it differs from the model's own at temperature 1.
TABLE = [
    ({}, True, False),
    ({"temperature": 0.5}, True, True),
    ({"temperature": 2.0}, True, True),
    ({"repetition_penalty": 1.5}, True, True),
    ({"frequency_penalty": 1.0}, True, True),
    ({"presence_penalty": 1.5}, True, True),
    ({"presence_penalty": 1.5, "frequency_penalty": -0.5, "temperature": 0.7}, True, True),
    ({"logit_bias": {7: -3.0, 50: 6.0}}, True, True),
    ({"logit_bias": {50: 4.0}, "temperature": 0.7}, True, True),
    ({"min_new_tokens": 5, "logit_bias": {EOS: 5.0}, "ignore_eos": False}, True, True),
    ({"temperature": 0.0}, False, False),
    ({"temperature": 0.0, "presence_penalty": 1.5}, False, True),
    ({"top_k": 1, "temperature": 0.5}, False, False),
    ({"top_k": 5}, False, False),
    ({"top_p": 0.7}, False, False),
    ({"min_p": 0.05}, False, False),
    ({"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 2.0}, False, True),
]


@pytest.mark.parametrize(("options", "exact", "changed"), TABLE, ids=str)
def test_what_is_reported(
    service: AsyncSGLang, model: Any, options: dict[str, Any], exact: bool, changed: bool
) -> None:
    """Temperature, penalties, biases and held-back stops are in it, truncation is not.

    Where it is greedy, it is the model's log-prob at temperature 1.
    """
    policy = make_policy(service, options, log_probs_mode="reported")
    plain, largest = SamplingParams(), 0.0
    for row in policy(make_input()).unbind(0):
        response, reported = row["tokens"].response.tolist(), row["log_probs"].response
        expected = chosen(reference(row, model, policy.sampling, stops=[EOS]), response)
        assert_close(reported, expected, policy.sampling)
        raw = chosen(reference(row, model, plain), response)
        largest = max(largest, (reported - raw).abs().max().item())
    assert (largest > 0.1) == changed


@pytest.mark.parametrize(("options", "exact", "changed"), TABLE, ids=str)
def test_what_is_warned_of_and_what_strict_refuses(
    service: AsyncSGLang, options: dict[str, Any], exact: bool, changed: bool
) -> None:
    greedy = SamplingParams.from_kwargs(options).temperature == 0
    if exact:
        make_policy(service, options, log_probs_mode="strict")
    else:
        with pytest.raises(UnsupportedOptionError, match="strict") as caught:
            make_policy(service, options, log_probs_mode="strict")
        named = ["temperature"] if greedy else {"top_k", "top_p", "min_p"} & options.keys()
        assert all(name in str(caught.value) for name in named)
        # Log-probs that nobody sees can't be wrong.
        make_policy(service, options, log_probs_mode="strict", return_log_probs=False)
    if exact or greedy:
        make_policy(service, options)
    else:
        with pytest.warns(BehaviourLogProbWarning, match="truncate"):
            make_policy(service, options)
    make_policy(service, options, log_probs_mode="reported")
    make_policy(service, options, return_log_probs=False)


def test_a_grammar_is_in_the_reported_log_prob(
    service: AsyncSGLang, tokenizer: Any, model: Any
) -> None:
    """Only the tokens that it allows share the probability."""
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    policy = make_policy(
        service, {"regex": "[0-9]{4}", "ignore_eos": False}, log_probs_mode="strict"
    )
    for row in policy(make_input()).unbind(0):
        response = row["tokens"].response.tolist()
        assert response[4:] == [EOS]
        allowed = [digits] * 4 + [[EOS]]
        expected = reference(row, model, policy.sampling, allowed=allowed)
        assert_close(row["log_probs"].response, chosen(expected, response))


TRUNCATING = [
    {"top_k": 5, "temperature": 2.0},
    {"top_p": 0.7},
    {"min_p": 0.1, "temperature": 2.0},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.005, "temperature": 2.0},
    {"top_k": 8, "presence_penalty": 1.5, "logit_bias": {50: 3.0}, "temperature": 2.0},
]


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("options", TRUNCATING, ids=str)
def test_corrected(
    service: AsyncSGLang, model: Any, options: dict[str, Any], pad_output: bool
) -> None:
    """The log-prob among the tokens kept; a trainer that renormalises over them gets the same."""
    needs(service, "sampling_mask_tokens")
    policy = make_policy(
        service,
        options,
        log_probs_mode="corrected",
        extras=["sampling_mask"],
        pad_output=pad_output,
    )
    gain = 0.0
    for row in policy(make_input()).unbind(0):
        response = row["tokens"].response.tolist()
        ids, offsets = row["rollout"]["sampling_mask_ids"], row["rollout"]["sampling_mask_offsets"]
        assert (ids.dtype, offsets.dtype) == (torch.int64, torch.int64)
        assert (offsets[0], offsets[-1], len(offsets)) == (0, len(ids), LENGTH + 1)
        kept = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
        whole = reference(row, model, policy.sampling)
        for position, token in enumerate(response):
            assert token in kept[position]
            assert len(set(kept[position])) == len(kept[position])
            check_kept(whole[position], kept[position], policy.sampling)
        expected = chosen(renormalised(whole, kept), response)
        corrected = row["log_probs"].response
        assert_close(corrected, expected, policy.sampling)
        sampled = row["masks"].all_assistant_mask
        assert torch.equal(row["log_probs"].full[sampled], corrected)
        gain = max(gain, (corrected - chosen(whole, response)).max().item())
    assert gain > 0.2  # what the reported log-probs are off by


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 1}], ids=str
)
def test_corrected_where_it_is_greedy(service: AsyncSGLang, options: dict[str, Any]) -> None:
    """The one token that can come has probability 1."""
    out = make_policy(service, options, log_probs_mode="corrected")(make_input())
    assert (out["log_probs"].response == 0).all()


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"presence_penalty": 1.0}], ids=str)
def test_corrected_where_nothing_has_to_be(
    service: AsyncSGLang, model: Any, options: dict[str, Any]
) -> None:
    policy = make_policy(service, options, log_probs_mode="corrected")
    for row in policy(make_input()).unbind(0):
        expected = chosen(reference(row, model, policy.sampling), row["tokens"].response.tolist())
        assert_close(row["log_probs"].response, expected, policy.sampling)


def likeliest(scores: torch.Tensor, count: int, response: list[int]) -> list[list[int]]:
    """What top-k keeps: of two that are all but equally likely in bf16, the one sampled."""
    kept = scores.topk(count).indices
    for ids, here, token in zip(kept, scores, response, strict=True):
        if token not in ids and here[token] > here[ids[-1]] - 0.03:
            ids[-1] = token
    return kept.tolist()


def test_corrected_row_by_row(service: AsyncSGLang, model: Any) -> None:
    """Each row's log-probs are those of its own options."""
    needs(service, "sampling_mask_tokens")
    options = [{"top_k": 2}, {}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.5}, {}]
    td = make_input()
    for row, own in zip(td.unbind(0), options, strict=True):
        row.set("sampling", TensorDict({name: torch.tensor(v) for name, v in own.items()}))
    policy = make_policy(service, {"temperature": 2.0}, log_probs_mode="corrected")
    for row, own in zip(policy(td).unbind(0), options, strict=True):
        response, got = row["tokens"].response.tolist(), row["log_probs"].response
        sampling = policy.sampling.updated(own)
        whole = reference(row, model, sampling)
        if sampling.greedy:
            assert (got == 0).all()
        elif own == {"top_k": 2}:
            expected = chosen(renormalised(whole, likeliest(whole, 2, response)), response)
            torch.testing.assert_close(got, expected, atol=0.05, rtol=0)
        else:
            assert_close(got, chosen(whole, response), sampling)


def test_strict_and_warnings_for_a_call_and_for_a_row(service: AsyncSGLang) -> None:
    strict = make_policy(service, {}, log_probs_mode="strict")
    with pytest.raises(UnsupportedOptionError, match=r"strict.*top_p"):
        strict(make_input(), top_p=0.5)
    td = make_input().set("sampling", TensorDict(top_k=torch.tensor([-1, -1, -1, 5, -1, -1])))
    with pytest.raises(UnsupportedOptionError, match=r"strict.*top_k") as caught:
        strict(td)
    assert caught.value.__notes__ == ["row 3 of the batch"]
    plain = make_policy(service, {})
    with pytest.warns(BehaviourLogProbWarning, match="min_p"):
        plain(make_input(), min_p=0.1)
    with pytest.warns(BehaviourLogProbWarning, match="top_k"):
        plain(td)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_policy(service, {}, log_probs_mode="reported")(td, top_p=0.5)


class OfAUser(SGLangWrapper):
    """A wrapper that a user makes in a class of his own."""

    def __init__(self, service: AsyncSGLang) -> None:
        super().__init__(service, input_mode="tokens", generate_kwargs={"top_p": 0.9})


def test_a_warning_names_the_line_of_the_user(service: AsyncSGLang) -> None:
    """From the constructor, from a call, and from the options of a row."""
    plain = make_policy(service, {})
    own = TensorDict(top_k=torch.tensor([-1, 3]), batch_size=2)
    rows = make_input(PROMPTS[:2]).update({"sampling": own})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_policy(service, {"top_k": 3})
        OfAUser(service)
        plain(make_input(), min_p=0.1)
        plain(rows)
    told = [each for each in caught if each.category is BehaviourLogProbWarning]
    assert {each.filename for each in told} == {__file__}
    assert len({each.lineno for each in told}) == 4


def test_the_sampling_mask_needs_a_top_k(service: AsyncSGLang) -> None:
    """SGLang returns no mask without one; corrected log-probs choose the largest that it takes."""
    needs(service, "sampling_mask_tokens")
    policy = make_policy(
        service, {"top_p": 0.9}, log_probs_mode="reported", extras=["sampling_mask"]
    )
    with pytest.raises(UnsupportedOptionError, match="top_k"):
        policy(make_input())
    assert "rollout" in policy(make_input(), temperature=0.0)


def test_unknown_mode(service: AsyncSGLang) -> None:
    with pytest.raises(ConfigError, match="reported"):
        make_policy(service, {}, log_probs_mode="exact")
