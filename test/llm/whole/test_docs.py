"""The code in README and documentation runs as it stands, on a tiny model and real servers."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.collectors import make_env
from helpers.lora_files import random_adapter
from helpers.marks import QUIET, UPDATER
from helpers.paths import ROOT
from helpers.rows import rows_of
from helpers.servers import SPECIAL_SERVER_ARGS, asked, keys_of
from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper, Timeouts
from torchrl_sglang.errors import UnsupportedOptionError
from torchrl_sglang.generate.request import ROUTER_DROPS, ROUTER_DROPS_OF_SAMPLING
from torchrl_sglang.policy.outputs.extras import EXTRAS
from torchrl_sglang.policy.requests.rows import ROW_OPTIONS, TEXT_OPTIONS

pytestmark = [*QUIET, UPDATER]


MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


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


@pytest.mark.slow
def test_readme_and_quickstart(model_path: Path, tokenizer: Any, timeouts: Timeouts) -> None:
    names: dict[str, Any] = {
        "timeouts": timeouts,
        "env": make_env(tokenizer, batch_size=64),
        "train_model": AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16),
    }
    try:
        code = readme_code().replace("num_replicas=2", "num_replicas=2, timeouts=timeouts")
        run_loop(code.replace(MODEL, str(model_path)), names)
        service = names["service"]
        assert service.weight_version == "2"
        names["scheme"].close()
        start, connect, *rest = quickstart_blocks()
        assert f'AsyncSGLang.from_pretrained("{MODEL}", num_replicas=2)' in start  # as in README
        keys = keys_of(service)
        connect = connect.replace("http://router:30000", service.server_url)
        connect = connect.replace(
            'api_key="..."',
            ", ".join([*(f'{name}="{key}"' for name, key in keys.items()), "timeouts=timeouts"]),
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


# docs/source/generation.rst


GENERATION = (ROOT / "docs/source/generation.rst").read_text()

BLOCK = re.compile(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)")


def sections() -> dict[str, str]:
    """The code of each section, by its title; snippets of one section share their names."""
    parts = re.split(r"(?m)^(.+)\n-{3,}\n", GENERATION)
    found = {
        title: "\n".join(re.sub(r"(?m)^   ", "", block) for block in BLOCK.findall(text))
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: code for title, code in found.items() if code}


SECTIONS = sections()

FIRST = "Input and output"


# A chat template for messages of several parts, as those of vision models.
PARTS_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '?' }}\
{% endfor %}<|im_end|>
{% endfor -%}
<|im_start|>assistant
"""


def responses(out: Any) -> list[list[int]]:
    return [row["tokens"].full[row["masks"].all_assistant_mask].tolist() for row in rows_of(out)]


def check_input_and_output(names: dict[str, Any]) -> None:
    first = names["first"]
    sampled = first["masks"].all_assistant_mask
    assert first["tokens"].full[:3].tolist() == [5, 6, 7]
    assert first["log_probs"].full.isnan().equal(~sampled)
    assert sampled.tolist() == [False] * 3 + [True] * (len(sampled) - 3)


def check_layouts(names: dict[str, Any]) -> None:
    assert [row[:2].tolist() for row in names["rows"]] == [[5, 6], [8, 9]]
    assert names["padded"]["tokens"].prompt.shape == (2, 3)
    assert not names["padded"]["masks"].all_attention_mask[1, 0]


def check_samples(names: dict[str, Any]) -> None:
    assert names["samples"].batch_size == (2, 4)


def check_context(names: dict[str, Any]) -> None:
    assert names["fits"] == names["service"].max_input_len - 1


def check_scoring(names: dict[str, Any]) -> None:
    assert names["scored"][0]["log_probs"].full.isnan().nonzero().tolist() == [[0]]


def check_options(names: dict[str, Any]) -> None:
    assert names["custom"].sampling == SamplingParams(
        max_new_tokens=8, temperature=0.7, stop=("\n\n",), sampling_seed=1
    )


