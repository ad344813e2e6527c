"""A server without a tokenizer (``skip_tokenizer_init``): ours does its work where it can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from helpers.prompts import EIGHT_PROMPTS
from helpers.rows import check_row, make_input, ragged_ids, rows_of
from helpers.servers import CPU_SERVER_ARGS, hf_log_probs, told
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper, Timeouts
from torchrl_sglang.errors import RequestRefusedError, UnsupportedOptionError
from torchrl_sglang.generate.request import Returns, to_requests
from torchrl_sglang.generate.room import BEYOND_LONGEST_INPUT
from torchrl_sglang.servers.members import Servers

pytestmark = pytest.mark.slow

EOS = 2

SAMPLING = {"max_new_tokens": 5, "ignore_eos": True}

STEADY = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}

# What needs a tokenizer; the server says so too, in its own words.
NEEDY: list[dict[str, Any]] = [
    {"stop": ["a"]},
    {"stop_regex": ["a"]},
    {"min_new_tokens": 2},
    {"regex": "[0-9]+"},
    {"json_schema": {"type": "object"}},
    {"ebnf": 'root ::= "a"'},
    {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}},
]


@pytest.fixture(scope="module")
def bare(model_path: Path, timeouts: Timeouts) -> Iterator[AsyncSGLang]:
    """A service on a server that was started without its tokenizer."""
    with AsyncSGLang.from_pretrained(
        str(model_path),
        device="cpu",
        timeouts=timeouts,
        skip_tokenizer_init=True,
        **CPU_SERVER_ARGS,
    ) as service:
        yield service


@pytest.fixture
def nothing_sent(bare: AsyncSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that sends a request."""

    def fail(*args: Any) -> Any:
        raise AssertionError("something was sent")

    monkeypatch.setattr(bare._local.generator, "data_plane", fail)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_every_mode(
    bare: AsyncSGLang, tokenizer: Any, model: Any, mode: str, pad_output: bool
) -> None:
    assert bare.info.features.tokenizer is False
    policy = SGLangWrapper(
        bare, input_mode=mode, generate_kwargs=SAMPLING, pad_output=pad_output, inplace=False
    )
    out = policy(make_input(mode, (2, 3), tokenizer))
    for row in rows_of(out):
        check_row(row, tokenizer, model, mode, pad_output)


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_num_samples(bare: AsyncSGLang, tokenizer: Any, model: Any, mode: str) -> None:
    policy = SGLangWrapper(
        bare, input_mode=mode, generate_kwargs=SAMPLING, num_samples=3, inplace=False
    )
    out = policy(make_input(mode, (6,), tokenizer))
    assert out.batch_size == (6, 3)
    for row in rows_of(out):
        check_row(row, tokenizer, model, mode, False)
    if mode == "tokens":
        for samples, ids in zip(out.unbind(0), ragged_ids(tokenizer), strict=True):
            assert all(row["tokens"].prompt.tolist() == ids for row in samples.unbind(0))


