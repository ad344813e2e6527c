"""The page that compares TransformersWrapper with ours: it is what a comparison gives now."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.paths import ROOT
from torchrl_sglang import AsyncSGLang


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("parity_table", ROOT / "tools/parity_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


parity = load_tool()

CASE = parity.Case("history", generate=True, padded=True, samples=2)


def test_the_page_is_true(service: AsyncSGLang, model: Any, tokenizer: Any) -> None:
    table = parity.compare(service, model, tokenizer)
    assert parity.unexplained(table) == []
    used = {row.note for rows in table.values() for row in rows}
    assert used == {None, *(note.label for note in parity.NOTES)}
    templates = parity.template_results(service, model, tokenizer)
    page = parity.render(table, templates)
    assert page == parity.PAGE.read_text(), "run tools/parity_table.py"
    advised = [text and mask for case, text, mask in templates if case.told is not None]
    assert advised == [True, True]


def change_ids(row: Any) -> None:
    row["tokens"].full = row["tokens"].full + 1


def change_dtype(row: Any) -> None:
    row["tokens"].prompt = row["tokens"].prompt.int()


def change_padding(row: Any) -> None:
    row["tokens"].prompt = row["tokens"].prompt.roll(-1)


def cut_mask(row: Any) -> None:
    row["masks"].all_attention_mask = row["masks"].all_attention_mask.clone()
    row["masks"].all_attention_mask[-1] ^= True


def lose_history(row: Any) -> None:
    row["history"].prompt = None


# These differ already; a note explains it, and has to be true all the same.


def shift_log_probs(row: Any) -> None:
    row["log_probs"].response = row["log_probs"].response - 1


def zero_for_nan(row: Any) -> None:
    row["log_probs"].full = row["log_probs"].full.nan_to_num(0.0)


def mark_the_prompt(row: Any) -> None:
    row["masks"].all_assistant_mask = torch.ones_like(row["masks"].all_assistant_mask)


def change_text(row: Any) -> None:
    row["text"].response = row["text"].response + "!"


def change_history(row: Any) -> None:
    row["history"].response[0].content = "!"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_ids, "tokens.full"),
        (change_dtype, "tokens.prompt"),
        (change_padding, "tokens.prompt"),
        (cut_mask, "masks.all_attention_mask"),
        (lose_history, "history.prompt"),
        (shift_log_probs, "log_probs.response"),
        (zero_for_nan, "log_probs.full"),
        (mark_the_prompt, "masks.all_assistant_mask"),
        (change_text, "text.response"),
        (change_history, "history.response"),
    ],
)
def test_what_is_not_explained_is_found(
    service: AsyncSGLang,
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    named: str,
) -> None:
    ours = parity.run_ours(CASE, service, tokenizer)
    rows = parity.rows_of(ours)
    for row in rows:
        change(row)
    monkeypatch.setattr(parity, "rows_of", lambda td: rows if td is ours else plain(td))
    pairs = parity.pairs(CASE, parity.run_theirs(CASE, model, tokenizer), ours)
    table = {CASE: [parity.row_of(pair) for pair in pairs]}
    assert any(f": {named} " in line for line in parity.unexplained(table))


plain = parity.rows_of
