"""`SGLangWrapper(generate=False)`: log-probs of what is there already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens, TransformersWrapper

from helpers.rows import rows_of, shaped
from helpers.servers import hf_log_probs
from torchrl_sglang import (
    AsyncSGLang,
    GenerateRequest,
    SamplingParams,
    SGLangWrapper,
    disallowed_tokens,
)
from torchrl_sglang.errors import ConfigError, EmptyPromptError, UnsupportedOptionError

CHATS = [
    [("user", "the quick"), ("assistant", "brown fox")],
    [("system", "be short"), ("user", "hello"), ("assistant", "no")],
    [("user", "42"), ("assistant", "is it"), ("user", "hm?"), ("assistant", "it is.")],
    [("user", "a"), ("assistant", "b")],
    [("user", "a policy acts"), ("assistant", "the environment answers")],
    [("user", "x"), ("assistant", "")],
]

TEXTS = ["the quick brown fox", "hello", "a policy acts, it learns", "no", "42?!", "q"]

IDS = [[5, 6, 7, 8], [20, 21], [2, 40, 41, 42, 43, 44], [99], [300, 2], [70, 71, 72]]

SHAPES = [(), (6,), (2, 3)]

MODES = ["history", "text", "tokens"]


def messages(index: int) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CHATS[index]]


def make_input(mode: str, shape: tuple[int, ...] = (6,)) -> Any:
    if mode == "history":
        histories = [History.from_chats([messages(index)])[0] for index in range(6)]
        rows = [
            TensorDict(history=ChatHistory(full=history, batch_size=()), batch_size=())
            for history in histories
        ]
    elif mode == "text":
        rows = [TensorDict(text=Text(full=text, batch_size=()), batch_size=()) for text in TEXTS]
    else:
        rows = [
            TensorDict(tokens=Tokens(full=torch.tensor(ids), batch_size=()), batch_size=())
            for ids in IDS
        ]
    return shaped(rows, shape)


def expected_ids(mode: str, tokenizer: Any) -> list[list[int]]:
    if mode == "tokens":
        return IDS
    texts = TEXTS
    if mode == "history":
        texts = [tokenizer.apply_chat_template(messages(i), tokenize=False) for i in range(6)]
    return tokenizer(texts)["input_ids"]


def check_scores(scores: torch.Tensor, ids: list[int], model: Any) -> None:
    """Nothing precedes the first token; the others are as a Hugging Face forward has them."""
    assert scores.dtype == torch.float32
    assert scores.isnan().tolist() == [True] + [False] * (len(ids) - 1)
    expected = torch.tensor(hf_log_probs(model, ids[:1], ids[1:]))
    torch.testing.assert_close(scores[1:], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_layout_and_shape(
    service: AsyncSGLang,
    tokenizer: Any,
    model: Any,
    mode: str,
    shape: tuple[int, ...],
    pad_output: bool,
) -> None:
    policy = SGLangWrapper(
        service, input_mode=mode, generate=False, pad_output=pad_output, inplace=False
    )
    out = policy(make_input(mode, shape))
    assert out.batch_size == torch.Size(shape)
    keys = {"tokens", "masks", "log_probs"}
    keys |= {"history": {"history", "text"}, "text": {"text"}, "tokens": set()}[mode]
    assert set(out.keys()) == keys == set(policy.out_keys)
    ids = expected_ids(mode, tokenizer)
    longest = max(map(len, ids[: len(rows_of(out))]))
    for row, expected in zip(rows_of(out), ids, strict=False):
        tokens, masks, log_probs = row["tokens"], row["masks"], row["log_probs"]
        assert (tokens.padded, masks.padded, log_probs.padded) == (pad_output,) * 3
        attended = masks.all_attention_mask
        length = longest if pad_output else len(expected)
        assert attended.tolist() == [False] * (length - len(expected)) + [True] * len(expected)
        assert tokens.full[attended].tolist() == expected
        assert (tokens.full[~attended] == tokenizer.pad_token_id).all()
        assert (log_probs.full[~attended] == 0).all()
        check_scores(log_probs.full[attended], expected, model)
        if mode != "tokens":
            assert row["text"].full == tokenizer.decode(expected)
        assert (masks.all_assistant_mask is not None) == (mode == "history")


def test_history_comes_back_as_it_was(service: AsyncSGLang) -> None:
    out = SGLangWrapper(service, generate=False, inplace=False)(make_input("history"))
    for row, chat in zip(rows_of(out), CHATS, strict=True):
        history = row["history"].full
        assert list(zip(history.role, history.content, strict=True)) == chat


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        ({}, "<|im_end|>"),
        # The template marks the line break, too; or nothing at all.
        ({"{% endgeneration %}{{- '\\n' -}}": "{{- '\\n' -}}{% endgeneration %}"}, "<|im_end|>\n"),
        ({"{% generation %}": "", "{% endgeneration %}": ""}, "<|im_end|>"),
    ],
    ids=["marked", "marked otherwise", "unmarked"],
)
def test_what_the_assistant_wrote(
    service: AsyncSGLang, tokenizer: Any, change: dict[str, str], ending: str
) -> None:
    """What the template marks, else the assistant's messages and the token that ends each."""
    template = tokenizer.chat_template
    for old, new in change.items():
        assert old in template
        template = template.replace(old, new)
    policy = SGLangWrapper(service, generate=False, chat_template=template, inplace=False)
    for row, chat in zip(rows_of(policy(make_input("history"))), CHATS, strict=True):
        written = row["tokens"].full[row["masks"].all_assistant_mask]
        answers = [content for role, content in chat if role == "assistant"]
        assert tokenizer.decode(written) == "".join(answer + ending for answer in answers)


