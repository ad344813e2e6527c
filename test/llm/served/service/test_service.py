"""What a service says of its servers, and its copies in other processes."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from typing import Any

import pytest
from packaging.version import Version

from helpers.copies import generate_in_child
from helpers.servers import CPU_SERVER_ARGS
from torchrl_sglang import AsyncSGLang
from torchrl_sglang.errors import ConnectError, ServiceClosedError
from torchrl_sglang.launch.process import installed_version


def test_what_a_server_says_of_itself(service: AsyncSGLang, model_path: Any) -> None:
    info = service.info
    assert service.model_path == str(model_path)
    assert (service.get_tp_size(), service.get_dp_size()) == (1, 1)
    python = CPU_SERVER_ARGS["server_python"] or sys.executable
    assert service.sglang_version == installed_version(python, "sglang")
    assert service.router_version == "0.3.2"
    assert info.device == "cpu"
    assert info.capabilities.update_session == (Version(service.sglang_version) > Version("0.5.20"))
    assert info.capabilities.checksum
    assert info.capabilities.cache_salt
    service.flush_cache()


def test_managed_servers_ask_for_their_key(service: AsyncSGLang) -> None:
    for url in (service.server_url, service.workers[0].url):
        with pytest.raises(ConnectError, match=r"401|api_key"):
            AsyncSGLang.connect(url)


def test_managed_servers_listen_on_loopback(service: AsyncSGLang) -> None:
    assert all("//127.0.0.1:" in worker.url for worker in service.workers)


def test_a_pickled_copy_works_in_another_process(service: AsyncSGLang) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=generate_in_child, args=(pickle.dumps(service), answers))
    child.start()
    ids, shown = answers.get(timeout=120.0)
    child.join(60.0)
    assert child.exitcode == 0
    assert "external" in shown
    assert ids == service.generate([9, 8, 7], {"max_new_tokens": 8, "temperature": 0.0}).output_ids


def test_a_forked_copy_works_too(service: AsyncSGLang) -> None:
    service.generate([5, 6], {"max_new_tokens": 2})  # the parent's event loop runs by now
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(
        target=lambda: answers.put(service.generate([5, 6], {"max_new_tokens": 2}).prompt_tokens)
    )
    child.start()
    assert answers.get(timeout=60.0) == 2
    child.join(60.0)
    assert service.generate([5, 6], {"max_new_tokens": 2}).output_ids


def test_use_after_shutdown(attached: AsyncSGLang) -> None:
    attached.generate([5, 6], {"max_new_tokens": 2})
    attached.shutdown()
    attached.shutdown()
    with pytest.raises(ServiceClosedError):
        attached.generate([5, 6], {"max_new_tokens": 2})


def test_its_sizes_are_attributes(service: AsyncSGLang) -> None:
    sizes = (service.tp_size, service.dp_size, service.pp_size, service.ep_size)
    assert sizes == (service.get_tp_size(), service.get_dp_size(), 1, 1) == (1, 1, 1, 1)
