"""Whatever the mode, layout, shape, padding and company: a row's result is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens

from helpers.rows import rows_of
from helpers.servers import hf_log_probs
from torchrl_sglang import AsyncSGLang, SGLangWrapper

pytestmark = pytest.mark.slow

# One server for all examples; how long one takes depends on the machine.
few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


GREEDY = {"temperature": 0.0, "max_new_tokens": 6}

CLOSE = {"atol": 0.02, "rtol": 0.0, "equal_nan": True}


MODES = st.sampled_from(["history", "text", "tokens"])

SHAPES = st.sampled_from([(), (1,), (5,), (2, 3), (3, 1, 2)])

# Words that the tiny tokenizer knows, and some that it has to spell.
TEXTS = st.text(alphabet="abc de.?\n-é中😀", min_size=1, max_size=30)


@st.composite
def batches(draw: Any, *, shape: Any = None) -> tuple[str, tuple[int, ...], list[Any]]:
    """A mode, a batch shape and a prompt for each row: ids, text or a chat."""
    mode = draw(MODES)
    shape = draw(SHAPES) if shape is None else shape
    count = 1
    for size in shape:
        count *= size
    prompts = {
        # Ids of ordinary tokens, and specials (pad and EOS among them) inside.
        "tokens": st.tuples(
            st.integers(3, 300),
            st.lists(st.integers(0, 300), max_size=12),
            st.integers(3, 300),
        ).map(lambda parts: [parts[0], *parts[1], parts[2]]),
        "text": TEXTS,
        "history": st.lists(TEXTS, min_size=1, max_size=3),
    }[mode]
    return mode, shape, draw(st.lists(prompts, min_size=count, max_size=count))


def one_row(mode: str, prompt: Any) -> TensorDict:
    if mode == "tokens":
        tokens = Tokens(prompt=torch.tensor(prompt), batch_size=())
        return TensorDict(tokens=tokens, batch_size=())
    if mode == "text":
        return TensorDict(text=Text(prompt=prompt, batch_size=()), batch_size=())
    roles = (
        ["user", "assistant", "user"][-len(prompt) :] if len(prompt) != 2 else ["system", "user"]
    )
    chat = [{"role": r, "content": c} for r, c in zip(roles, prompt, strict=True)]
    history = ChatHistory(prompt=History.from_chats([chat])[0], batch_size=())
    return TensorDict(history=history, batch_size=())


def batch_of(mode: str, shape: tuple[int, ...], prompts: list[Any]) -> TensorDict:
    rows = [one_row(mode, prompt) for prompt in prompts]
    if not shape:
        return rows[0]
    stacked = lazy_stack(rows)
    return stacked if len(shape) == 1 else stacked.reshape(shape)


def run(service: AsyncSGLang, td: TensorDict, mode: str, **kwargs: Any) -> TensorDict:
    options = {"generate_kwargs": GREEDY, "inplace": False, **kwargs}
    return SGLangWrapper(service, input_mode=mode, **options)(td)


def result(row: Any) -> dict[str, Any]:
    """What a row is without its padding."""
    tokens, masks = row["tokens"], row["masks"]
    every, answer = masks.all_attention_mask, masks.all_assistant_mask
    full, scores = tokens.full[every], row["log_probs"].full[every]
    assert torch.equal(tokens.full, torch.cat([tokens.prompt, tokens.response]))
    assert not (answer & ~every).any()
    assert torch.equal(row["log_probs"].response[: answer.sum()], scores[answer[every]])
    assert not scores[answer[every]].isnan().any()
    versions = row["rollout", "policy_version"]
    assert torch.equal(versions == -1, ~answer)
    made = {
        "full": full.tolist(),
        "sampled": answer[every].tolist(),
        "scores": scores,
        "prompt text": row["text"].prompt,
        "response": row["text"].response,
        "reason": row["rollout", "finish_reason"],
    }
    if "history" in row:
        made["history"] = (row["history"].full.role, row["history"].full.content)
    return made


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    if one["full"] != other["full"] and tied(one, other):
        return
    for name, value in one.items():
        if name == "scores":
            torch.testing.assert_close(other[name], value, **CLOSE)
        else:
            assert other[name] == value, name


def tied(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two greedy rows part where two tokens are equally likely, but for bf16's noise."""
    pairs = zip(one["full"], other["full"], strict=False)
    position = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if position is None or not one["sampled"][position] or not other["sampled"][position]:
        return False
    torch.testing.assert_close(one["scores"][:position], other["scores"][:position], **CLOSE)
    return bool((one["scores"][position] - other["scores"][position]).abs() < 0.02)


