"""Answers as text: their spaces, special tokens and stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_model import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tokenizers import metaspace
from torchrl_sglang import Completion, VersionSpan
from torchrl_sglang.policy.outputs.texts import as_messages, contents, decode, decode_answers
from torchrl_sglang.policy.tokenizers import special_tokens

TOKENIZER = make_tokenizer(vocab_size=300)


@pytest.fixture(scope="module", params=["first", "always"])
def spaced(request: pytest.FixtureRequest) -> Any:
    return metaspace(request.param)


def test_the_space_before_an_answer_is_in_its_text(spaced: Any) -> None:
    """Whatever the ids are, the texts of prompt and answer together are the text of all."""
    answers = [[i, j] for i in range(3, 120, 7) for j in range(3, 120, 11)]
    prompt = spaced("the quick", add_special_tokens=False)["input_ids"]
    texts = decode_answers(answers, spaced)
    assert ["the quick" + text for text in texts] == decode([prompt + a for a in answers], spaced)
    assert any(text.startswith(" ") for text in texts)
    assert any(not text.startswith(" ") for text in texts)
    assert decode_answers([[*a, 2] for a in answers], spaced, skip_special_tokens=True) == texts
    begun = [None, None, "x", " "]
    assert as_messages([" a", "b", " c", " d"], begun, spaced) == ["a", "b", " c", "d"]
    assert as_messages([" a", "b"], None, TOKENIZER) == [" a", "b"]
    ids = TOKENIZER("a b", add_special_tokens=False)["input_ids"]
    assert decode_answers([ids], TOKENIZER) == decode([ids], TOKENIZER) == ["a b"]


@pytest.fixture
def worded() -> Any:
    """A tokenizer of whole words, joined with spaces, of which "x" is none."""
    vocabulary = {"[UNK]": 0, "[EOS]": 1, "up": 2, "down": 3, "left": 4}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[EOS]")


@pytest.mark.parametrize("options", [{}, {"skip_special_tokens": True}], ids=str)
def test_what_stands_before_an_answer_is_no_special_token(worded: Any, options: Any) -> None:
    assert decode_answers([[2, 3, 4], []], worded, **options) == ["up down left", ""]


def test_a_tokenizer_that_drops_a_space_but_writes_none(spaced: Any) -> None:
    """As CodeLlama's without add_prefix_space."""
    made = Tokenizer.from_str(spaced.backend_tokenizer.to_str())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    never = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    word = never.convert_tokens_to_ids("\u2581quick")
    assert never.decode([word]) == "quick"
    assert decode_answers([[word]], never) == [" quick"]


def completed(ids: list[int], matched: Any) -> Completion:
    return Completion(
        rid="a",
        output_ids=ids,
        log_probs=None,
        text=None,
        finish_type="stop",
        matched_stop=matched,
        prompt_tokens=1,
        cached_tokens=0,
        version_spans=(),
        latency_s=None,
    )


def test_what_ends_an_answer_takes_its_space_along(spaced: Any) -> None:
    quick, fox = spaced.convert_tokens_to_ids(["\u2581quick", "\u2581fox"])
    ended = [completed([fox], fox), completed([quick, fox], fox), completed([quick, 2], 2)]
    decoded = decode_answers([each.output_ids for each in ended], spaced)
    assert contents(ended, decoded, spaced, special_tokens(spaced)) == ["", " quick", " quick"]
    assert contents(ended, ["fox", "quick fox", "quick</s>"], spaced, special_tokens(spaced)) == [
        "",
        "quick",
        "quick",
    ]


def completion(ids: list[int], matched: Any, kind: Any = "stop") -> Completion:
    return Completion(
        rid="r",
        output_ids=ids,
        log_probs=None,
        text=None,
        finish_type=kind,
        matched_stop=matched,
        prompt_tokens=1,
        cached_tokens=0,
        version_spans=(VersionSpan(version="1", start=0, end=len(ids)),),
    )


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", "\n", "one"),  # twice in the last token
        ("aXbX", "X", "a"),
        ("say. bar", ".", "say"),  # inside one token
        (".", ".", ""),
        ("a<|im_end|>bX", "X", "a<|im_end|>b"),
        ("a<|im_start|>X", "X", "a<|im_start|>"),
        ("a<|im_end|>b", "end", "a<|im_end|>b"),  # only inside a special token
        ("a<|im_end|>bend", "end", "a<|im_end|>b"),
        ("ab<|im_end|>\nc", "<|im_end|>\n", "ab"),
        ("a", "absent", "a"),
    ],
)
def test_a_stop_string_cuts_where_it_stands_first(
    tokenizer: Any, text: str, stop: str, expected: str
) -> None:
    special = special_tokens(tokenizer)
    ids = tokenizer(text)["input_ids"]
    if ids[-1] in special.ids:
        return
    assert contents([completion(ids, stop)], [text], tokenizer, special) == [expected]
