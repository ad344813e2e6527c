"""LoRA adapters on a real server, compared with a Hugging Face forward of the merged weights."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.asserts import distance
from helpers.fault_proxy import Fault, FaultProxy
from helpers.lora_files import ATTENTION, MLP, merge_adapter, random_adapter
from helpers.peft_models import base_model
from helpers.prompts import LORA_PROMPTS
from helpers.servers import client_like, perturb, told, wait_until, worst_error
from torchrl_sglang import AsyncSGLang, GenerateRequest, SamplingParams, SGLangWeightSyncScheme
from torchrl_sglang.errors import (
    ConfigError,
    ConnectError,
    InputError,
    RequestRefusedError,
    RequestTimeoutError,
    ResponseError,
    ServerFailedError,
    UnsupportedOptionError,
)
from torchrl_sglang.servers import lora as adapters
from torchrl_sglang.servers.control import ControlClient
from torchrl_sglang.servers.lora import Adapters

LOAD, UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"


@pytest.fixture(scope="module")
def folders(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of random weights, by name."""
    root, model = tmp_path_factory.mktemp("adapters"), base_model(model_path)
    return {
        "a": random_adapter(root / "a", model, seed=1),
        "b": random_adapter(root / "b", model, seed=2, rank=16, targets=ATTENTION, scale=0.05),
        "mlp": random_adapter(root / "mlp", model, seed=3, targets=MLP, scale=0.05),
        "big": random_adapter(root / "big", model, seed=4, rank=32),
    }


@pytest.fixture
def lora_service(special_service: AsyncSGLang) -> AsyncSGLang:
    return special_service


@pytest.fixture
def lora(lora_service: AsyncSGLang) -> Iterator[Adapters]:
    """The adapters of the server, none loaded before or after."""
    yield (loaded := Adapters(lora_service.workers))
    for name in loaded.names():
        loaded.unload(name)


@pytest.fixture
def second(lora_service: AsyncSGLang) -> Iterator[FaultProxy]:
    """A proxy that can stand for a second server; behind it is the first."""
    with FaultProxy(lora_service.workers[0].url) as running:
        yield running


@pytest.fixture
def client(lora_service: AsyncSGLang) -> Callable[..., ControlClient]:
    """Makes clients with the server's keys."""
    return lambda url: client_like(lora_service, url)


@pytest.fixture
def pair(
    lora: Adapters, lora_service: AsyncSGLang, second: FaultProxy, client: Callable[..., Any]
) -> Adapters:
    """The adapters of two servers, the second of which misbehaves when told to."""
    return Adapters([*lora_service.workers, client(second.url)])


def sample(
    service: AsyncSGLang, prompts: Sequence[list[int]], names: Sequence[str | None], **body: Any
) -> list[dict[str, Any]]:
    """SGLang's own greedy answers, for one adapter per prompt in one batch."""
    params = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
    answers: list[dict[str, Any]] = told(
        service.workers[0],
        "/generate",
        {
            "input_ids": list(prompts),
            "lora_path": list(names),
            "sampling_params": params,
            "return_logprob": True,
            **body,
        },
    )
    return answers


# Generation


def test_base_and_adapters_in_one_batch(
    lora: Adapters, lora_service: AsyncSGLang, model_path: Path, folders: dict[str, Path]
) -> None:
    used = [None, "a", "b", "mlp"]
    models = {None: base_model(model_path)}
    for name in used[1:]:
        lora.load(name, folders[name])
        models[name] = merge_adapter(base_model(model_path), folders[name])
    names = [name for name in used for _ in LORA_PROMPTS]
    prompts = LORA_PROMPTS * len(used)
    answers = sample(lora_service, prompts, names)
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        assert distance(models[name], prompt, answer) < 0.02
        others = [distance(models[other], prompt, answer) for other in used if other != name]
        assert min(others) > 0.1


@pytest.mark.usefixtures("lora")
def test_requests_name_adapters(
    lora_service: AsyncSGLang, model_path: Path, folders: dict[str, Path]
) -> None:
    lora_service.lora.load("a", folders["a"])
    sampling = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)
    requests = [
        GenerateRequest(input_ids=LORA_PROMPTS[0], sampling=sampling, lora=name)
        for name in (None, "a")
    ]
    merged = merge_adapter(base_model(model_path), folders["a"])
    completions = lora_service.generate(requests)
    for model, completion in zip([base_model(model_path), merged], completions, strict=True):
        assert worst_error(model, LORA_PROMPTS[:1], [completion]) < 0.02
    lora_service.lora.unload("a")
    with pytest.raises(InputError, match="'a' is not loaded"):
        lora_service.generate(requests)