def split_further(ids: list[int], tokenizer: Any) -> list[int]:
    """Other ids of the same text: one token, letter by letter."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    at = max(
        i for i, one in enumerate(ids) if one not in special and len(tokenizer.decode(one)) > 1
    )
    pieces = [i for letter in tokenizer.decode([ids[at]]) for i in tokenizer(letter)["input_ids"]]
    assert len(pieces) > 1
    return [*ids[:at], *pieces, *ids[at + 1 :]]


@pytest.mark.parametrize("key", ["prompt", "full"])
def test_prefer_tokens(service: AsyncSGLang, model: Any, tokenizer: Any, key: str) -> None:
    """The chat's tokens that are there are scored; a prompt is no complete text."""
    td = make_input("history")
    own = SGLangWrapper(service, generate=False, inplace=False)(td)
    # The same text in other tokens than the tokenizer's: cut between two characters.
    others = [split_further(row["tokens"].full.tolist(), tokenizer) for row in rows_of(own)]
    tokens = [Tokens(**{key: torch.tensor(ids)}, batch_size=()) for ids in others]
    masks = [
        Masks(
            all_attention_mask=torch.ones(len(ids), dtype=torch.bool),
            all_assistant_mask=torch.arange(len(ids)) > 1,
            batch_size=(),
        )
        for ids in others
    ]
    td.set("tokens", lazy_stack(tokens)).set("masks", lazy_stack(masks))
    out = SGLangWrapper(service, generate=False, prefer_tokens=True, inplace=False)(td)
    for row, ids, mask in zip(rows_of(out), others, masks, strict=True):
        if key == "prompt":
            assert row["tokens"].full.tolist() != ids
            continue
        assert row["tokens"].full.tolist() == ids
        assert torch.equal(row["masks"].all_assistant_mask, mask.all_assistant_mask)
        check_scores(row["log_probs"].full, ids, model)


