"""`num_samples`: several completions per prompt, in a batch dimension of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, set_list_to_stack
from torchrl.modules.llm.policies import TransformersWrapper

from helpers.prompts import QUESTIONS
from helpers.rows import make_input
from helpers.servers import hf_log_probs, needs
from torchrl_sglang import (
    AsyncSGLang,
    Completion,
    GenerateRequest,
    SamplingParams,
    SGLangWrapper,
)
from torchrl_sglang.errors import ConfigError, InputError
from torchrl_sglang.generate.request import Returns

SAMPLING = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 2.0}

SHAPES = [(), (6,), (2, 3)]

MODES = ["history", "text", "tokens"]

N = 3


def expected_prompts(mode: str, tokenizer: Any) -> list[list[int]]:
    if mode != "history":
        return tokenizer(QUESTIONS)["input_ids"]
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts)["input_ids"]


def groups_of(out: Any) -> list[list[Any]]:
    """For each prompt its samples."""
    rows = list(out.reshape(-1).unbind(0)) if out.ndim > 1 else list(out.unbind(0))
    return [rows[start : start + N] for start in range(0, len(rows), N)]


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
        service,
        input_mode=mode,
        generate_kwargs=SAMPLING,
        pad_output=pad_output,
        num_samples=N,
        extras=["cached_tokens"],
    )
    td = make_input(mode, shape, tokenizer)
    out = policy(td)
    assert out.batch_size == torch.Size((*shape, N))
    assert set(out.keys()) == set(policy.out_keys)
    assert set(td.keys()) == {mode}  # the input is left alone
    groups, prompts = groups_of(out), expected_prompts(mode, tokenizer)
    assert len(groups) == (6 if shape else 1)
    for group, prompt, question in zip(groups, prompts, QUESTIONS, strict=False):
        responses = set()
        for row in group:
            attended, sampled = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
            full = row["tokens"].full
            assert full[attended & ~sampled].tolist() == prompt
            assert row["rollout"]["cached_tokens"] == len(prompt) - 1  # computed once, for all
            response = full[sampled].tolist()
            assert response == row["tokens"].response.tolist()
            responses.add(tuple(response))
            expected = torch.tensor(hf_log_probs(model, prompt, response, temperature=2.0))
            torch.testing.assert_close(row["log_probs"].response, expected, atol=0.02, rtol=0)
            assert row["text"].response == tokenizer.decode(response)
            if mode == "history":
                history = row["history"].full
                assert history.role == ["user", "assistant"]
                content = row["text"].response.removesuffix(tokenizer.eos_token)
                assert history.content == [question, content]
        assert len(responses) == N  # of 512 ** 6 at temperature 2


@pytest.mark.parametrize(
    ("kwargs", "shape"),
    [
        ({"num_samples": 1}, (2, 1)),
        ({"num_samples": 4}, (2, 4)),
        ({"generate_kwargs": {"n": 4}}, (2, 4)),
        ({"generate_kwargs": {"num_return_sequences": 4}}, (2, 4)),
        ({"generate_kwargs": {"n": 4}, "num_samples": 4}, (2, 4)),
        ({"generate_kwargs": {"n": 1}}, (2,)),
        ({"generate_kwargs": {"n": 1}, "num_samples": 4}, (2, 4)),
        ({}, (2,)),
    ],
    ids=str,
)
def test_ways_to_ask(
    service: AsyncSGLang, tokenizer: Any, kwargs: dict[str, Any], shape: tuple[int, ...]
) -> None:
    options = {"max_new_tokens": 2, **kwargs.pop("generate_kwargs", {})}
    policy = SGLangWrapper(service, input_mode="text", generate_kwargs=options, **kwargs)
    assert policy.num_samples == (shape[1] if len(shape) > 1 else None)
    out = policy(make_input("text", (6,), tokenizer)[:2])
    assert out.batch_size == torch.Size(shape)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"generate_kwargs": {"n": 2}, "num_samples": 3}, "differs"),
        ({"num_samples": 3, "inplace": True}, "inplace=False"),
        ({"num_samples": 3, "inplace": "empty"}, "inplace=False"),
        ({"generate_kwargs": {"n": 3}, "inplace": True}, "inplace=False"),
        ({"num_samples": 0}, "n=0"),
        ({"num_samples": 1.5}, "n=1.5"),
    ],
    ids=str,
)
def test_contradictions_raise_at_construction(
    service: AsyncSGLang, kwargs: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        SGLangWrapper(service, input_mode="text", **kwargs)


def test_the_shape_is_the_same_for_every_call(service: AsyncSGLang, tokenizer: Any) -> None:
    td = make_input("text", (6,), tokenizer)
    for policy in (
        SGLangWrapper(service, input_mode="text"),
        SGLangWrapper(service, input_mode="text", num_samples=2),
    ):
        with pytest.raises(InputError, match="num_samples=3"):
            policy(td, n=3, max_new_tokens=2)


def test_tensordict_out(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, input_mode="text", generate_kwargs=SAMPLING, num_samples=N)
    td = make_input("text", (2, 3), tokenizer)
    target = TensorDict(kept=torch.zeros(2, 3, N), batch_size=(2, 3, N))
    out = policy(td, tensordict_out=target)
    assert out is target
    assert set(out.keys()) == {"kept", *policy.out_keys}
    assert out["tokens"].batch_size == (2, 3, N)


def test_get_new_version(service: AsyncSGLang, tokenizer: Any) -> None:
    policy = SGLangWrapper(service, input_mode="text", generate_kwargs=SAMPLING, num_samples=2)
    td = make_input("text", (6,), tokenizer)
    assert policy.get_new_version(num_samples=3)(td).batch_size == (6, 3)
    assert policy.get_new_version(num_samples=None)(td.copy()).batch_size == (6,)
    assert policy.get_new_version(pad_output=True)(td).batch_size == (6, 2)


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")  # TorchRL's
@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_structure_of_transformers_wrapper(
    service: AsyncSGLang, tokenizer: Any, model: Any, mode: str, pad_output: bool
) -> None:
    """Whatever TorchRL's own wrapper fills, ours fills with the same type, dtype and shape."""
    kwargs: dict[str, Any] = {
        "input_mode": mode,
        "num_samples": N,
        "pad_output": pad_output,
        "inplace": False,
    }
    model.generation_config.min_new_tokens = 6  # which that wrapper does not pass on
    theirs = TransformersWrapper(
        model,
        tokenizer=tokenizer,
        generate_kwargs={"max_new_tokens": 6, "do_sample": True},
        chat_template=tokenizer.chat_template if mode == "history" else None,
        **kwargs,
    )
    ours = SGLangWrapper(service, generate_kwargs=SAMPLING, **kwargs)
    with set_list_to_stack(True):
        expected = theirs(make_input(mode, (6,), tokenizer))
    got = ours(make_input(mode, (6,), tokenizer))
    assert got.batch_size == expected.batch_size == (6, N)
    compared = 0
    for index in [(0, 0), (2, 1), (5, 2)]:
        mine, his = got[index], expected[index]
        for key in his.keys(True, True):
            value = his.get(key)
            if value is None:
                continue
            own = mine.get(key)
            if isinstance(value, torch.Tensor):
                assert own.dtype == value.dtype, key
                assert own.shape == value.shape, key
                compared += 1
            else:
                assert type(own) is type(value), key
    assert compared >= 12


