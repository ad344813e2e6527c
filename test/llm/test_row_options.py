"""Sampling options for every row, for one call, and for each row of a batch by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers.behaviour import assert_close, chosen, full_log_probs, hf_logits
from helpers.servers import needs_xgrammar
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack, set_list_to_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang import (
    AsyncSGLang,
    Completion,
    GenerateRequest,
    SamplingParams,
    SGLangWrapper,
)
from torchrl_sglang.errors import (
    ConfigError,
    InputError,
    RequestRefusedError,
    UnsupportedOptionError,
)
from torchrl_sglang.generate.check import check_features
from torchrl_sglang.servers.info import Features

EOS = 2
PROMPTS = [[i, 2 * i + 3, 77, 100 + i] for i in range(3, 7)]
TAG = {
    "type": "structural_tag",
    "format": {"type": "json_schema", "json_schema": {"type": "integer"}},
}
SCHEMA = {"enum": ["x", "y"]}


def only(*ids: int) -> dict[int, float]:
    """A bias after which nothing else comes."""
    return dict.fromkeys(ids, 100.0)


def ends(*ids: int, by: str | int | None) -> Callable[[Completion, Any], bool]:
    """The completion is these ids, and ended by this."""
    reason = "length" if by == "length" else "stop"
    matched = None if by == "length" else by
    return lambda c, _: (
        (c.output_ids, c.finish_type, c.matched_stop) == (list(ids), reason, matched)
    )


def decoded(matches: Callable[[str], Any], **facts: Any) -> Callable[[Completion, Any], bool]:
    """What all its tokens say is like this, and so are fields of the completion."""
    return lambda c, tokenizer: bool(
        matches(tokenizer.decode(c.output_ids))
        and all(getattr(c, name) == value for name, value in facts.items())
    )


def is_json(*values: Any) -> Callable[[str], bool]:
    return lambda text: json.loads(text.removesuffix("<|im_end|>")) in values


ABC = {"regex": "(abc ){9}", "max_new_tokens": 40}

# Options, and what a completion is like then. Where several biases are given, one token is sure.
FIELDS: list[tuple[dict[str, Any], Callable[[Completion, Any], bool]]] = [
    ({"max_new_tokens": 3, "logit_bias": only(7)}, ends(7, 7, 7, by="length")),
    ({"max_new_tokens": 1, "logit_bias": only(7)}, ends(7, by="length")),
    ({"logit_bias": only(EOS), "max_new_tokens": 3}, ends(EOS, by=EOS)),
    (
        {"logit_bias": only(EOS), "max_new_tokens": 3, "ignore_eos": True},
        ends(EOS, EOS, EOS, by="length"),
    ),
    (
        {"logit_bias": {EOS: 100.0, 7: 50.0}, "min_new_tokens": 2, "max_new_tokens": 5},
        ends(7, 7, EOS, by=EOS),
    ),
    ({"logit_bias": only(7), "stop_token_ids": [9, 7]}, ends(7, by=7)),
    (
        {"logit_bias": {7: 100.0, 9: 50.0}, "stop_token_ids": [7], "min_new_tokens": 2},
        ends(9, 9, 7, by=7),
    ),
    ({"logit_bias": {7: -100.0}, "top_k": 1}, lambda c, _: 7 not in c.output_ids),
    (
        {**ABC, "stop": "c ab"},
        decoded(
            re.compile(r"abc abc?").fullmatch,
            finish_type="stop",
            matched_stop="c ab",
            text="ab",
        ),
    ),
    ({**ABC, "stop": ["zzz", "bc a"]}, decoded(re.compile("abc a").match, matched_stop="bc a")),
    ({**ABC, "stop": "c a", "no_stop_trim": True}, lambda c, _: c.text.startswith("abc a")),
    (
        {**ABC, "stop_regex": "c.*c"},
        decoded(re.compile("abc abc ?").fullmatch, finish_type="stop", matched_stop=None),
    ),
    ({"regex": "[ab]{3}x"}, decoded(re.compile(r"[ab]{3}x<\|im_end\|>").fullmatch)),
    ({"json_schema": SCHEMA}, decoded(is_json("x", "y"))),
    ({"json_schema": json.dumps(SCHEMA)}, decoded(is_json("x", "y"))),
    ({"ebnf": 'root ::= "yes" | "no"'}, decoded(re.compile(r"(yes|no)<\|im_end\|>").fullmatch)),
    ({"structural_tag": TAG}, decoded(re.compile(r"-?\d+(<\|im_end\|>)?").fullmatch)),
    (
        {"logit_bias": {1: 100.0}, "max_new_tokens": 1, "skip_special_tokens": False},
        lambda c, _: c.text == "<|im_start|>",
    ),
    ({"logit_bias": {1: 100.0}, "max_new_tokens": 1}, lambda c, _: c.text == ""),
]


@pytest.mark.parametrize(("options", "holds"), FIELDS, ids=lambda v: "" if callable(v) else str(v))
def test_fields(
    service: AsyncSGLang,
    tokenizer: Any,
    options: dict[str, Any],
    holds: Callable[[Completion, Any], bool],
) -> None:
    if "structural_tag" in options:
        needs_xgrammar("does not know this form of a structural tag")
    for completion in service.generate(PROMPTS, {"max_new_tokens": 12, **options}):
        assert holds(completion, tokenizer), completion


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"do_sample": False},
        {"top_k": 1, "temperature": 1.5},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "frequency_penalty": 2.0},
        {"temperature": 0.0, "presence_penalty": 2.0},
        {"temperature": 0.0, "presence_penalty": -2.0, "logit_bias": {50: 3.0}},
    ],
    ids=str,
)
def test_the_most_likely_token(service: AsyncSGLang, model: Any, options: dict[str, Any]) -> None:
    """Of the distribution that penalties and biases have changed."""
    sampling = SamplingParams.from_kwargs({"max_new_tokens": 12, "ignore_eos": True, **options})
    for prompt, completion in zip(PROMPTS, service.generate(PROMPTS, sampling), strict=True):
        ids = completion.output_ids
        scores = full_log_probs(hf_logits(model, prompt, ids), ids, sampling)
        assert (scores.max(-1).values - chosen(scores, ids)).max() < 0.1  # bf16


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3, "temperature": 3.0}, {"top_p": 0.2, "temperature": 2.0}, {"min_p": 0.3}],
    ids=str,
)
def test_truncation_keeps_the_likely_tokens(
    service: AsyncSGLang, model: Any, options: dict[str, Any]
) -> None:
    sampling = SamplingParams.from_kwargs({"max_new_tokens": 12, "ignore_eos": True, **options})
    for prompt, completion in zip(PROMPTS, service.generate(PROMPTS, sampling), strict=True):
        ids = completion.output_ids
        scores = full_log_probs(hf_logits(model, prompt, ids), ids, sampling)
        for position, token in enumerate(ids):
            # The token is among those that may be kept: as if it had been the only one.
            order = scores[position].argsort(descending=True)
            rank = int((order == token).nonzero())
            probs = scores[position][order].exp()
            if sampling.top_k > 0:  # two that are all but equally likely may change places in bf16
                assert probs[rank] > 0.97 * probs[sampling.top_k - 1]
            assert probs[:rank].sum() < sampling.top_p + 0.03
            assert probs[rank] > (sampling.min_p - 0.03) * probs[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "%<|im_end|>"),
        ({"skip_special_tokens": True}, "%"),
        ({"skip_special_tokens": False}, "%<|im_end|>"),
        ({"no_stop_trim": False}, "%"),
        ({"no_stop_trim": False, "spaces_between_special_tokens": True}, "%"),
        ({"no_stop_trim": True}, "%<|im_end|>"),
        ({"spaces_between_special_tokens": False}, "%<|im_end|>"),
        ({"skip_special_tokens": True, "no_stop_trim": False}, "%"),
    ],
    ids=str,
)
def test_how_text_is_written(service: AsyncSGLang, options: dict[str, Any], text: str) -> None:
    """As TorchRL's wrappers write it, special tokens and stop included, unless told otherwise."""
    forced = {"logit_bias": {EOS: 100.0, 7: 50.0}, "min_new_tokens": 1}  # 7 is "%"
    policy = SGLangWrapper(service, input_mode="tokens", generate_kwargs={**forced, **options})
    per_call = SGLangWrapper(service, input_mode="tokens", generate_kwargs=forced)
    for out in (policy(make_input()), per_call(make_input(), **options)):
        for row in out.unbind(0):
            assert row["tokens"].response.tolist() == [7, EOS]
            assert row["text"].response == text


