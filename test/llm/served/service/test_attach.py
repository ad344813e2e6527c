"""Attaching to servers and routers by their URL, and what is found out then."""

from __future__ import annotations

import json

import pytest

from helpers.fault_proxy import BASE_PATH, Fault, FaultProxy
from helpers.marks import IDLE
from helpers.rows import tokens_of
from helpers.servers import connect_like, told
from torchrl_sglang import AsyncSGLang, ServiceState, SGLangWrapper, Timeouts
from torchrl_sglang.errors import ConnectError

pytestmark = IDLE


@pytest.mark.parametrize("ending", ["", "/"])
def test_connect_to_a_single_server(service: AsyncSGLang, ending: str, timeouts: Timeouts) -> None:
    url = service.workers[0].url
    with connect_like(service, url + ending, timeouts=timeouts) as external:
        assert external.server_url == url
        assert not external.cluster.behind_router
        assert external.generate([5, 6], {"max_new_tokens": 2}).output_ids
    # It owned nothing: the server is still there.
    assert service.generate([5, 6], {"max_new_tokens": 2}).output_ids


def test_connect_under_a_base_path(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.seen.clear()
    with connect_like(proxied, f"{proxy.url}{BASE_PATH}/") as external:
        assert external.generate([5, 6], {"max_new_tokens": 2}).output_ids
        external.flush_cache()
    paths = {path for path, _ in proxy.seen}
    assert paths >= {f"{BASE_PATH}/generate", f"{BASE_PATH}/flush_cache"}
    assert all(path.startswith(BASE_PATH) for path in paths)


def test_connect_to_the_router(service: AsyncSGLang) -> None:
    with connect_like(service, service.server_url) as external:
        assert external.cluster.behind_router
        assert [worker.url for worker in external.workers] == [
            worker.url for worker in service.workers
        ]
        assert external.generate([5, 6], {"max_new_tokens": 2}).output_ids


def test_nothing_answers() -> None:
    with pytest.raises(ConnectError, match="nothing answers"):
        AsyncSGLang.connect("http://127.0.0.1:9")


def test_a_server_of_another_kind(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/server_info"] = Fault(garble=lambda _: b'{"some": "thing"}')
    with pytest.raises(ConnectError, match="not as an SGLang server"):
        AsyncSGLang.connect(proxy.url, api_key=proxied.api_key)


def test_a_router_without_workers(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/workers"] = Fault(status=200, body='{"workers": []}')
    with pytest.raises(ConnectError, match="has no workers"):
        AsyncSGLang.connect(proxy.url, api_key=proxied.api_key)


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/generate", "/v1/chat/completions", "/health"])
@pytest.mark.parametrize("behind_router", [True, False])
def test_a_url_that_has_a_route(service: AsyncSGLang, behind_router: bool, path: str) -> None:
    """As from the settings of another client."""
    base = service.server_url if behind_router else service.workers[0].url
    with pytest.raises(ConnectError) as caught:
        connect_like(service, base + path)
    assert f"has the path {path.rstrip('/')!r}" in str(caught.value)
    assert f"pass '{base}'" in str(caught.value)


def test_servers_that_are_paused_are_not_synced(
    service: AsyncSGLang, proxy: FaultProxy, timeouts: Timeouts
) -> None:
    """As they are when another process pushes, or its push failed."""
    worker = service.workers[0]
    told(worker, "/pause_generation", {"mode": "retract"})
    try:
        with connect_like(service, proxy.url, timeouts=timeouts) as external:
            assert external.state is ServiceState.UPDATING
            told(worker, "/continue_generation")
            assert external.state is ServiceState.SYNCED
            asked = len(proxy.seen)
            assert external.state is ServiceState.SYNCED
            assert len(proxy.seen) == asked  # it is asked no more
    finally:
        told(worker, "/continue_generation")


@pytest.mark.parametrize(
    "fault", [Fault(cut=True), Fault(status=500), Fault(delay_s=30.0)], ids=["cut", "500", "silent"]
)
def test_a_server_that_does_not_answer(
    proxy: FaultProxy, service: AsyncSGLang, fault: Fault
) -> None:
    """It is left out where another one answers, and named where none does."""
    url = service.workers[0].url
    listed = {"workers": [{"url": proxy.url}, {"url": url}, {"url": "http://127.0.0.1:9"}]}
    proxy.faults["/server_info"] = fault
    proxy.faults["/workers"] = Fault(status=200, body=json.dumps(listed))
    short = Timeouts(connect_s=2.0)
    with pytest.warns(RuntimeWarning, match=f"don't answer: {proxy.url}: .*127.0.0.1:9: nothing"):
        external = connect_like(service, proxy.url, timeouts=short)
    with external:
        assert [worker.url for worker in external.workers] == [url]
        assert set(external.cluster.silent) == {proxy.url, "http://127.0.0.1:9"}
        del proxy.faults["/server_info"]
        external.refresh()
        with pytest.warns(RuntimeWarning, match="127.0.0.1:9: nothing"):
            assert {worker.url for worker in external.workers} == {url, proxy.url}
    listed["workers"].pop(1)
    proxy.faults["/server_info"] = fault
    proxy.faults["/workers"] = Fault(status=200, body=json.dumps(listed))
    with pytest.raises(ConnectError, match=f"{proxy.url}: .*; http://127.0.0.1:9: nothing answers"):
        connect_like(service, proxy.url, timeouts=short)


def test_a_server_that_refuses_is_not_left_out(proxy: FaultProxy, service: AsyncSGLang) -> None:
    """It lives, and would go on with the weights that it has."""
    url = service.workers[0].url
    listed = {"workers": [{"url": proxy.url}, {"url": url}]}
    proxy.faults["/server_info"] = Fault(status=401)
    proxy.faults["/workers"] = Fault(status=200, body=json.dumps(listed))
    with pytest.raises(ConnectError, match="answered 401"):
        connect_like(service, proxy.url)


def test_a_policy_at_a_url_uses_the_service_that_is_there(service: AsyncSGLang) -> None:
    """With its gate, and with its random keys."""
    policy = SGLangWrapper(
        service.server_url, input_mode="tokens", generate_kwargs={"max_new_tokens": 2}
    )
    assert policy.service is service
    assert len(policy(tokens_of(5, 6))[0]["tokens"].response) == 2