def test_scoring(bare: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    policy = SGLangWrapper(bare, input_mode="text", generate=False, input_key="text")
    texts = ["the quick brown fox", "A policy acts"]
    scores = policy(TensorDict(text=NonTensorStack(*texts), batch_size=2), tensordict_out=None)
    for row, text in zip(rows_of(scores), texts, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = torch.tensor(hf_log_probs(model, ids[:1], ids[1:]))
        torch.testing.assert_close(row["log_probs"].full[1:], expected, atol=0.02, rtol=0)


def test_ends_at_eos_and_at_stop_token_ids(bare: AsyncSGLang) -> None:
    for options, stop in (({"logit_bias": {EOS: 100.0}}, EOS), ({"stop_token_ids": [7]}, 7)):
        bias = {"logit_bias": {stop: 100.0}}
        one = bare.generate([50, 60], {"max_new_tokens": 4, **bias, **options})
        assert (one.output_ids, one.finish_type, one.matched_stop) == ([stop], "stop", stop)
        assert one.text is None


@pytest.mark.parametrize(
    "options",
    [options for options in NEEDY if "min_new_tokens" not in options],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.usefixtures("nothing_sent")
def test_what_needs_a_tokenizer_is_refused_by_name(
    bare: AsyncSGLang, options: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedOptionError, match=rf"\b{next(iter(options))}\b.*skip_tokenizer"):
        bare.generate([50, 60], options)


@pytest.mark.usefixtures("nothing_sent")
def test_text_is_refused(bare: AsyncSGLang) -> None:
    with pytest.raises(UnsupportedOptionError, match="text needs the server's tokenizer"):
        bare.generate("the quick")


@pytest.mark.parametrize("options", NEEDY, ids=lambda options: next(iter(options)))
def test_the_server_refuses_the_same(bare: AsyncSGLang, options: dict[str, Any]) -> None:
    """What it does by itself: were it to serve one of these, we should not do otherwise."""
    body = GenerateRequest(input_ids=(50, 60), sampling=SamplingParams(**options)).body()
    # A worker, since the router leaves some of these out.
    with pytest.raises(RequestRefusedError, match=r"skip_tokenizer_init|Grammar"):
        told(bare.workers[0], "/generate", body)


def test_openai_clients_get_no_address(bare: AsyncSGLang) -> None:
    """The server itself answers a chat with 500: 'NoneType' object has no attribute ..."""
    with pytest.raises(UnsupportedOptionError, match=r"skip_tokenizer_init.*service\.generate"):
        bare.openai_base_url  # noqa: B018


# A fewest number of tokens, in two requests

ENDS = {"logit_bias": {EOS: 8.0}}  # so that most rows would end at once


@torch.no_grad()
def biased_log_probs(
    model: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    ruled_out: Sequence[int],
    fewest: int,
) -> list[float]:
    """Of a Hugging Face forward, with `ENDS`, and ids that the first tokens can't be."""
    ids = torch.tensor([[*prompt, *response]])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    logits = hidden.float() @ model.lm_head.weight.float().T
    logits[:, EOS] += ENDS["logit_bias"][EOS]
    for token in ruled_out:
        logits[:fewest, token] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).tolist()


@pytest.mark.parametrize("with_tokenizer", [False, True], ids=["bare", "with a tokenizer"])
def test_min_new_tokens(
    bare: AsyncSGLang, service: AsyncSGLang, model: Any, with_tokenizer: bool
) -> None:
    """Lengths, ends and log-probs are those of a server with a tokenizer."""
    fewest, most, stop = 5, 9, 7
    sampling = {"min_new_tokens": fewest, "max_new_tokens": most, "stop_token_ids": [stop], **ENDS}
    on = service if with_tokenizer else bare
    requests, _ = to_requests(EIGHT_PROMPTS, sampling, {"n": 2})
    completions = on.complete(requests)
    reasons = set()
    for prompt, one in zip([p for p in EIGHT_PROMPTS for _ in range(2)], completions, strict=True):
        assert fewest <= len(one.output_ids) <= most
        assert not {EOS, stop} & set(one.output_ids[:fewest])
        ended = one.output_ids[-1] in (EOS, stop)
        assert one.finish_type == ("stop" if ended else "length")
        assert one.matched_stop == (one.output_ids[-1] if ended else None)
        expected = biased_log_probs(model, prompt, one.output_ids, (EOS, stop), fewest)
        assert one.log_probs == pytest.approx(expected, abs=0.02)
        assert one.prompt_tokens == len(prompt)
        (span,) = {span.version for span in one.version_spans}
        assert sum(s.end - s.start for s in one.version_spans) == len(one.output_ids), span
        reasons.add(one.finish_type)
    assert "stop" in reasons
    assert any(len(one.output_ids) == fewest + 1 for one in completions)


def test_min_new_tokens_brings_all_that_was_asked_for(bare: AsyncSGLang) -> None:
    sampling = SamplingParams(
        min_new_tokens=3, max_new_tokens=6, ignore_eos=True, top_k=50, temperature=2.0
    )
    returns = Returns(input_log_probs=True, top_log_probs=2, sampling_mask=True)
    request = GenerateRequest(input_ids=(5, 6, 7), sampling=sampling, returns=returns)
    (one,) = bare.complete([request])
    assert one.rid == request.rid
    assert len(one.output_ids) == len(one.top_log_probs) == len(one.sampling_mask) == 6
    assert len(one.input_log_probs) == 3


def test_min_new_tokens_in_a_policy(bare: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    """Also of a row alone, beside stop strings, and where it is all there may be."""
    td = make_input("tokens", (6,), tokenizer)
    td["sampling"] = lazy_stack(
        [TensorDict(min_new_tokens=torch.tensor(4)) if i else TensorDict() for i in range(6)]
    )
    policy = SGLangWrapper(
        bare, input_mode="tokens", inplace=False, generate_kwargs={"max_new_tokens": 4, **ENDS}
    )
    lengths = [len(row["tokens"].response) for row in rows_of(policy(td, stop="never there"))]
    assert lengths[1:] == [4] * 5


def test_min_new_tokens_up_to_the_end_of_the_context(bare: AsyncSGLang) -> None:
    assert bare.max_input_len is not None
    room = 6  # and five are left to a prompt that SGLang does not take any more
    prompt = [5] * (bare.max_input_len + BEYOND_LONGEST_INPUT - room)
    one = bare.generate(prompt, {"min_new_tokens": 2, "max_new_tokens": 64, **ENDS})
    assert (len(one.output_ids), one.finish_type) == (2, "length")


@pytest.mark.usefixtures("nothing_sent")
def test_where_min_new_tokens_stays_refused(
    bare: AsyncSGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = {"min_new_tokens": 2}
    for option in ({"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}):
        with pytest.raises(UnsupportedOptionError, match=f"min_new_tokens=2.*{next(iter(option))}"):
            bare.generate([[5, 6]], {**fewest, **option})
    with bare.open_session() as session:
        request = session.request([5, 6], sampling=SamplingParams.from_kwargs(fewest))
        with pytest.raises(UnsupportedOptionError, match=r"min_new_tokens=2.*session"):
            bare.complete([request])
    info = bare.info
    unknown = replace(info, features=replace(info.features, eos_ids=None))
    changed = replace(bare.cluster, infos=(unknown,))
    monkeypatch.setattr(Servers, "cluster", property(lambda self: changed))
    with pytest.raises(UnsupportedOptionError, match=r"min_new_tokens=2.*config.json"):
        bare.generate([[5, 6]], fewest)


# Stop strings, which the wrapper matches itself.


def one_text(text: str) -> TensorDict:
    return TensorDict(text=TensorDict(prompt=NonTensorStack(text)), batch_size=1)


def greedy(bare: AsyncSGLang, mode: str, td: Any, **kwargs: Any) -> list[Any]:
    policy = SGLangWrapper(bare, input_mode=mode, generate_kwargs=STEADY, inplace=False)
    return rows_of(policy(td, **kwargs))


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_stop_strings(bare: AsyncSGLang, tokenizer: Any, mode: str) -> None:
    """The tokens up to the one that completes the stop, of each row by itself."""
    td = make_input(mode, (6,), tokenizer)
    whole = greedy(bare, mode, td)
    texts = [tokenizer.decode(row["tokens"].response) for row in whole]
    stops = [texts[0][3:6], texts[3][7:10]]
    rows = greedy(bare, mode, td, stop=["never there", *stops])
    cut_rows = 0
    for row, full in zip(rows, whole, strict=True):
        ids = full["tokens"].response.tolist()
        said = [tokenizer.decode(ids[:k]) for k in range(1, 25)]
        length = next((k for k in range(1, 25) if any(s in said[k - 1] for s in stops)), 24)
        found = any(stop in said[length - 1] for stop in stops)
        cut_rows += found
        assert row["tokens"].response.tolist() == ids[:length]
        torch.testing.assert_close(
            row["log_probs"].response, full["log_probs"].response[:length], atol=0.01, rtol=0
        )
        assert row["rollout", "finish_reason"] == ("stop" if found else "length")
        assert len(row["rollout", "policy_version"]) == len(row["tokens"].full)
        assert row["masks"].all_assistant_mask.sum() == length
        assert row["text"].response == said[length - 1]
        if mode == "history":
            stop = next((s for s in stops if s in said[length - 1]), None)
            content = said[length - 1].rpartition(stop)[0] if stop else said[length - 1]
            assert row["history"].response.content == [content]
    assert cut_rows >= 2
    assert min(len(row["tokens"].response) for row in rows) < 24


def test_stop_strings_of_a_row_and_of_samples(bare: AsyncSGLang, tokenizer: Any) -> None:
    whole = greedy(bare, "text", one_text("hello"))[0]
    ids = whole["tokens"].response.tolist()
    stop = tokenizer.decode(ids[:9])[-2:]
    length = next(k for k in range(1, 25) if stop in tokenizer.decode(ids[:k]))
    policy = SGLangWrapper(
        bare, input_mode="text", generate_kwargs=STEADY, num_samples=2, inplace=False
    )
    td = lazy_stack([one_text("hello")[0], one_text("hello")[0]])
    td["sampling"] = lazy_stack([TensorDict(stop=NonTensorStack(stop)), TensorDict()])
    out = policy(td)
    lengths = [[len(row["tokens"].response) for row in rows.unbind(0)] for rows in out.unbind(0)]
    assert lengths == [[length, length], [24, 24]]


def test_a_turn_goes_on_from_a_stop_string(bare: AsyncSGLang, tokenizer: Any) -> None:
    """The next prompt begins with the tokens that were kept."""
    policy = SGLangWrapper(bare, generate_kwargs=STEADY, inplace=False)
    chat = History.from_chats([[{"role": "user", "content": "hello"}]])
    td = TensorDict(history=ChatHistory(prompt=chat, batch_size=1), batch_size=1)
    stop = tokenizer.decode(policy(td)[0]["tokens"].response)[4:6]
    first = policy(td, stop=stop)[0]
    assert len(first["tokens"].response) < 24
    more = first["history"].full.append(History(role="user", content="and?", batch_size=()))
    td = TensorDict(history=ChatHistory(prompt=more[None], batch_size=1), batch_size=1)
    prompt = policy(td)[0]["tokens"].prompt.tolist()
    assert prompt[: len(first["tokens"].full)] == first["tokens"].full.tolist()


@pytest.mark.usefixtures("nothing_sent")
def test_where_stop_strings_stay_refused(bare: AsyncSGLang, tokenizer: Any) -> None:
    td = make_input("tokens", (6,), tokenizer)
    with bare.open_session() as session:
        td["sampling"] = lazy_stack(
            [TensorDict(session=session.session_id) if i == 0 else TensorDict() for i in range(6)]
        )
        policy = SGLangWrapper(bare, input_mode="tokens", inplace=False)
        with pytest.raises(UnsupportedOptionError, match="stop needs"):
            policy(td, stop="a")