def test_prefixes_are_cached_for_each_adapter(
    lora: Adapters, lora_service: AsyncSGLang, folders: dict[str, Path]
) -> None:
    prompt, salt = list(range(100, 164)), uuid.uuid4().hex

    def cached(name: str | None) -> int:
        [answer] = sample(lora_service, [prompt], [name], extra_key=salt)
        tokens: int = answer["meta_info"]["cached_tokens"]
        return tokens

    lora.load("a", folders["a"])
    lora.load("b", folders["b"])
    assert [cached(name) for name in (None, "a", "b")] == [0, 0, 0]
    assert [cached(name) for name in (None, "a", "b")] == [63, 63, 63]
    lora.unload("a")
    lora.load("a", folders["mlp"])
    assert cached("a") == 0


def test_a_push_of_base_weights_leaves_adapters_alone(
    lora: Adapters, lora_service: AsyncSGLang, model_path: Path, folders: dict[str, Path]
) -> None:
    lora.load("a", folders["a"])
    scheme = SGLangWeightSyncScheme(lora_service)
    scheme.init_on_sender()
    scheme.connect()
    try:
        scheme.send(perturb(base_model(model_path), seed=5, scale=0.2))
        answers = sample(lora_service, LORA_PROMPTS[:2], [None, "a"])
    finally:
        scheme.send(base_model(model_path))
        scheme.close()
    for folder, prompt, answer in zip([None, folders["a"]], LORA_PROMPTS[:2], answers, strict=True):
        pushed = perturb(base_model(model_path), seed=5, scale=0.2)
        before = base_model(model_path)
        if folder is not None:
            pushed, before = merge_adapter(pushed, folder), merge_adapter(before, folder)
        assert distance(pushed, prompt, answer) < 0.02
        assert distance(before, prompt, answer) > 0.05


# Loading, unloading, listing


def test_what_is_loaded_is_asked_of_the_servers(
    lora: Adapters, lora_service: AsyncSGLang, folders: dict[str, Path]
) -> None:
    another = Adapters(lora_service.workers)
    assert lora.names() == ()
    lora.load("b", folders["b"])
    another.load("a", str(folders["a"]), pinned=True)
    assert lora.names() == another.names() == ("a", "b")
    another.unload("b")
    assert lora.names() == ("a",)


def test_a_name_can_be_loaded_again_with_other_weights(
    lora: Adapters, lora_service: AsyncSGLang, model_path: Path, folders: dict[str, Path]
) -> None:
    for folder in (folders["a"], folders["b"]):
        lora.load("actor", folder)
        [answer] = sample(lora_service, LORA_PROMPTS[:1], ["actor"])
        assert (
            distance(merge_adapter(base_model(model_path), folder), LORA_PROMPTS[0], answer) < 0.02
        )
        lora.unload("actor")


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_that_are_none(lora: Adapters, folders: dict[str, Path], name: Any) -> None:
    for refused in (lambda: lora.load(name, folders["a"]), lambda: lora.unload(name)):
        with pytest.raises(ConfigError, match="name is a string that is not empty"):
            refused()
    assert lora.names() == ()