def make_input(options: Sequence[Mapping[str, Any] | None] | None = None) -> Any:
    """The prompts, and options for each."""
    rows = []
    for index, prompt in enumerate(PROMPTS):
        row = TensorDict(tokens=Tokens(prompt=torch.tensor(prompt), batch_size=()), batch_size=())
        if options is not None and options[index] is not None:
            own = TensorDict({})
            for name, value in options[index].items():
                own.set(name, value if isinstance(value, torch.Tensor) else NonTensorData(value))
            row.set("sampling", own)
        rows.append(row)
    return lazy_stack(rows)


def make_policy(service: AsyncSGLang, **kwargs: Any) -> SGLangWrapper:
    options = {"max_new_tokens": 6, "ignore_eos": True, **kwargs.pop("generate_kwargs", {})}
    return SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=options, inplace=False, **kwargs
    )


def responses(out: Any) -> list[list[int]]:
    return [row["tokens"].response.tolist() for row in out.reshape(-1).unbind(0)]


def lengths(out: Any) -> list[int]:
    return [len(response) for response in responses(out)]


# One value per row, in every form in which a TensorDict can hold it: lengths that come out.
FORMS: list[tuple[Callable[[], Any], list[int]]] = [
    (lambda: TensorDict(max_new_tokens=torch.tensor([1, 2, 3, 4]), batch_size=4), [1, 2, 3, 4]),
    (lambda: TensorDict(max_tokens=torch.tensor([4, 3, 2, 1]), batch_size=4), [4, 3, 2, 1]),
    (
        lambda: TensorDict(max_new_tokens=NonTensorStack(1, None, 3, None), batch_size=4),
        [1, 6, 3, 6],
    ),
    (lambda: TensorDict({"stop": "%%"}, batch_size=4), [2, 2, 2, 2]),
    (lambda: TensorDict(batch_size=4), [6, 6, 6, 6]),
    (
        lambda: TensorDict(
            stop_token_ids=torch.tensor([[7, 8], [9, 8], [9, 7], [9, 8]]), batch_size=4
        ),
        [1, 6, 1, 6],
    ),
    (
        lambda: TensorDict(stop_token_ids=NonTensorStack([7], None, [9, 7], [8]), batch_size=4),
        [1, 6, 1, 6],
    ),
    (lambda: TensorDict(stop=NonTensorStack("%", None, "a", "%%"), batch_size=4), [1, 6, 6, 2]),
    (
        lambda: TensorDict(stop=NonTensorStack(["a", "%"], ["b"], ["%%", "c"], None), batch_size=4),
        [1, 6, 2, 6],
    ),
    (
        lambda: TensorDict(stop_regex=NonTensorStack("%{3}", None, "%", "a"), batch_size=4),
        [3, 6, 1, 6],
    ),
]