@few
@given(batches())
def test_padded_and_ragged_agree(service: AsyncSGLang, batch: Any) -> None:
    mode, shape, prompts = batch
    ragged, padded = (
        run(service, batch_of(mode, shape, prompts), mode, pad_output=pad) for pad in (False, True)
    )
    assert ragged.batch_size == padded.batch_size == torch.Size(shape)
    rows = rows_of(padded)
    for one, other in zip(rows_of(ragged), rows, strict=True):
        assert_same(result(one), result(other))
        assert one["masks"].all_attention_mask.all()
    for part in ("prompt", "response", "full"):
        longest = max(len(getattr(row["tokens"], part)) for row in rows_of(ragged))
        if part != "full":
            assert {len(getattr(row["tokens"], part)) for row in rows} == {longest}
    if len(rows) > 1:  # prompts end and responses begin in one column
        ends = {
            int(
                (row["masks"].all_attention_mask & ~row["masks"].all_assistant_mask).nonzero().max()
            )
            for row in rows
        }
        assert len(ends) == 1


@few
@given(batches(shape=(4,)), st.booleans())
def test_a_row_alone_is_the_row_in_company(
    service: AsyncSGLang, batch: Any, pad_output: bool
) -> None:
    mode, shape, prompts = batch
    together = run(service, batch_of(mode, shape, prompts), mode, pad_output=pad_output)
    for row, prompt in zip(rows_of(together), prompts, strict=True):
        alone = run(service, one_row(mode, prompt), mode, pad_output=pad_output)
        assert_same(result(alone), result(row))


@few
@given(batches(shape=(5,)), st.permutations(range(5)), st.booleans())
def test_nothing_depends_on_the_order(
    service: AsyncSGLang, batch: Any, order: list[int], pad_output: bool
) -> None:
    mode, shape, prompts = batch
    straight = rows_of(run(service, batch_of(mode, shape, prompts), mode, pad_output=pad_output))
    mixed = run(
        service,
        batch_of(mode, shape, [prompts[index] for index in order]),
        mode,
        pad_output=pad_output,
    )
    for index, row in zip(order, rows_of(mixed), strict=True):
        assert_same(result(straight[index]), result(row))


@few
@given(batches(shape=(4,)), st.lists(st.integers(1, 9), min_size=4, max_size=4), st.booleans())
def test_options_of_one_row_are_its_own(
    service: AsyncSGLang, batch: Any, lengths: list[int], pad_output: bool
) -> None:
    mode, shape, prompts = batch
    td = batch_of(mode, shape, prompts)
    td.set("sampling", TensorDict(max_new_tokens=torch.tensor(lengths), batch_size=4))
    rows = rows_of(run(service, td, mode, pad_output=pad_output))
    for row, prompt, length in zip(rows, prompts, lengths, strict=True):
        own = {**GREEDY, "max_new_tokens": length}
        alone = run(
            service, one_row(mode, prompt), mode, pad_output=pad_output, generate_kwargs=own
        )
        assert_same(result(alone), result(row))


PADDINGS = st.sampled_from(["left", "right", "both"])


