"""A server without a tokenizer (``skip_tokenizer_init``): ours does its work where it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import CPU_SERVER_ARGS, hf_log_probs
from tensordict import NonTensorStack, TensorDict, lazy_stack
from test_policy import check_row, make_input, ragged_ids, rows_of
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from torchrl_sglang import AsyncSGLang, Completion, GenerateRequest, SGLangWrapper, Timeouts
from torchrl_sglang.completions import VersionSpan
from torchrl_sglang.errors import RequestRefusedError, UnsupportedOptionError
from torchrl_sglang.rollout.own_stops import cut_at_stops

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

    monkeypatch.setattr(bare, "_data_plane", fail)


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


@pytest.mark.parametrize("options", NEEDY, ids=lambda options: next(iter(options)))
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
def test_the_server_refuses_the_same(
    bare: AsyncSGLang, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """What it does by itself: were it to serve one of these, we should not refuse it."""
    # A worker, since the router leaves some of these out.
    with AsyncSGLang.connect(bare.workers[0].url, api_key=bare.api_key) as direct:
        monkeypatch.setattr(type(direct), "check", lambda *_: None)
        with pytest.raises(RequestRefusedError, match=r"skip_tokenizer_init|Grammar"):
            direct.generate([50, 60], options)


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


def test_a_cut_completion(tokenizer: Any) -> None:
    """What belongs to a token goes with it, and characters of several tokens stay whole."""
    ids = tokenizer("ab é cd")["input_ids"]
    count = len(ids)
    whole = Completion(
        rid="a",
        output_ids=ids,
        log_probs=[-float(i) for i in range(count)],
        text=None,
        finish_type="abort",
        matched_stop=None,
        prompt_tokens=3,
        cached_tokens=0,
        version_spans=(
            VersionSpan(version="1", start=0, end=2),
            VersionSpan(version="2", start=2, end=count - 1),
            VersionSpan(version="3", start=count - 1, end=count),
        ),
        top_log_probs=[[(-1.0, i)] for i in range(count)],
        sampling_mask=[[i] for i in ids],
        sampling_log_probs=[-0.5] * count,
        hidden_states=[[[0.0], [0.0], [0.0]], *([1.0] for _ in range(count - 1))],
    )
    request = GenerateRequest(input_ids=(5, 6, 7))

    def cut(*stops: str) -> Completion:
        return cut_at_stops([whole], [request], [stops], tokenizer)[0]

    for stop in (tokenizer.decode(ids[:1]), "b", "é", "b é", "cd", "d"):
        length = next(k for k in range(1, count + 1) if stop in tokenizer.decode(ids[:k]))
        one = cut("zzz", stop)
        assert (one.output_ids, one.finish_type, one.matched_stop) == (ids[:length], "stop", stop)
        for name in ("log_probs", "top_log_probs", "sampling_mask", "sampling_log_probs"):
            assert getattr(one, name) == getattr(whole, name)[:length]
        assert one.hidden_states == (whole.hidden_states or [])[:length]
        spans = one.version_spans
        last = whole.version_spans[len(spans) - 1]
        assert spans == (*whole.version_spans[: len(spans) - 1], replace(last, end=length))
        assert last.start < length <= last.end
    assert cut("d", "cd").matched_stop == "d"  # the first in the list, as SGLang says it
    assert cut("zzz") is whole
    assert cut() is whole