@pytest.mark.parametrize(("make_options", "expected"), FORMS)
@pytest.mark.parametrize("stacked", [False, True], ids=["dense", "lazy"])
def test_forms_of_row_options(
    service: AsyncSGLang, make_options: Callable[[], Any], expected: list[int], stacked: bool
) -> None:
    with set_list_to_stack(True):
        options = make_options()
    td = make_input()
    if stacked:
        for row, own in zip(td.unbind(0), options.unbind(0), strict=True):
            row.set("sampling", own)
    else:
        td = TensorDict(tokens=Tokens(prompt=torch.tensor(PROMPTS), batch_size=4), batch_size=4)
        td.set("sampling", options)
    policy = make_policy(service, generate_kwargs={"logit_bias": only(7), "ignore_eos": False})
    assert lengths(policy(td)) == expected


def test_rows_need_not_have_the_same_options(service: AsyncSGLang, tokenizer: Any) -> None:
    """A stack of rows hides the keys that not all rows have; none may be lost."""
    options = [
        {"regex": "a{3}", "ignore_eos": torch.tensor(False)},
        {"logit_bias": only(9)},
        None,
        {"json_schema": {"enum": [12]}, "ignore_eos": torch.tensor(False)},
    ]
    first, second, third, fourth = responses(make_policy(service)(make_input(options)))
    assert tokenizer.decode(first) == "aaa<|im_end|>"
    assert second == [9] * 6
    assert len(third) == 6
    assert third != second
    assert tokenizer.decode(fourth) == "12<|im_end|>"


