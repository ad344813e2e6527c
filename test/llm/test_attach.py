"""Which folder a server's model is in."""

from __future__ import annotations

from pathlib import Path

from torchrl_sglang.attach import _model_folder


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