def rollout(
    service: AsyncSGLang, mode: str, pad_output: bool, tokenizer: Any, **kwargs: Any
) -> Any:
    """A policy, and what it sampled for prompts and limits of several lengths."""
    policy = SGLangWrapper(
        service,
        input_mode=mode,
        generate_kwargs={"max_new_tokens": 8, "ignore_eos": True},
        pad_output=pad_output,
        prefer_tokens=mode == "history",
        **kwargs,
    )
    prompts = lazy_stack(
        [
            TensorDict(
                tokens=Tokens(prompt=torch.tensor(ids), batch_size=()),
                sampling=TensorDict(max_new_tokens=torch.tensor(limit)),
            )
            for ids, limit in zip(IDS, [3, 8, 1, 5, 4, 2], strict=True)
        ]
    )
    if mode == "history":
        histories = History.from_chats([[m] for m in [{"role": "user", "content": "a"}] * 6])
        prompts.set("history", ChatHistory(prompt=histories, batch_size=6))
    out = policy(prompts)
    return policy, out.exclude("sampling")


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", ["tokens", "history"])
def test_a_policy_scores_what_it_sampled(
    service: AsyncSGLang, tokenizer: Any, mode: str, pad_output: bool
) -> None:
    """The same log-probs, in the same places, for the tokens that are marked as sampled."""
    policy, sampled = rollout(service, mode, pad_output, tokenizer, inplace=False)
    scorer = policy.get_new_version(generate=False, log_probs_key="again")
    scored = scorer(sampled)
    for before, after in zip(rows_of(sampled), rows_of(scored), strict=True):
        mask = before["masks"].all_assistant_mask
        if mode == "tokens" or not pad_output:
            assert torch.equal(after["tokens"].full, before["tokens"].full)
            assert torch.equal(after["masks"].all_assistant_mask, mask)
        again = after["again"].full[after["masks"].all_assistant_mask]
        reported = before["log_probs"].full[mask]
        torch.testing.assert_close(again, reported, atol=0.02, rtol=0)


def test_get_new_version_leaves_out_what_scoring_can_not_have(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={"temperature": 0.7, "regex": "a+"},
        num_samples=3,
        return_log_probs=False,
        processor=disallowed_tokens([5]),
        extras=["cached_tokens"],
        inplace=False,
    )
    scorer = policy.get_new_version(generate=False)
    assert not scorer.generate
    assert scorer.input_key == ("tokens", "full")
    assert set(scorer(make_input("tokens")).keys()) == {"tokens", "masks", "log_probs"}


def test_an_input_key_is_kept_while_it_means_the_same(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="text", input_key=("my", "question"))
    for kwargs, key in [
        ({"pad_output": True}, ("my", "question")),
        ({"input_mode": "text", "generate": True}, ("my", "question")),
        ({"generate": False}, ("text", "full")),
        ({"input_mode": "tokens"}, ("tokens", "prompt")),
        ({"input_mode": "tokens", "input_key": "ids"}, "ids"),
        ({"input_key": None}, ("text", "prompt")),
    ]:
        assert policy.get_new_version(**kwargs).input_key == key


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")  # TorchRL's
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", [*MODES, "rollout"])
def test_as_transformers_wrapper_does(
    service: AsyncSGLang, tokenizer: Any, model: Any, mode: str, pad_output: bool
) -> None:
    """Whatever TorchRL's own wrapper fills, ours fills alike, its 0 for the first token aside."""
    input_mode = "tokens" if mode == "rollout" else mode
    kwargs: dict[str, Any] = {
        "input_mode": input_mode,
        "generate": False,
        "pad_output": pad_output,
        "inplace": False,
    }
    theirs = TransformersWrapper(
        model,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template if mode == "history" else None,
        **kwargs,
    )
    if mode == "rollout":
        given = rollout(service, input_mode, pad_output, tokenizer)[1]
    else:
        given = make_input(mode)
    with set_list_to_stack(True), torch.no_grad():
        expected = theirs(given.copy())
    got = SGLangWrapper(service, **kwargs)(given.copy())
    compared = set()
    for mine, his in zip(rows_of(got), rows_of(expected), strict=True):
        for key in his.keys(True, True):
            value, own = his.get(key), mine.get(key)
            if value is None:
                continue
            compared.add(key)
            if key == ("log_probs", "full"):
                assert own.shape == value.shape
                assert ((own.nan_to_num(0.0) - value.float()).abs() < 0.1).all()  # a bf16 head
            elif isinstance(value, torch.Tensor):
                assert own.dtype == value.dtype, key
                assert torch.equal(own, value), key
            else:
                assert type(own) is type(value), key
    assert len(compared) >= (4 if mode in ("history", "rollout") else 3)