def check_call_and_row(names: dict[str, Any]) -> None:
    assert names["greedy"].batch_size == (2,)
    short, digits = responses(names["mixed"])
    assert len(short) <= 4
    assert re.fullmatch(r"\d{3}<\|im_end\|>", names["tokenizer"].decode(digits))
    text = GENERATION.partition("A row can have")[2].partition("The key is")[0]
    assert set(re.findall(r"``(\w+)``", text)) == {"n", "processor", *TEXT_OPTIONS, *ROW_OPTIONS}


def check_log_probs(names: dict[str, Any]) -> None:
    assert names["exact"].sampling.top_p == 0.9
    sampled = names["info"]["policy_version"] >= 0
    assert len(names["offsets"]) == int(sampled.sum()) + 1
    assert names["offsets"][-1] == len(names["ids"])
    assert len(names["kept"]) >= 1


def check_mismatch(names: dict[str, Any]) -> None:
    assert names["found"].kl == pytest.approx(-0.01, abs=1e-4)
    assert names["found"].asdict()["mismatch/ess"] == pytest.approx(1.0)


def check_rollout(names: dict[str, Any]) -> None:
    info = names["info"]
    assert info["finish_reason"] in ("stop", "length")
    assert info["policy_version"][:3].tolist() == [-1] * 3
    assert info["top_token_ids"].shape[1] == 5
    always = {"finish_reason", "weight_version", "policy_version"}
    top = {"top_log_probs", "top_token_ids"}
    assert set(info.keys()) == always | top | {"cached_tokens"}
    table = GENERATION.partition("Extra                 What it adds")[2].partition("\n\n")[0]
    assert re.findall(r"(?m)^``(\w+)``", table) == list(EXTRAS)
    table = GENERATION.partition("Key                 Value")[2].partition("\n\n")[0]
    assert set(re.findall(r"(?m)^``(\w+)``", table)) == always


def check_turns(names: dict[str, Any]) -> None:
    before, after = names["turn"]["tokens"].full, names["again"]["tokens"].prompt
    assert after[: len(before)].equal(before)
    assert len(after) > len(before)


def check_conversations(names: dict[str, Any]) -> None:
    mask = names["row"]["masks"].all_assistant_mask
    sampled = [names[turn]["masks"].all_assistant_mask.sum() for turn in ("turn", "again")]
    assert mask.sum() == sum(sampled)
    assert names["row"]["next", "reward"].item() == 1.0
    assert torch.equal(names["row"]["conversation", "turn"] >= 0, mask)


def check_async(names: dict[str, Any]) -> None:
    assert names["one"].batch_size == names["other"].batch_size == (2,)
    assert len(names["completions"][0].output_ids) <= 64


def check_abort(names: dict[str, Any]) -> None:
    for row in rows_of(names["whole"]):
        assert row["rollout", "finish_reason"] == "length"
        assert row["masks"].all_assistant_mask.sum() == 400
        assert row["log_probs"].full[row["masks"].all_assistant_mask].isfinite().all()
    assert [row["rollout", "finish_reason"] for row in rows_of(names["rollout"])] == ["abort"] * 2


def check_session(names: dict[str, Any]) -> None:
    assert names["session"].closed
    assert names["session"].tokens[:3] == [5, 6, 7]
    assert names["session"].tokens[-len(names["completion"].output_ids) :] == (
        names["completion"].output_ids
    )


def check_processors(names: dict[str, Any]) -> None:
    digits, both = responses(names["digits"]), responses(names["both"])
    assert {token for row in digits for token in row} <= {20, 21, 22}
    assert {token for row in both for token in row} <= set(range(99)) - {7}
    first, second = responses(names["masked"])
    assert set(first) <= {20, 21}
    assert set(second) <= {30, 31}


def check_lora(names: dict[str, Any]) -> None:
    assert names["service"].lora.names() == ()
    assert names["tuned"].batch_size == (2,)


def check_openai(names: dict[str, Any]) -> None:
    assert len(names["chat"].choices[0].logprobs.content) <= 8
    assert names["text"].choices[0].logprobs.token_logprobs