def test_a_folder_without_an_adapter(lora: Adapters, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        lora.load("a", tmp_path)


def test_a_name_that_is_taken(
    lora: Adapters, lora_service: AsyncSGLang, folders: dict[str, Path]
) -> None:
    lora.load("a", folders["a"])
    with pytest.raises(
        ConfigError, match=f"'a' is loaded already, on {lora_service.workers[0].url}"
    ):
        lora.load("a", folders["b"])
    assert lora.names() == ("a",)


def test_an_unknown_name(lora: Adapters, folders: dict[str, Path]) -> None:
    lora.load("a", folders["a"])
    with pytest.raises(ConfigError, match="'x' can't be unloaded: every server has 'a'"):
        lora.unload("x")
    assert lora.names() == ("a",)


def test_what_only_the_server_can_refuse(
    lora: Adapters, lora_service: AsyncSGLang, folders: dict[str, Path]
) -> None:
    with pytest.raises(RequestRefusedError, match=r"big with rank 32 .*max-lora-rank") as caught:
        lora.load("big", folders["big"])
    assert f"'big' was not loaded: {lora_service.workers[0].url} says: " in str(caught.value)
    assert str(caught.value).endswith("; no server has it")
    assert "success" not in str(caught.value)  # but SGLang's own words alone
    assert caught.value.status == 400
    assert lora.names() == ()


def test_servers_without_lora(service: AsyncSGLang, folders: dict[str, Path]) -> None:
    plain = Adapters(service.workers)
    assert plain.names() == ()
    plain.check([None])
    says = "runs without LoRA: .*enable_lora=True, max_lora_rank=16, lora_target_modules="
    for refused in (
        lambda: plain.load("a", folders["a"]),
        lambda: plain.unload("a"),
        lambda: plain.check(["a"]),
    ):
        with pytest.raises(UnsupportedOptionError, match=says):
            refused()


def test_servers_with_dp(pair: Adapters, second: FaultProxy, folders: dict[str, Path]) -> None:
    second.faults[LOAD] = Fault(status=500)  # an assertion there
    second.faults["/server_info"] = Fault(status=200, body='{"enable_lora": true, "dp_size": 2}')
    with pytest.raises(UnsupportedOptionError, match=r"dp_size=2.*use num_replicas"):
        pair.load("a", folders["a"])


# One server of several fails


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=400, body='{"error_message": "too large"}'), RequestRefusedError),
        (Fault(status=500), ServerFailedError),
        (Fault(cut=True), ServerFailedError),
    ],
    ids=["refused", "failed", "cut"],
)
def test_a_failed_load_is_taken_back(
    pair: Adapters, second: FaultProxy, folders: dict[str, Path], fault: Fault, kind: type
) -> None:
    second.faults[LOAD] = fault
    with pytest.raises(kind, match=f"'a' was not loaded: {second.url} says: ") as caught:
        pair.load("a", folders["a"])
    assert "no server has it" in str(caught.value)
    assert pair.names() == ()
    assert ("too large" in str(caught.value)) == (fault.status == 400)
    # One that refused has nothing to take back; one that failed may have loaded all the same.
    assert [path for path, _ in second.seen].count(UNLOAD) == (fault.status != 400)


def test_a_load_that_is_too_late_is_taken_back(
    pair: Adapters, lora: Adapters, second: FaultProxy, folders: dict[str, Path]
) -> None:
    second.faults[LOAD] = Fault(delay_s=12.0)
    with pytest.raises(RequestTimeoutError, match=f"'a' was not loaded: {second.url} says: "):
        pair.load("a", folders["a"], timeout_s=4.0)
    assert lora.names() == ()


def test_a_load_that_can_not_be_taken_back(
    pair: Adapters, second: FaultProxy, folders: dict[str, Path]
) -> None:
    second.faults[LOAD] = second.faults[UNLOAD] = Fault(status=500)
    with pytest.raises(ServerFailedError, match=rf"; {second.url} may have it now: call unload"):
        pair.load("a", folders["a"])


def test_an_unload_that_fails_can_be_repeated(
    pair: Adapters, lora: Adapters, second: FaultProxy, folders: dict[str, Path]
) -> None:
    lora.load("a", folders["a"])
    second.faults[UNLOAD] = Fault(status=500, times=1)
    with pytest.raises(ServerFailedError, match=f"not unloaded: {second.url} says: .*again"):
        pair.unload("a")
    lora.load("a", folders["a"])
    pair.unload("a")  # one of them finds it gone
    assert lora.names() == ()


def test_an_unload_that_is_refused(
    pair: Adapters, second: FaultProxy, folders: dict[str, Path]
) -> None:
    has_it = b'{"data": [{"id": "a", "parent": "base"}]}'
    second.faults[UNLOAD] = Fault(status=400, body='{"error_message": "stuck"}')
    second.faults["/v1/models"] = Fault(garble=lambda _: has_it)
    with pytest.raises(RequestRefusedError, match=f"not unloaded: {second.url} says: stuck; call"):
        pair.unload("a")


def only_base(content: bytes) -> bytes:
    return b'{"data": [{"id": "base", "parent": null}]}'


