"""Ids outside of the served model's vocabulary are refused, since they end a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import connect_like, told
from helpers.vocabulary import DEADLY, request
from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper, Timeouts
from torchrl_sglang.errors import ConfigError, InputError
from torchrl_sglang.generate.request import Returns
from torchrl_sglang.servers.attach import QUESTION

SIZE = 512  # of the model that the shared server runs

FEW = {"max_new_tokens": 2, "ignore_eos": True}

# As far as an id can be, and what can't be judged here.
FITS: list[dict[str, Any]] = [
    {"input_ids": (0, SIZE - 1)},
    {"returns": Returns(top_log_probs=SIZE)},
    {"sampling": SamplingParams(max_new_tokens=4, min_new_tokens=2, stop_token_ids=(SIZE - 1,))},
    {"sampling": SamplingParams(max_new_tokens=4, logit_bias={SIZE - 1: 1.0})},
    {"input_ids": None, "text": "hello"},
]


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
    with connect_like(service, proxy.url, timeouts=timeouts) as external:
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