def check_batching(names: dict[str, Any]) -> None:
    assert [out.batch_size for out in names["outs"]] == [(1,)] * 4


def check_media(names: dict[str, Any]) -> None:
    assert "reads text only" in str(names["error"])


def check_errors(names: dict[str, Any]) -> None:
    assert "prompt 1 has 100000 tokens;" in names["printed"]


def check_router(names: dict[str, Any]) -> None:
    text = GENERATION.partition("sglang-router 0.3.2 drops")[2].partition("\n\n")[0]
    named = {"custom_params": "processors", "custom_logit_processor": "processors"}
    for field in ROUTER_DROPS_OF_SAMPLING | ROUTER_DROPS:
        if field in ("return_sampling_mask", "sampling_logprobs_mode"):
            assert "sampling masks" in text
        elif field == "return_routed_experts":
            assert "routed" in text
        else:
            assert named.get(field, f"``{field}``") in text


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    FIRST: check_input_and_output,
    "Layouts": check_layouts,
    "Several samples": check_samples,
    "The end of the context": check_context,
    "Scoring": check_scoring,
    "Sampling options": check_options,
    "Options of a call, and of a row": check_call_and_row,
    "Log-probs": check_log_probs,
    "Comparing with the trainer": check_mismatch,
    "What else comes back": check_rollout,
    "Several turns": check_turns,
    "Whole conversations": check_conversations,
    "Awaiting, and finishing early": check_async,
    "Aborting, and going on": check_abort,
    "Sessions": check_session,
    "Logit processors": check_processors,
    "LoRA adapters": check_lora,
    "Images, videos and audio": check_media,
    "OpenAI's clients": check_openai,
    "Batching over threads": check_batching,
    "Errors and retries": check_errors,
    "What the router does not pass on": check_router,
}


def test_every_section_is_checked() -> None:
    assert list(SECTIONS) == list(CHECKS)


def abort_once_running(service: AsyncSGLang) -> None:
    """However long it takes until the server has begun with both rows."""
    for _ in range(1000):
        if asked(service.workers[0], "/v1/loads")["loads"][0]["num_running_reqs"] == 2:
            break
        time.sleep(0.02)
    service.abort()


@pytest.mark.parametrize("title", SECTIONS)
def test_generation(
    service: AsyncSGLang,
    tokenizer: Any,
    model: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    title: str,
) -> None:
    class Starting:
        """In place of `AsyncSGLang`: what a section starts is running already."""

        @staticmethod
        def from_pretrained(model_name: str, **kwargs: Any) -> AsyncSGLang:
            assert model_name == MODEL
            modules = kwargs.pop("lora_target_modules", [])
            assert set(modules) <= set(SPECIAL_SERVER_ARGS["lora_target_modules"])
            assert kwargs.items() <= SPECIAL_SERVER_ARGS.items()
            return request.getfixturevalue("special_service")

    names: dict[str, Any] = {"service": service, "tokenizer": tokenizer}
    exec(SECTIONS[FIRST], names)
    names["AsyncSGLang"] = Starting
    code = SECTIONS[title]
    if title == "Whole conversations":  # of the turns of the section before
        exec(SECTIONS["Several turns"], names)
    if title == "LoRA adapters":
        code = code.replace("path/to/adapter", str(random_adapter(tmp_path / "a", model, seed=1)))
    if title == "Aborting, and going on":
        code = code.replace("Timer(0.3, service.abort)", "Timer(0, abort_once_running, [service])")
        names["abort_once_running"] = abort_once_running
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if title == "Images, videos and audio":
            names["SGLangWrapper"] = partial(SGLangWrapper, chat_template=PARTS_TEMPLATE)
            with pytest.raises(UnsupportedOptionError) as caught:  # the model reads text only
                exec(code, names)
            names["error"] = caught.value
        elif title != FIRST:
            exec(code, names)
    names["printed"] = printed.getvalue()
    CHECKS[title](names)