@pytest.mark.parametrize("mode", ["corrected", "reported"])
def test_with_truncation(service: AsyncSGLang, tokenizer: Any, model: Any, mode: str) -> None:
    """The server's own ``n`` fails beside a sampling mask, so each sample is a request then."""
    needs(service, "sampling_mask_tokens")
    policy = SGLangWrapper(
        service,
        input_mode="tokens",
        generate_kwargs={**SAMPLING, "top_k": 4},
        num_samples=N,
        log_probs_mode=mode,
        extras=["sampling_mask"],
    )
    out = policy(make_input("tokens", (6,), tokenizer))
    assert out.batch_size == (6, N)
    # Of four candidates one is often likely: the samples of one prompt may all come out alike.
    assert len({tuple(row["tokens"].full.tolist()) for g in groups_of(out) for row in g}) > 6
    for group, prompt in zip(groups_of(out), expected_prompts("tokens", tokenizer), strict=True):
        for row in group:
            response = row["tokens"].response
            assert row["tokens"].prompt.tolist() == prompt
            assert row["rollout"]["sampling_mask_offsets"].tolist() == list(range(0, 25, 4))
            kept = row["rollout"]["sampling_mask_ids"].view(6, 4)
            assert (kept == response[:, None]).any(-1).all()
            reported = torch.tensor(hf_log_probs(model, prompt, response.tolist(), 2.0))
            difference = row["log_probs"].response - reported
            if mode == "reported":
                assert difference.abs().max() < 0.02
            else:
                assert difference.min() > 0.5  # four of 512 tokens are left


def seeded(service: AsyncSGLang, requests: Sequence[GenerateRequest]) -> list[list[Completion]]:
    """What is sent to a server that samples deterministically, sent to this one.

    SGLang's deterministic mode does not run on a CPU (its kernels need Triton), so that the seeds
    make a difference is not seen here; that the server takes such a batch and tells its samples
    apart is.
    """
    generator = service._local.generator
    loop, data = generator.data_plane()
    return loop.run(data.generate_all(replace(generator._prepare(requests), seeded=True)))


def test_a_batch_of_seeded_samples(service: AsyncSGLang) -> None:
    needs(service, "sampling_mask_tokens")
    everything = Returns(input_log_probs=True, top_log_probs=2, sampling_mask=True)
    requests = [
        GenerateRequest(
            input_ids=tuple(range(5, 5 + length)),
            sampling=SamplingParams(max_new_tokens=4, temperature=2.0, top_k=50, n=n),
            returns=everything,
        )
        for length, n in [(3, 4), (7, 1), (5, 2)]
    ]
    groups = seeded(service, requests)
    assert [len(group) for group in groups] == [4, 1, 2]
    for request, group in zip(requests, groups, strict=True):
        n = request.num_samples
        assert [c.rid for c in group] == (request.sample_rids() if n > 1 else [request.rid])
        for completion in group:
            assert completion.prompt_tokens == len(request.input_ids)
            assert len(completion.input_log_probs) == len(request.input_ids)
            assert len(completion.sampling_mask) == len(completion.output_ids)
            assert len(completion.top_log_probs) == len(completion.output_ids)