def test_padded_tokens_stay_where_they_are(service: AsyncSGLang, tokenizer: Any) -> None:
    """A prompt padded on the left and a response padded on the right keep both."""
    pad = tokenizer.pad_token_id
    full = torch.tensor([[pad, pad, 50, 60, 61, pad], [51, 52, 53, 54, pad, pad]])
    td = TensorDict(
        tokens=Tokens(full=full, batch_size=2),
        masks=Masks(
            all_attention_mask=full != pad,
            all_assistant_mask=(full == 60) | (full == 54),
            batch_size=2,
        ),
        batch_size=2,
    )
    for given in (td, td.exclude("masks")):
        out = SGLangWrapper(
            service, input_mode="tokens", generate=False, pad_output=True, inplace=False
        )(given.copy())
        assert torch.equal(out["tokens"].full, full)
        assert torch.equal(out["masks"].all_attention_mask, full != pad)
        assert (out["log_probs"].full[full == pad] == 0).all()
        assert (out["log_probs"].full[(full == 60) | (full == 54)] < 0).all()
        if "masks" in given:
            assert torch.equal(out["masks"].all_assistant_mask, given["masks"].all_assistant_mask)
        else:
            assert out["masks"].all_assistant_mask is None


def test_an_assistant_mask_of_other_tokens_is_not_kept(service: AsyncSGLang) -> None:
    """Text that is tokenised again need not have the tokens that a mask was made for."""
    td = make_input("text")
    td.set("tokens", lazy_stack([Tokens(full=torch.tensor(ids), batch_size=()) for ids in IDS]))
    masks = [
        Masks(all_assistant_mask=torch.ones(len(ids), dtype=torch.bool), batch_size=())
        for ids in IDS
    ]
    td.set("masks", lazy_stack(masks))
    out = SGLangWrapper(service, input_mode="text", generate=False, inplace=False)(td)
    assert out[0]["masks"].all_assistant_mask is None


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"do_sample": False}, "temperature"),
        ({"top_p": 0.9, "top_k": 5, "min_p": 0.1}, "top_p, top_k, min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"regex": "a+"}, "regex"),
    ],
    ids=str,
)
def test_refused_options(service: AsyncSGLang, options: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"temperature 1 and can't follow {names}:"):
        SGLangWrapper(service, input_mode="tokens", generate=False, generate_kwargs=options)
    policy = SGLangWrapper(service, input_mode="tokens", generate=False)
    with pytest.raises(UnsupportedOptionError, match=f"can't follow {names}:"):
        policy(make_input("tokens"), **options)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"processor": disallowed_tokens([5])}, UnsupportedOptionError, "processor"),
        ({"extras": ["latency"]}, UnsupportedOptionError, "extras"),
        ({"num_samples": 2}, ConfigError, "samples nothing"),
        ({"generate_kwargs": {"n": 2}}, ConfigError, "samples nothing"),
        ({"return_log_probs": False}, ConfigError, "can't be False"),
    ],
    ids=str,
)
def test_refused_arguments(
    service: AsyncSGLang, kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        SGLangWrapper(service, input_mode="tokens", generate=False, **kwargs)


def test_a_processor_for_one_call_is_refused(service: AsyncSGLang) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate=False)
    with pytest.raises(UnsupportedOptionError, match="processor"):
        policy(make_input("tokens"), processor=disallowed_tokens([5]))


@pytest.mark.parametrize(
    "option",
    [{"temperature": torch.tensor(0.5)}, {"action_mask": torch.ones(512, dtype=torch.bool)}],
    ids=["temperature", "action_mask"],
)
def test_a_row_that_asks_for_another_distribution_is_refused(
    service: AsyncSGLang, option: dict[str, torch.Tensor]
) -> None:
    td = make_input("tokens")
    td[4].set("sampling", TensorDict(option))
    with pytest.raises(UnsupportedOptionError, match="can't follow") as caught:
        SGLangWrapper(service, input_mode="tokens", generate=False)(td)
    assert "row 4" in caught.value.__notes__[0]
    policy = SGLangWrapper(service, input_mode="tokens", generate=False, sampling_key=None)
    assert "log_probs" in policy(td)


