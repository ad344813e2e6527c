"""Ids outside of the served model's vocabulary: they end a server, so they are never sent."""

from __future__ import annotations

from helpers.servers import connect_like
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import told
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWrapper, Timeouts
from torchrl_sglang.errors import ConfigError, InputError, UnsupportedOptionError
from torchrl_sglang.generate.check import check_ids
from torchrl_sglang.generate.request import Media, Returns
from torchrl_sglang.servers.attach import (
    QUESTION,
    configured_vocab_size,
    told_vocab_size,
)

SIZE = 512  # of the model that the shared server runs
FEW = {"max_new_tokens": 2, "ignore_eos": True}
# What ends SGLang 0.5.23, and what is said of it.
DEADLY: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"input_ids": (5, SIZE, 6)},
        InputError,
        r"prompt 1 has the id 512, at position 1: .* ids from 0 to 511",
    ),
    ({"input_ids": (-100, 5)}, InputError, r"prompt 1 has the id -100, at position 0: "),
    (
        {"returns": Returns(top_log_probs=SIZE + 1)},
        UnsupportedOptionError,
        r"prompt 1: top_log_probs=513, but the model's vocabulary has 512 ids",
    ),
    (
        {"sampling": SamplingParams(max_new_tokens=4, min_new_tokens=2, stop_token_ids=(600,))},
        UnsupportedOptionError,
        r"prompt 1: stop_token_ids has the id 600, .* ids from 0 to 511",
    ),
    # Harmless by itself; beside a request with min_new_tokens it is not.
    (
        {"sampling": SamplingParams(max_new_tokens=4, stop_token_ids=(3, 600))},
        UnsupportedOptionError,
        r"prompt 1: stop_token_ids has the id 600",
    ),
    (
        {"sampling": SamplingParams(max_new_tokens=4, logit_bias={3: 1.0, 512: 1.0})},
        UnsupportedOptionError,
        r"prompt 1: logit_bias has the id 512",
    ),
]
# As far as an id can be, and what can't be judged here.
FITS: list[dict[str, Any]] = [
    {"input_ids": (0, SIZE - 1)},
    {"returns": Returns(top_log_probs=SIZE)},
    {"sampling": SamplingParams(max_new_tokens=4, min_new_tokens=2, stop_token_ids=(SIZE - 1,))},
    {"sampling": SamplingParams(max_new_tokens=4, logit_bias={SIZE - 1: 1.0})},
    {"input_ids": None, "text": "hello"},
]


def request(**changes: Any) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    return GenerateRequest(**{"input_ids": (5, 6), "sampling": sampling, **changes})