@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_row_options_in_every_batch_shape(service: AsyncSGLang, shape: tuple[int, ...]) -> None:
    td = make_input([{"max_new_tokens": torch.tensor(i + 1)} for i in range(4)])
    td = td[2] if not shape else td.reshape(shape)
    out = make_policy(service)(td)
    assert out.batch_size == torch.Size(shape)
    assert lengths(out if shape else out.unsqueeze(0)) == ([1, 2, 3, 4] if shape else [3])


def test_row_options_for_each_of_several_samples(service: AsyncSGLang) -> None:
    td = make_input([{"max_new_tokens": torch.tensor(i + 1)} for i in range(4)])
    out = make_policy(service, num_samples=2)(td)
    assert out.batch_size == (4, 2)
    assert lengths(out) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_row_goes_before_a_call_and_a_call_before_the_policy(service: AsyncSGLang) -> None:
    policy = make_policy(service)
    td = make_input([{"max_tokens": torch.tensor(2)}, None, None, None])
    assert lengths(policy(td)) == [2, 6, 6, 6]
    assert lengths(policy(td, max_new_tokens=4)) == [2, 4, 4, 4]
    assert lengths(policy(td)) == [2, 6, 6, 6]  # a call leaves nothing behind


def test_another_key_and_none(service: AsyncSGLang) -> None:
    td = make_input([{"max_new_tokens": torch.tensor(2)}] * 4)
    assert lengths(make_policy(service, sampling_key=None)(td)) == [6] * 4
    td = td.rename_key_("sampling", "mine")
    assert lengths(make_policy(service, sampling_key="mine")(td)) == [2] * 4
    nested = make_input().set(
        ("a", "b"), TensorDict(max_new_tokens=torch.ones(4, dtype=torch.int64), batch_size=4)
    )
    assert lengths(make_policy(service, sampling_key=("a", "b"))(nested)) == [1] * 4


NEIGHBOURS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -1.0},
    {"logit_bias": {50: 4.0}},
    {"min_new_tokens": 6, "logit_bias": {EOS: 3.0}},
    {"temperature": 0.0},
    {"top_k": 1, "temperature": 0.5},
    {"top_p": 0.4},
    {"min_p": 0.3, "temperature": 2.0},
    {},
]


def test_rows_do_not_change_each_other(service: AsyncSGLang, model: Any) -> None:
    """Among neighbours with all sorts of options, each row's log-probs are those of its own."""
    rows = [
        TensorDict(
            tokens=Tokens(prompt=torch.tensor(PROMPTS[index % 4]), batch_size=()),
            sampling=TensorDict({name: NonTensorData(v) for name, v in own.items()}),
        )
        for index, own in enumerate(NEIGHBOURS)
    ]
    policy = make_policy(service, log_probs_mode="reported")
    for row, own in zip(policy(lazy_stack(rows)).unbind(0), NEIGHBOURS, strict=True):
        prompt, response = row["tokens"].prompt.tolist(), row["tokens"].response.tolist()
        sampling = policy.sampling.updated(own)
        scores = full_log_probs(hf_logits(model, prompt, response), response, sampling, stops=[EOS])
        assert_close(row["log_probs"].response, chosen(scores, response), sampling)


