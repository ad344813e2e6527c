"""What is found out about servers and routers when they are attached to."""

from __future__ import annotations

from helpers.servers import connect_like
import json
from pathlib import Path

import pytest
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import told

from torchrl_sglang import AsyncSGLang, ServiceState, Timeouts
from torchrl_sglang.errors import ConfigError, ConnectError
from torchrl_sglang.servers.attach import _model_folder
from torchrl_sglang.servers.http import normalise_url, path_hint


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


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/generate", "/v1/chat/completions", "/health"])
@pytest.mark.parametrize("behind_router", [True, False])
def test_a_url_that_has_a_route(service: AsyncSGLang, behind_router: bool, path: str) -> None:
    """As from the settings of another client."""
    base = service.server_url if behind_router else service.workers[0].url
    with pytest.raises(ConnectError) as caught:
        connect_like(service, base + path)
    assert f"has the path {path.rstrip('/')!r}" in str(caught.value)
    assert f"pass '{base}'" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://h:1?a=b", "http://h:1/#f", "http://h:99999", "http://h:x", "http://h:1/v1?a=b"]
)
def test_what_is_no_base_url(url: str) -> None:
    with pytest.raises(ConfigError, match="at most a port below 65536 and a path"):
        normalise_url(url)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://h:1", False),
        ("http://h:1//", False),
        ("http://h:1/v1", True),
        ("https://h/some/base/", True),
    ],
)
def test_only_a_path_is_hinted_at(url: str, hint: bool) -> None:
    assert bool(path_hint(normalise_url(url))) == hint


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