def test_an_adapter_of_a_row_is_scored_with(service: AsyncSGLang) -> None:
    """This server has none, and says so, instead of scoring without it."""
    td = make_input("tokens")
    td[2].set("sampling", TensorDict({}).set_non_tensor("lora", "mine"))
    with pytest.raises(UnsupportedOptionError, match="enable_lora"):
        SGLangWrapper(service, input_mode="tokens", generate=False)(td)


def test_limits_of_generation_mean_nothing_here(service: AsyncSGLang) -> None:
    """TorchRL's own wrappers are given ``max_new_tokens`` for both."""
    policy = SGLangWrapper(
        service, input_mode="tokens", generate=False, generate_kwargs={"max_new_tokens": 1}
    )
    out = policy(make_input("tokens"), stop="a", max_new_tokens=5)
    assert [len(row["log_probs"].full) for row in rows_of(out)] == [len(ids) for ids in IDS]


def test_no_token_is_generated(service: AsyncSGLang, model: Any) -> None:
    (completion,) = service.complete([GenerateRequest(input_ids=(5, 6, 7), scoring=True)])
    assert completion.output_ids == completion.log_probs == []
    check_scores(torch.tensor(completion.input_log_probs), [5, 6, 7], model)


def test_the_last_id_of_the_vocabulary(service: AsyncSGLang, model: Any) -> None:
    """SGLang scores it, and says that it was 0. It is the EOS of some models, such as GPT-2."""
    ids = [5, 511, 6, 511, 511]
    td = TensorDict(tokens=Tokens(full=torch.tensor([ids]), batch_size=1), batch_size=1)
    out = SGLangWrapper(service, input_mode="tokens", generate=False)(td)
    assert out["tokens"].full.tolist() == [ids]
    check_scores(out["log_probs"].full[0], ids, model)


def test_many_at_once_while_others_generate(service: AsyncSGLang, model: Any) -> None:
    """A busy server answers some with a log-prob of a token that it did not generate."""
    prompts = [[3 + i, 4 + i, 5 + i] for i in range(100)]
    generating = [
        GenerateRequest(input_ids=ids, sampling=SamplingParams(max_new_tokens=20, ignore_eos=True))
        for ids in prompts
    ]
    for _ in range(3):
        scoring = [GenerateRequest(input_ids=ids * 4, scoring=True) for ids in prompts]
        mixed = [request for pair in zip(generating, scoring, strict=True) for request in pair]
        for request, completion in zip(mixed, service.complete(mixed), strict=True):
            if request.scoring:
                assert completion.output_ids == completion.log_probs == []
                assert len(completion.input_log_probs) == len(request.input_ids)


def test_log_prob(service: AsyncSGLang, model: Any) -> None:
    policy = SGLangWrapper(service, input_mode="tokens", generate=False)
    for scores, ids in zip(policy.log_prob(make_input("tokens"), as_list=True), IDS, strict=True):
        check_scores(scores, ids, model)
    with pytest.raises(RuntimeError, match="generate=True"):
        SGLangWrapper(service, input_mode="tokens").log_prob(make_input("tokens"))


@pytest.mark.parametrize("inplace", [True, False, "empty"])
def test_inplace(service: AsyncSGLang, inplace: Any) -> None:
    policy = SGLangWrapper(service, input_mode="text", generate=False, inplace=inplace)
    td = make_input("text").set("other", torch.arange(6))
    out = policy(td)
    assert (out is td) == (inplace is True)
    assert ("other" in out) == (inplace is True)
    assert set(policy.out_keys) <= set(out.keys())


def test_an_empty_text(service: AsyncSGLang) -> None:
    td = TensorDict(text=Text(full=["a", ""], batch_size=2), batch_size=2)
    with pytest.raises(EmptyPromptError, match="prompt 1"):
        SGLangWrapper(service, input_mode="text", generate=False)(td)