def test_an_adapter_that_one_server_lacks(
    pair: Adapters, lora: Adapters, second: FaultProxy, folders: dict[str, Path]
) -> None:
    lora.load("a", folders["a"])
    second.faults["/v1/models"] = Fault(garble=only_base)
    assert pair.names() == ()
    with pytest.raises(
        InputError, match=f"'a' is not loaded on {second.url}: every server has none"
    ):
        pair.check(["a"])
    with pytest.raises(ConfigError, match="loaded already") as caught:
        pair.load("a", folders["a"])
    assert second.url not in str(caught.value)
    pair.unload("a")
    assert lora.names() == ()


@pytest.mark.parametrize("content", [b"[]", b'{"data": 1}', b'{"data": [1]}', b"text"])
def test_a_list_that_is_none(pair: Adapters, second: FaultProxy, content: bytes) -> None:
    second.faults["/v1/models"] = Fault(garble=lambda _: content)
    with pytest.raises(ResponseError, match=f"{second.url}/v1/models gave no list of models"):
        pair.names()


def test_a_server_that_is_gone(
    lora: Adapters,
    lora_service: AsyncSGLang,
    second: FaultProxy,
    client: Callable[..., ControlClient],
    folders: dict[str, Path],
) -> None:
    with FaultProxy(second.target) as gone:
        dead = client(gone.url)
    lora.load("a", folders["a"])
    pair = Adapters([dead, *lora_service.workers])
    pair.check(["a"])  # a router sends nothing there either
    with pytest.raises(InputError, match="'b' is not loaded on"):
        pair.check(["b"])
    for refused in (pair.names, lambda: Adapters([dead]).check(["a"])):
        with pytest.raises(ConnectError, match="nothing answers"):
            refused()


# Before a request


def test_sglang_loads_an_unloaded_adapter_again(
    lora: Adapters,
    lora_service: AsyncSGLang,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `check` is there for."""
    monkeypatch.setattr(adapters, "LIST_VALID_S", 0.0)
    another = Adapters(lora_service.workers)
    lora.load("a", folders["a"])
    lora.check([None, "a"])
    another.unload("a")
    with pytest.raises(InputError, match=r"'a' is not loaded.*lora\.load\('a', folder\)"):
        lora.check([None, "a"])
    assert len(sample(lora_service, LORA_PROMPTS[:1], ["a"])[0]["output_ids"]) == 16
    assert lora.names() == ("a",)


def test_an_empty_name_before_a_request(lora: Adapters) -> None:
    with pytest.raises(InputError, match="leave it None"):
        lora.check([""])


def test_the_list_is_asked_for_once_in_a_while(
    pair: Adapters,
    lora: Adapters,
    second: FaultProxy,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "LIST_VALID_S", 1000.0)
    for name in ("a", "b"):
        lora.load(name, folders[name])

    def requests_of(names: list[str | None]) -> int:
        second.seen.clear()
        pair.check(names)
        return len(second.seen)

    assert requests_of([None, None]) == 0
    assert requests_of(["a", None, "a"]) == 1
    assert requests_of(["a"]) == 0
    assert requests_of(["a", "b"]) == 1
    assert requests_of(["b", "a"]) == 0
    monkeypatch.setattr(adapters, "LIST_VALID_S", 0.0)
    assert requests_of(["a", "b"]) == 1


def test_an_unload_is_noticed_at_once(
    lora: Adapters, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "LIST_VALID_S", 1000.0)
    lora.load("a", folders["a"])
    lora.check(["a"])
    lora.unload("a")
    with pytest.raises(InputError, match="'a' is not loaded"):
        lora.check(["a"])


def test_an_unload_under_way_is_noticed(
    pair: Adapters,
    second: FaultProxy,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "LIST_VALID_S", 1000.0)
    first = Adapters(pair._workers[:1])
    first.load("a", folders["a"])
    pair.check(["a"])
    second.faults[UNLOAD] = Fault(delay_s=5.0)
    under_way = threading.Thread(target=pair.unload, args=("a",))
    under_way.start()
    wait_until(lambda: not first.names(), 4.0)
    assert under_way.is_alive()
    with pytest.raises(InputError, match="'a' is not loaded"):
        pair.check(["a"])
    under_way.join()