@few
@given(batches(shape=(4,)).filter(lambda b: b[0] == "tokens"), PADDINGS, st.integers(0, 3), MODES)
def test_however_the_prompts_are_padded(
    service: AsyncSGLang, tokenizer: Any, batch: Any, side: str, extra: int, how: str
) -> None:
    """With the masks of a `Masks`, with a plain mask, or with pads at the ends alone."""
    _, _, prompts = batch
    pad = tokenizer.pad_token_id
    if how != "tokens":  # a mask tells pads that are meant from those that fill
        prompts = [[pad, *prompt, pad] for prompt in prompts]
    width = max(len(prompt) for prompt in prompts) + extra
    rows, masks, plain = [], [], []
    for prompt in prompts:
        missing = width - len(prompt)
        before = {"left": missing, "right": 0, "both": missing // 2}[side]
        rows.append([pad] * before + prompt + [pad] * (missing - before))
        masks.append([0] * before + [1] * len(prompt) + [0] * (missing - before))
        ones = torch.ones(len(prompt), dtype=torch.bool)
        plain.append(one_row("tokens", prompt).set("attention_mask", ones))
    mask = torch.tensor(masks, dtype=torch.bool)
    td = TensorDict(tokens=Tokens(prompt=torch.tensor(rows), batch_size=4), batch_size=4)
    if how == "history":
        td["masks"] = Masks(all_attention_mask=mask, batch_size=4)
    elif how == "text":
        td["attention_mask"] = mask
    expected = rows_of(run(service, lazy_stack(plain), "tokens"))
    for prompt, one, other in zip(
        prompts, expected, rows_of(run(service, td, "tokens")), strict=True
    ):
        assert one["tokens"].prompt.tolist() == prompt
        assert_same(result(one), result(other))


@few
@given(batches(), st.integers(1, 3), st.booleans())
def test_samples_of_a_greedy_prompt_are_the_same(
    service: AsyncSGLang, batch: Any, count: int, pad_output: bool
) -> None:
    mode, shape, prompts = batch
    out = run(
        service, batch_of(mode, shape, prompts), mode, pad_output=pad_output, num_samples=count
    )
    assert out.batch_size == (*shape, count)
    single = rows_of(run(service, batch_of(mode, shape, prompts), mode, pad_output=pad_output))
    for index, row in enumerate(rows_of(out)):
        assert_same(result(single[index // count]), result(row))


@few
@given(batches(shape=(3,)), st.booleans())
def test_scoring_gives_what_generating_gave(
    service: AsyncSGLang, model: Any, batch: Any, pad_output: bool
) -> None:
    """At temperature 1, and equal to a Hugging Face forward."""
    mode, shape, prompts = batch
    sampling = {"generate_kwargs": {"max_new_tokens": 6}}
    out = run(service, batch_of(mode, shape, prompts), mode, pad_output=pad_output, **sampling)
    made = [result(row) for row in rows_of(out)]
    full = [
        TensorDict(
            tokens=Tokens(full=torch.tensor(got["full"]), batch_size=()),
            # Without one a pad that was sampled at the end passes for padding.
            masks=Masks(all_attention_mask=torch.ones(len(got["full"])).bool(), batch_size=()),
            batch_size=(),
        )
        for got in made
    ]
    score = SGLangWrapper(service, input_mode="tokens", generate=False, pad_output=pad_output)
    for got, row in zip(made, score(lazy_stack(full)).unbind(0), strict=True):
        sampled = [i for i, is_it in zip(got["full"], got["sampled"], strict=True) if is_it]
        prompt = got["full"][: len(got["full"]) - len(sampled)]
        expected = torch.tensor(hf_log_probs(model, prompt, sampled))
        torch.testing.assert_close(got["scores"][len(prompt) :], expected, **CLOSE)
        scores = row["log_probs"].full[row["masks"].all_attention_mask]
        assert scores[0].isnan()
        torch.testing.assert_close(scores[len(prompt) :], expected, **CLOSE)


@few
@given(batches(), st.sampled_from(["tokens_key", "text_key", "masks_key", "log_probs_key", None]))
def test_an_output_that_is_left_out_changes_nothing_else(
    service: AsyncSGLang, batch: Any, left_out: str | None
) -> None:
    mode, shape, prompts = batch
    whole = run(service, batch_of(mode, shape, prompts), mode)
    less = run(
        service,
        batch_of(mode, shape, prompts),
        mode,
        **({} if left_out is None else {left_out: None}),
    )
    missing = set(whole.keys()) - set(less.keys())
    assert missing == (set() if left_out is None else {left_out.removesuffix("_key")})
    for one, other in zip(rows_of(whole), rows_of(less), strict=True):
        for name in less.keys():  # noqa: SIM118  # a TensorDict iterates over its rows
            for key, value in one[name].items() if name != "rollout" else ():
                got = other[name].get(key)
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(got, value, **CLOSE)


def test_the_examples_hold_what_they_should() -> None:
    """Pads and EOS inside prompts, several lengths and every shape do occur."""
    seen: set[Any] = set()

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(batches())
    def collect(batch: Any) -> None:
        mode, shape, prompts = batch
        seen.update({mode, shape})
        if mode == "tokens":
            seen.update(i for prompt in prompts for i in prompt if i < 3)
            if len({len(prompt) for prompt in prompts}) > 1:
                seen.add("ragged")

    collect()
    assert seen >= {"history", "text", "tokens", (), (5,), (2, 3), (3, 1, 2), 0, 2, "ragged"}