@pytest.mark.parametrize(("changes", "error", "message"), DEADLY)
def test_what_would_end_the_server_is_refused(
    service: AsyncSGLang, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert service.info.vocab_size == SIZE
    with pytest.raises(error, match=message):
        service.generate([request(), request(**changes)])
    with pytest.raises(error, match=message):
        list(service.as_completed([request(), request(**changes)]))
    assert len(service.generate([5, 6], FEW).output_ids) == 2


@pytest.mark.parametrize("changes", FITS)
def test_what_the_server_takes(service: AsyncSGLang, changes: dict[str, Any]) -> None:
    (completion,) = service.generate([request(**changes)])
    assert completion.output_ids


@pytest.mark.parametrize("batching", [False, True])
def test_in_the_policy(service: AsyncSGLang, batching: bool) -> None:
    rows = [[5, 6], [7, SIZE + 5, 8]]
    batch = lazy_stack(
        [
            TensorDict(tokens=Tokens(prompt=torch.tensor(ids), batch_size=()), batch_size=())
            for ids in rows
        ]
    )
    policy = SGLangWrapper(
        service, input_mode="tokens", generate_kwargs=FEW, batching=batching, tokenizer=None
    )
    with pytest.raises(InputError, match="prompt 1 has the id 517, at position 1"):
        policy(batch)
    with pytest.raises(ConfigError, match="stop_token_ids has the id 999"):
        policy(batch[:1], stop_token_ids=[999], ignore_eos=False)
    assert len(policy(batch[:1])[0]["tokens"].response) == 2
    scorer = policy.get_new_version(generate=False)
    with pytest.raises(InputError, match="prompt 1 has the id 517"):
        scorer(
            lazy_stack(
                [
                    TensorDict(tokens=Tokens(full=torch.tensor(ids), batch_size=()), batch_size=())
                    for ids in rows
                ]
            )
        )


def generate_bodies(proxy: FaultProxy) -> list[Any]:
    return [json.loads(body) for path, body in proxy.seen if path == "/generate"]


def connect_through(
    proxy: FaultProxy, service: AsyncSGLang, timeouts: Timeouts, path: Path | None
) -> int | None:
    """What a service learns from a server that does not say, with a model in ``path``."""
    if path is not None:
        proxy.faults["/server_info"] = Fault(
            garble=lambda said: json.dumps({**json.loads(said), "model_path": str(path)}).encode()
        )
    with connect_like(service, proxy.url, timeouts=timeouts
    ) as external:
        return external.info.vocab_size


def test_a_server_is_asked_once_when_it_is_attached_to(
    proxy: FaultProxy, service: AsyncSGLang, proxied: AsyncSGLang, timeouts: Timeouts
) -> None:
    assert connect_through(proxy, service, timeouts, None) == SIZE
    assert generate_bodies(proxy) == [QUESTION]
    for _ in range(2):
        proxied.generate([[5, 6], [7, 8]], FEW)
    assert len(generate_bodies(proxy)) == 5


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=400, body='{"error": {"message": "not like this"}}'),
        Fault(status=200, body='{"text": "", "meta_info": {}}'),
        Fault(status=503, body="busy"),
        Fault(cut=True),
    ],
)
def test_a_server_that_does_not_say(
    proxy: FaultProxy,
    shared_service: AsyncSGLang,
    timeouts: Timeouts,
    fault: Fault,
    tmp_path: Path,
) -> None:
    proxy.faults["/generate"] = fault
    assert connect_through(proxy, shared_service, timeouts, None) == SIZE  # from its config.json
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert connect_through(proxy, shared_service, timeouts, tmp_path) == 7
    assert connect_through(proxy, shared_service, timeouts, Path("some/hub-name")) is None


def test_attaching_to_a_paused_server(
    service: AsyncSGLang, proxy: FaultProxy, timeouts: Timeouts
) -> None:
    worker = service.workers[0]
    told(worker, "/pause_generation", {"mode": "retract"})
    start = time.monotonic()
    try:
        assert connect_through(proxy, service, timeouts, None) == SIZE
    finally:
        told(worker, "/continue_generation", {})
    assert 2 < time.monotonic() - start < 9
    assert len(service.generate([5, 6], FEW).output_ids) == 2


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


@pytest.mark.parametrize("changes", [case[0] for case in DEADLY[:1] + DEADLY[2:]])
def test_a_vocabulary_that_is_not_known(changes: dict[str, Any]) -> None:
    check_ids([request(**changes)], None)


def test_negative_ids_are_wrong_in_every_vocabulary() -> None:
    with pytest.raises(InputError, match=r"has the id -1, at position 2: .* vocabulary\. Was"):
        check_ids([request(input_ids=(5, 6, -1))], None)


def test_placeholders_of_media_may_lie_beyond() -> None:
    """As in Llama 3.2 Vision, whose image token is the first id after its vocabulary."""
    image = Media(images=("http://host/a.png",))
    check_ids([request(input_ids=(5, SIZE), media=image)], SIZE)
    with pytest.raises(InputError, match="prompt 0 has the id -1"):
        check_ids([request(input_ids=(5, -1), media=image)], SIZE)