def test_a_greedy_row_is_the_same_alone_and_among_others(service: AsyncSGLang) -> None:
    policy = make_policy(service, log_probs_mode="reported")
    greedy, other = {"top_k": torch.tensor(1)}, {"temperature": torch.tensor(3.0)}
    alone = policy(make_input([greedy] * 4))
    mixed = policy(make_input([greedy, other, greedy, other]))
    for index in (0, 2):
        assert torch.equal(alone[index]["tokens"].response, mixed[index]["tokens"].response)
        torch.testing.assert_close(
            alone[index]["log_probs"].response,
            mixed[index]["log_probs"].response,
            atol=0.02,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"temprature": torch.tensor(1.0)}, "Did you mean 'temperature'"),
        ({"max_token": torch.tensor(1)}, "Did you mean 'max_tokens'"),
        ({"action_msk": torch.ones(512)}, "Did you mean 'action_mask'"),
        ({"lorra": "x"}, "Did you mean 'lora'"),
        ({"qqq": torch.tensor(1.0)}, "Known: action_mask, .*ebnf"),
        ({"num_beams": torch.tensor(2)}, "beam search"),
        ({"temperature": torch.tensor(-1.0)}, "must be a number >= 0"),
        ({"temperature": torch.tensor([1.0, 2.0])}, "must be a number >= 0"),
        ({"stop_regex": "("}, "regular expressions"),
        ({"regex": "a", "ebnf": "b"}, "choose one"),
        ({"n": torch.tensor(2)}, "same number of samples"),
        ({"skip_special_tokens": torch.tensor(True)}, "the same for all rows"),
        ({"min_new_tokens": torch.tensor(9)}, "above max_new_tokens"),
        ({"stop_token_ids": torch.tensor([7])}, "ignore_eos"),
        ({"session": "gone"}, "not opened here"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_row_is_said_with_its_number(
    service: AsyncSGLang, row: dict[str, Any], match: str
) -> None:
    td = make_input([None, None, row, None])
    with pytest.raises((UnsupportedOptionError, InputError), match=match) as caught:
        make_policy(service)(td)
    assert caught.value.__notes__ == ["row 2 of the batch"]


@pytest.mark.parametrize(
    "options", [torch.ones(4), NonTensorStack("a", "b", "c", "d")], ids=["tensor", "strings"]
)
def test_what_is_no_tensordict_of_options(service: AsyncSGLang, options: Any) -> None:
    with pytest.raises(InputError, match="one value per row"):
        make_policy(service)(make_input().set("sampling", options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
        ({"lorra": "x"}, "Did you mean 'lora'"),
        ({"max_new_tokens": 0}, "integer >= 1"),
        ({"do_sample": False, "temperature": 0.5}, "leave one out"),
    ],
    ids=str,
)
def test_options_of_a_call(service: AsyncSGLang, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=match):
        make_policy(service)(make_input(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"regex": "("}, "regex"),
        ({"json_schema": {"type": "nonsense"}}, "json"),
        ({"ebnf": "root :="}, "ebnf"),
    ],
    ids=str,
)
def test_what_only_the_server_can_tell(
    service: AsyncSGLang, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(RequestRefusedError, match=match) as caught:
        make_policy(service)(make_input([None, options, None, None]))
    assert caught.value.status == 400
    assert "prompt 1" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "options",
    [{"stop_regex": "("}, {"stop_regex": "ä" * 129}, {"stop": ["a"] * 33}],
    ids=["no regex", "bytes", "too many"],
)
def test_stops_that_the_server_would_fail_on(options: dict[str, Any]) -> None:
    """It answers 500 to the first, which looks like a failure that is worth another attempt."""
    with pytest.raises(ConfigError):
        SamplingParams(**options)


def test_min_p_where_seeds_are_used() -> None:
    """SGLang's sampler has an assertion against the two, which ends the server."""
    request = GenerateRequest(input_ids=(5,), sampling=SamplingParams(min_p=0.1))
    check_features(request, Features())
    with pytest.raises(UnsupportedOptionError, match="min_p"):
        check_features(request, Features(deterministic=True))
