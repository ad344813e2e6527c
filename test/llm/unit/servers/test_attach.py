"""What is found out about a model when its servers are attached to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang.servers.attach import (
    _model_folder,
    configured_eos_ids,
    configured_vocab_size,
    told_vocab_size,
)


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ('{"error":{"message":"logit_bias must has keys in [0, 511], got -1."}}', 512),
        ("logit_bias must have keys in [0, 151935], got -1.", 151936),
        ("logit_bias is not supported", None),
        ("", None),
    ],
)
def test_what_a_refusal_tells(said: str, size: int | None) -> None:
    assert told_vocab_size(said) == size


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ('{"vocab_size": 100}', 100),
        ('{"text_config": {"vocab_size": 100}, "vocab_size": 7}', 100),
        ('{"text_config": {}}', None),
        ('{"text_config": null}', None),
        ('{"vocab_size": "many"}', None),
        ("[]", None),
        ("no json", None),
        (None, None),
    ],
)
def test_the_size_in_a_config(tmp_path: Path, config: str | None, size: int | None) -> None:
    path = tmp_path / "config.json"
    if config is not None:
        path.write_text(config)
    assert configured_vocab_size(path) == size


def test_files_that_a_server_loaded_and_that_are_gone(tmp_path: Path) -> None:
    loaded, model, bare = (tmp_path / name for name in ("loaded", "model", "bare"))
    for folder in (model, bare):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    assert _model_folder(str(loaded), str(model)) == str(model)
    assert _model_folder(str(loaded), str(bare)) == str(loaded)  # no model there
    assert _model_folder("some/hub-name", str(model)) == "some/hub-name"
    loaded.mkdir()
    assert _model_folder(str(loaded), str(model)) == str(loaded)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 5}, (2, 3, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 4]}, (2, 4)),
        ({"eos_token_id": None}, {}, ()),
        ({}, {"eos_token_id": 2}, None),  # the class of the model may have one
        (None, {"eos_token_id": 2}, None),
        ([], None, None),
    ],
    ids=str,
)
def test_what_ends_a_row(tmp_path: Path, config: Any, generation: Any, expected: Any) -> None:
    for name, content in (("config", config), ("generation_config", generation)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert configured_eos_ids(tmp_path) == expected
