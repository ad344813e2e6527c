"""The code in README and quickstart runs as it stands, on a tiny model and two real servers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collector import make_env
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent.parent
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using WeightUpdaterBase is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:tensordict"),
]


class EnoughError(Exception):
    """Ends the endless training loops of the documents."""


def readme_code() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return code


def quickstart_blocks() -> list[str]:
    text = (ROOT / "docs/source/quickstart.rst").read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    return [re.sub(r"(?m)^   ", "", block) for block in blocks]


def run_loop(code: str, names: dict[str, Any]) -> None:
    """Runs code whose training loop ends only when `train_on` has enough."""
    seen: list[Any] = []
    code = code.replace('"max_new_tokens": 256', '"max_new_tokens": 8')

    def train_on(batch: Any) -> None:
        seen.append(batch)
        if len(seen) == 3:
            raise EnoughError

    names["train_on"] = train_on
    with pytest.raises(EnoughError):
        exec(code, names)
    assert seen[0]["tokens"].batch_size.numel() == 64


def test_readme_and_quickstart(model_path: Path, tokenizer: Any) -> None:
    names: dict[str, Any] = {
        "env": make_env(tokenizer, batch_size=64),
        "train_model": AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16),
    }
    try:
        run_loop(readme_code().replace(MODEL, str(model_path)), names)
        service = names["service"]
        assert service.weight_version == "2"
        names["scheme"].close()
        start, connect, *rest = quickstart_blocks()
        assert f'AsyncSGLang.from_pretrained("{MODEL}", num_replicas=2)' in start  # as in README
        keys = service._keys
        connect = connect.replace("http://router:30000", service.server_url)
        connect = connect.replace(
            'api_key="..."', f'api_key="{keys.api_key}", admin_api_key="{keys.admin_api_key}"'
        )
        exec(connect, names)
        names["env"] = make_env(tokenizer, batch_size=64)
        for block in rest[:-1]:
            exec(block.replace('"max_new_tokens": 256', '"max_new_tokens": 8'), names)
        assert len(names["completions"]) == 2
        run_loop(rest[-1].replace("...", "train_on(batch)"), names)
        assert service.weight_version == "2"
        names["scheme"].close()
        names["service"].shutdown()
        service.shutdown()
    finally:
        if "service" in names:
            names["service"].shutdown()
