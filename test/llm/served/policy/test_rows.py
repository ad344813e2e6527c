"""Sampling options for one call, and for each row of a batch by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack, set_list_to_stack
from torchrl.modules.llm.policies import Tokens

from helpers.behaviour import assert_close, chosen, full_log_probs, hf_logits
from helpers.row_options import make_input, only
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.errors import InputError, RequestRefusedError, UnsupportedOptionError

EOS = 2

PROMPTS = [[i, 2 * i + 3, 77, 100 + i] for i in range(3, 7)]


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
