"""What a server says of itself: capabilities, layout and GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang.errors import ConnectError
from torchrl_sglang.servers.info import (
    Capabilities,
    _gpus,
    parse_capabilities,
    parse_worker_info,
    parse_worker_urls,
)

ROUTES = ("/generate", "/pause_generation")

SESSION = ("/begin_weight_update", "/end_weight_update")

SERVER_INFO = {"tp_size": 2, "dp_size": 1, "pp_size": 1, "dtype": "bfloat16", "device": "cpu"}

MODEL_INFO = {"model_path": "/m", "tokenizer_path": "/t", "weight_version": "default"}


def openapi(*routes: str, fields: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "paths": {route: {} for route in routes},
        "components": {
            "schemas": {"GenerateReqInput": {"properties": {field: {} for field in fields}}}
        },
    }


@pytest.mark.parametrize(
    ("api", "expected"),
    [
        (openapi(*ROUTES), (False, False, False)),
        (openapi(*ROUTES, *SESSION), (True, False, False)),
        (openapi(*ROUTES, SESSION[0]), (False, False, False)),
        (openapi(*ROUTES, "/weights_checker"), (False, True, False)),
        (openapi(*ROUTES, fields=("extra_key",)), (False, False, True)),
        ({"paths": dict.fromkeys(ROUTES)}, (False, False, False)),
    ],
)
def test_capabilities(api: dict[str, Any], expected: tuple[bool, bool, bool]) -> None:
    session, checksum, salt = expected
    assert parse_capabilities(api) == Capabilities(
        update_session=session, checksum=checksum, cache_salt=salt
    )


def test_the_capability_to_load_adapters_from_tensors() -> None:
    route = "/load_lora_adapter_from_tensors"
    assert parse_capabilities(openapi(*ROUTES, route)).adapter_tensors
    assert not parse_capabilities(openapi(*ROUTES, "/load_lora_adapter")).adapter_tensors


@pytest.mark.parametrize("api", [{}, openapi("/generate"), openapi("/pause_generation", "/v1")])
def test_a_server_of_another_kind_or_too_old(api: dict[str, Any]) -> None:
    with pytest.raises(ConnectError, match=r"older than 0\.5\.10"):
        parse_capabilities(api)


def test_worker_info() -> None:
    info = parse_worker_info(
        "http://s",
        {**SERVER_INFO, "max_req_input_len": 99, "version": "0.5.23"},
        {**MODEL_INFO, "model_type": "qwen2", "weight_version": 3},
        openapi(*ROUTES),
    )
    assert (info.url, info.model_path, info.tokenizer_path) == ("http://s", "/m", "/t")
    assert (info.tp_size, info.dp_size, info.pp_size, info.dp_attention) == (2, 1, 1, False)
    assert (info.dtype, info.device, info.model_type) == ("bfloat16", "cpu", "qwen2")
    assert (info.max_input_len, info.weight_version, info.version) == (99, "3", "0.5.23")


def test_what_a_server_need_not_say() -> None:
    info = parse_worker_info(
        "http://s", {"tp_size": 1, "dp_size": 1}, {"model_path": "/m"}, openapi(*ROUTES)
    )
    assert (info.tokenizer_path, info.model_type, info.dtype) == ("/m", None, "auto")
    assert (info.pp_size, info.max_input_len, info.device) == (1, None, "cuda")
    assert (info.weight_version, info.version) == ("default", "unknown")


@pytest.mark.parametrize(
    ("server", "model", "api"),
    [
        ({}, MODEL_INFO, openapi(*ROUTES)),
        ({**SERVER_INFO, "tp_size": None}, MODEL_INFO, openapi(*ROUTES)),
        ({**SERVER_INFO, "tp_size": "two"}, MODEL_INFO, openapi(*ROUTES)),
        (SERVER_INFO, {}, openapi(*ROUTES)),
        (SERVER_INFO, MODEL_INFO, "<html>not found</html>"),
        (SERVER_INFO, MODEL_INFO, None),
        (SERVER_INFO, MODEL_INFO, {**openapi(*ROUTES), "components": None}),
    ],
)
def test_answers_of_something_else(server: Any, model: Any, api: Any) -> None:
    with pytest.raises(ConnectError):
        parse_worker_info("http://s", server, model, api)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"workers": [{"url": "http://a/"}, {"url": "http://b"}]}, ["http://a", "http://b"]),
        ({"workers": []}, []),
        ({"workers": None}, None),
        ({}, None),
        ([], None),
        ("pong", None),
    ],
    ids=str,
)
def test_a_routers_list_of_workers(listed: Any, expected: list[str] | None) -> None:
    assert parse_worker_urls(listed) == expected


@pytest.mark.parametrize("listed", [{"workers": [{}]}, {"workers": ["http://a"]}], ids=str)
def test_a_list_of_something_else_is_no_routers(listed: Any) -> None:
    assert parse_worker_urls(listed) is None


@pytest.mark.parametrize(
    ("said", "gpus"),
    [
        ({"device": "cpu", "tp_size": 2, "dp_size": 1}, ()),
        ({"device": "cuda", "tp_size": 1, "dp_size": 1}, (0,)),
        ({"device": None, "tp_size": 2, "dp_size": 1, "base_gpu_id": 1}, (1, 2)),
        ({"tp_size": 2, "dp_size": 2, "base_gpu_id": 4}, (4, 5, 6, 7)),
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, (0, 1)),
        ({"tp_size": 2, "dp_size": 1, "pp_size": 2, "gpu_id_step": 2}, (0, 2, 4, 6)),
    ],
)
def test_gpus_of_a_server(said: dict[str, Any], gpus: tuple[int, ...]) -> None:
    assert _gpus(said) == gpus
