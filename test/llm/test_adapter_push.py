"""Pushes of LoRA adapters to a real server, compared with forwards of the merged models."""

from __future__ import annotations

from helpers.prompts import LORA_PROMPTS
from helpers.servers import client_like
from helpers.servers import connect_like
import copy
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_proxy import Fault, FaultProxy
from helpers.lora_files import merge_adapter, random_adapter
from helpers.peft_models import base_model, merged, peft_model, train
from helpers.servers import asked, worst_error
from tensordict import TensorDict, set_list_to_stack
from test_collector import SAMPLING, make_env
from torchrl.collectors.llm import LLMCollector
from torchrl.modules.llm.policies import TransformersWrapper

from torchrl_sglang import (
    AsyncSGLang,
    GenerateRequest,
    SamplingParams,
    SGLangWeightSyncScheme,
    SGLangWrapper,
    WeightSyncConfig,
)
from torchrl_sglang.errors import (
    ConfigError,
    EngineLostError,
    InputError,
    NotConnectedError,
    PushError,
    PushTimeoutError,
    ServiceBrokenError,
    UnsupportedOptionError,
    VerificationError,
    VersionError,
    WeightsError,
)
from torchrl_sglang.servers import lora as adapters
from torchrl_sglang.servers.control import ControlClient
from torchrl_sglang.servers.gate import ServiceState
from torchrl_sglang.weights.lora import room as adapter_room
from torchrl_sglang.weights.lora.load import prepared
from torchrl_sglang.weights.lora.source import read_adapter

FROM_TENSORS, FROM_FOLDER = "/load_lora_adapter_from_tensors", "/load_lora_adapter"
UNLOAD, VERSION = "/unload_lora_adapter", "/update_weight_version"

Push = Callable[..., SGLangWeightSyncScheme]


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Polls until a condition holds; its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)
    return value


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old versions go as soon as nobody uses them, and lists are asked for anew each time."""
    monkeypatch.setattr(adapter_room, "KEPT_S", 0.0)
    monkeypatch.setattr(adapters, "LIST_VALID_S", 0.0)


@pytest.fixture
def service(special_service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    """The server with LoRA; no adapter is loaded before or after."""
    yield special_service
    until(
        lambda: not asked(special_service.workers[0], "/v1/loads")["loads"][0]["num_running_reqs"]
    )
    while names := special_service.lora.names():
        for name in names:
            try:
                special_service.lora.unload(name)
            except ConfigError:  # an unload of a push was faster
                continue


@pytest.fixture
def connected(service: AsyncSGLang) -> Iterator[Push]:
    """Makes schemes that push adapters, and closes them."""
    made: list[SGLangWeightSyncScheme] = []

    def connect(to: AsyncSGLang | None = None, **config: Any) -> SGLangWeightSyncScheme:
        chosen = WeightSyncConfig(method="lora", **config)
        scheme = SGLangWeightSyncScheme(to or service, config=chosen)
        made.append(scheme)
        scheme.init_on_sender()
        scheme.connect()
        return scheme

    yield connect
    for scheme in made:
        scheme.close()


@pytest.fixture
def front(service: AsyncSGLang) -> Iterator[FaultProxy]:
    """A proxy in front of the server, which passes everything on until told otherwise."""
    with FaultProxy(service.workers[0].url) as running:
        yield running


def attach(url: str, service: AsyncSGLang, **timeouts: float) -> AsyncSGLang:
    """Another service on the same server, which knows nothing of what the first one did."""
    return connect_like(service, url, timeouts=replace(service.timeouts, **timeouts),
    )


@pytest.fixture
def proxied(front: FaultProxy, service: AsyncSGLang) -> Iterator[AsyncSGLang]:
    """A service that reaches the server through the proxy, and waits 3 s at most for a load."""
    with attach(front.url, service, transfer_s=3.0, control_s=3.0) as external:
        front.seen.clear()
        yield external


@pytest.fixture
def model(model_path: Path) -> Any:
    return peft_model(model_path, seed=1)


@pytest.fixture(scope="module")
def base(model_path: Path) -> Any:
    return base_model(model_path)


def requests_of(
    lora: str | None, prompts: Sequence[Sequence[int]] = LORA_PROMPTS, **sampling: Any
) -> Any:
    usual = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    params = SamplingParams(**{**usual, **sampling})
    return [GenerateRequest(input_ids=tuple(p), sampling=params, lora=lora) for p in prompts]


def generated(service: AsyncSGLang, lora: str | None = "policy") -> Any:
    return service.generate(requests_of(lora))


def is_run(service: AsyncSGLang, model: Any, lora: str | None = "policy") -> bool:
    """Whether what is generated is of that model, by every log-prob."""
    return worst_error(model, LORA_PROMPTS, generated(service, lora)) < 0.02


def versions(completions: Any) -> set[str]:
    return {span.version for one in completions for span in one.version_spans}


# Pushing


def test_pushes_one_after_the_other(
    service: AsyncSGLang, connected: Push, model: Any, base: Any
) -> None:
    scheme = connected()
    first = 0
    assert is_run(service, base, None)
    for seed in (1, 2, 3, 4):
        before = merged(model)
        train(model, seed)
        scheme.send(model)
        done = scheme.last_push
        assert done is not None
        first = first or done.version
        assert done.version == first + seed - 1
        assert service.weight_version == str(done.version)
        assert (done.method, done.verified_by) == ("lora", "probe")
        assert (done.paused_s, done.flushed, done.lost_engines) == (0.0, False, ())
        assert done.num_bytes == 2 * sum(
            p.numel() for n, p in model.named_parameters() if "lora_" in n
        )
        assert set(done.step_s) == {"room", "load", "verify", "version"}
        assert 0 < done.push_s <= done.step_s["load"] + 0.01 < done.total_s
        completions = generated(service)
        assert worst_error(merged(model), LORA_PROMPTS, completions) < 0.02
        assert versions(completions) == {str(done.version)}
        others = [base] if seed == 1 else [base, before]
        assert min(worst_error(other, LORA_PROMPTS, completions) for other in others) > 0.1
        kept = [v for v in (done.version - 1, done.version) if v >= first]
        until(
            lambda kept=kept: (
                service.lora.names() == tuple(f"policy@{v}" for v in sorted(kept, key=str))
            )
        )
    assert is_run(service, base, None)
    assert service.state is ServiceState.SYNCED


def test_a_fresh_adapter_changes_nothing(
    service: AsyncSGLang, connected: Push, model_path: Path, base: Any
) -> None:
    connected().send(peft_model(model_path))
    assert is_run(service, base)


def test_nothing_is_paused_and_requests_keep_their_version(
    service: AsyncSGLang, connected: Push, model: Any, base: Any
) -> None:
    """Over three pushes, of which each would otherwise unload what the request runs under."""
    scheme = connected()
    scheme.send(model)
    first, models = scheme.last_push.version, [merged(model)]  # type: ignore[union-attr]
    endless = [
        replace(request, partial_allowed=True)
        for name in ("policy", None)
        for request in requests_of(name, LORA_PROMPTS[:1], max_new_tokens=2000)
    ]
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(service.generate, endless)
        until(lambda: asked(service.workers[0], "/v1/loads")["loads"][0]["num_running_reqs"] == 2)
        for seed in (2, 3, 4):
            train(model, seed)
            scheme.send(model)
            models.append(merged(model))
            completions = generated(service)
            assert worst_error(models[-1], LORA_PROMPTS, completions) < 0.02
            assert versions(completions) == {service.weight_version}
        assert not under_way.done()
        assert f"policy@{first}" in service.lora.names()
        service.abort()
        completion, of_base = under_way.result(60)
    assert completion.finish_type == of_base.finish_type == "abort"
    assert worst_error(models[0], LORA_PROMPTS[:1], [completion]) < 0.02
    assert versions([completion]) == {str(first)}
    assert worst_error(base, LORA_PROMPTS[:1], [of_base]) < 0.02
    assert {str(first), service.weight_version} <= versions([of_base])
    scheme.send(train(model, 5))
    until(lambda: f"policy@{first}" not in service.lora.names())


def test_every_way_to_generate(service: AsyncSGLang, connected: Push, model: Any) -> None:
    scheme = connected()
    scheme.send(model)
    version = service.weight_version
    samples = service.generate(requests_of("policy", n=2, temperature=1.0))
    assert len(samples) == 6
    assert versions(samples) == {version}
    # The server computes the adapter apart, which rounds more in bf16 than one merged matrix.
    assert worst_error(merged(model), [p for p in LORA_PROMPTS for _ in range(2)], samples) < 0.04
    batch = requests_of("policy")
    each = [group[0] for group in service.complete_each(batch)]
    early = [one for _, group in service.as_completed(batch) for one in group]
    assert versions([*each, *early]) == {version}
    assert {request.lora for request in batch} == {"policy"}
    exact = generated(service, f"policy@{version}")
    assert [one.output_ids for one in exact] == [one.output_ids for one in each]
    score = [GenerateRequest(input_ids=tuple(LORA_PROMPTS[0]), scoring=True, lora="policy")]
    [scored] = service.generate(score)
    assert scored.version_spans[0].version == version
    ids = torch.tensor([LORA_PROMPTS[0]])
    with torch.no_grad():
        logits = merged(model)(ids).logits[0, :-1].float().log_softmax(-1)
    ours = logits.gather(-1, ids[0, 1:, None]).squeeze(-1)
    assert (torch.tensor(scored.input_log_probs[1:]) - ours).abs().max() < 0.05


def test_the_trainers_model_is_left_as_it_was(connected: Push, model: Any) -> None:
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    connected().send(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads


def test_other_sources(
    service: AsyncSGLang,
    connected: Push,
    model: Any,
    model_path: Path,
    tmp_path: Path,
    tokenizer: Any,
) -> None:
    scheme = connected()
    with pytest.raises(WeightsError, match="without a PEFT model that it belongs to"):
        scheme.send({})
    scheme.register_model(model)
    other = train(copy.deepcopy(model), 2)
    mapping = {n: p.detach() for n, p in other.named_parameters() if "lora_" in n}
    for given in (
        mapping,
        TensorDict.from_module(other).data,
        TransformersWrapper(other, tokenizer=tokenizer),
    ):
        scheme.send(given)
        assert scheme.last_push.verified_by == "probe"  # type: ignore[union-attr]
        assert is_run(service, merged(other))
    scheme.send()
    assert is_run(service, merged(model))
    folder = random_adapter(tmp_path / "adapter", base_model(model_path), seed=3)
    for path in (folder, str(folder)):
        scheme.send(path)
        assert scheme.last_push.verified_by == "nothing"  # type: ignore[union-attr]
        assert is_run(service, merge_adapter(base_model(model_path), folder))
    other.save_pretrained(tmp_path / "saved")
    scheme.send(tmp_path / "saved")
    assert is_run(service, merged(other))


def test_all_linear_layers_of_one_block(
    service: AsyncSGLang, connected: Push, model_path: Path
) -> None:
    """Beside a full one, whose values must not stay in the layers that this one leaves alone."""
    scheme = connected()
    whole = peft_model(model_path, seed=2, r=16, target_modules="all-linear")
    train(whole, 2, scale=0.05)
    scheme.send(whole)
    assert is_run(service, merged(whole))
    part = peft_model(model_path, seed=3, r=4, layers_to_transform=[1])
    scheme.send(part)
    assert is_run(service, merged(part))


# Other processes


CHILD = """
import json, pickle, sys
from torchrl_sglang import GenerateRequest, SamplingParams
service = pickle.loads(bytes.fromhex(sys.stdin.read()))
params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
request = GenerateRequest(input_ids=(5, 6, 7, 8), sampling=params, lora="policy")
[completion] = service.generate([request])
print(json.dumps([completion.output_ids, completion.weight_version, service.lora.names()]))
service.shutdown()
"""


def test_another_process(service: AsyncSGLang, connected: Push, model: Any) -> None:
    scheme = connected()
    for seed in (1, 2):
        scheme.send(train(model, seed))
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=pickle.dumps(service).hex(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids, version, names = json.loads(done.stdout)
    assert ids == generated(service)[0].output_ids
    assert version == service.weight_version
    assert names == list(service.lora.names())


def test_the_process_that_pushes_asks_nobody(
    proxied: AsyncSGLang,
    front: FaultProxy,
    connected: Push,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "LIST_VALID_S", 60.0)
    scheme = connected(proxied)
    for seed in (1, 2):
        scheme.send(train(model, seed))
        front.seen.clear()
        assert is_run(proxied, merged(model))
        assert {path for path, _ in front.seen} == {"/generate"}


def test_a_copy_uses_what_is_committed(
    service: AsyncSGLang,
    connected: Push,
    model: Any,
    front: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme = connected()
    with attach(front.url, service) as copied:
        with pytest.raises(InputError, match="'policy' is not loaded"):
            generated(copied)
        scheme.send(model)
        old = int(service.weight_version)
        assert is_run(copied, merged(model))
        # As while a push is under way, after the load and before the version.
        source = read_adapter(model, None, server_urls=[], finite=False)
        with prepared(source, f"policy@{old + 1}", service.cluster.infos, None) as load:
            load.post(service.workers[0], 20.0)
        assert f"policy@{old + 1}" in copied.lora.names()
        assert versions(generated(copied)) == versions(generated(service)) == {str(old)}
        scheme.send(train(model, 2))  # which finds the name taken, by a push that came to nothing
        assert is_run(copied, merged(model))
        monkeypatch.setattr(adapters, "LIST_VALID_S", 60.0)
        generated(copied)
        front.seen.clear()
        scheme.send(train(model, 3))
        for _ in range(3):
            assert versions(generated(copied)) == {str(old + 1)}  # not lately asked: the one before
        assert [path for path, _ in front.seen].count("/v1/models") == 0
        monkeypatch.setattr(adapters, "LIST_VALID_S", 0.0)
        assert is_run(copied, merged(model))


def test_a_copy_may_be_behind(
    service: AsyncSGLang, connected: Push, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process has seen in the servers' list a moment ago is not unloaded yet."""
    monkeypatch.setattr(adapter_room, "KEPT_S", 60.0)
    scheme = connected()
    for seed in (1, 2, 3, 4):
        scheme.send(train(model, seed))
    assert len(service.lora.names()) == 4


# Failures


@pytest.mark.parametrize(
    ("path", "fault", "kind", "step"),
    [
        (FROM_TENSORS, Fault(status=400, body='{"error_message": "too large"}'), PushError, "load"),
        (FROM_TENSORS, Fault(status=500), PushError, "load"),
        (FROM_TENSORS, Fault(cut=True), PushError, "load"),
        (FROM_TENSORS, Fault(lose=True), PushError, "load"),
        (FROM_TENSORS, Fault(delay_s=30.0), PushTimeoutError, "load"),
        ("/v1/models", Fault(status=500), PushError, "room"),
        ("/generate", Fault(status=500), PushError, "verify"),
        ("/generate", Fault(delay_s=30.0), PushTimeoutError, "verify"),
        ("/generate", Fault(garble=lambda _: b"{}"), PushError, "verify"),
        (VERSION, Fault(status=500), PushError, "version"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_push_that_fails(
    proxied: AsyncSGLang,
    front: FaultProxy,
    connected: Push,
    model: Any,
    path: str,
    fault: Fault,
    kind: type,
    step: str,
) -> None:
    scheme = connected(proxied)
    scheme.send(model)
    version, names, before = proxied.weight_version, proxied.lora.names(), merged(model)
    front.faults[path] = fault
    with pytest.raises(kind) as caught:
        scheme.send(train(model, 2))
    front.faults.clear()
    assert caught.value.step == step  # type: ignore[attr-defined]
    assert caught.value.engine == front.url  # type: ignore[attr-defined]
    assert not isinstance(caught.value, EngineLostError)
    assert proxied.lora.names() == names
    assert (proxied.weight_version, proxied.state) == (version, ServiceState.SYNCED)
    completions = generated(proxied)
    assert worst_error(before, LORA_PROMPTS, completions) < 0.02
    assert versions(completions) == {version}
    scheme.send(model)
    assert is_run(proxied, merged(model))


def test_an_error_says_what_sglang_said(connected: Push, model_path: Path, model: Any) -> None:
    scheme = connected()
    big = peft_model(model_path, r=32)
    with pytest.raises(
        PushError, match=r"step 'load'.*answered 400: .*rank 32.*max-lora-rank"
    ) as caught:
        scheme.send(big)
    assert "success" not in str(caught.value)
    assert "no server has 'policy@" in caught.value.__notes__[0]
    scheme.send(model)


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_a_mismatch(
    service: AsyncSGLang, connected: Push, model: Any, front: FaultProxy, later: bool
) -> None:
    scheme = connected()
    if later:
        scheme.send(model)
    names = service.lora.names()
    wrong = copy.deepcopy(model)
    with torch.no_grad():  # the trainer's base is not the one that is served
        wrong.base_model.model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    with pytest.raises(VerificationError, match="scores a probe differently") as caught:
        scheme.send(train(wrong, 2))
    assert "no server has" in caught.value.__notes__[0]
    assert service.lora.names() == names
    assert service.state is ServiceState.SYNCED
    if later:
        assert is_run(service, merged(model))
    else:
        with pytest.raises(InputError, match="'policy' is not loaded"):
            generated(service)
    scheme.send(train(model, 3))
    assert is_run(service, merged(model))


def test_what_failed_and_could_not_be_taken_back(
    proxied: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    scheme = connected(proxied)
    scheme.send(model)
    version = int(proxied.weight_version)
    front.faults[VERSION] = Fault(lose=True, times=1)  # the server takes it, and nobody knows
    front.faults[UNLOAD] = Fault(status=500, times=1)
    with pytest.raises(PushError, match="step 'version'") as caught:
        scheme.send(train(model, 2))
    assert f"may have 'policy@{version + 1}' now: the next push" in caught.value.__notes__[0]
    assert f"policy@{version + 1}" in proxied.lora.names()
    assert versions(generated(proxied)) == {str(version)}
    scheme.send(train(model, 3))
    assert scheme.last_push.version == version + 2  # type: ignore[union-attr]
    assert is_run(proxied, merged(model))
    assert proxied.lora.names() == tuple(sorted(f"policy@{v}" for v in (version, version + 2)))


def test_old_versions_that_can_not_be_unloaded(
    proxied: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    scheme = connected(proxied)
    front.faults[UNLOAD] = Fault(status=500)
    for seed in (1, 2, 3, 4):
        scheme.send(train(model, seed))
        assert is_run(proxied, merged(model))
    assert len(proxied.lora.names()) == 4
    front.faults.clear()
    scheme.send(train(model, 5))
    until(lambda: len(proxied.lora.names()) == 2)


class Pair:
    """A service of two servers, of which the second is a proxy in front of the first.

    What the second is to load it must not pass on: they would be in each other's way.
    """

    def __init__(self, service: AsyncSGLang, second: FaultProxy) -> None:
        self.service = attach(service.workers[0].url, service)
        client = client_like(service, second.url)
        cluster = self.service.cluster
        self.service.servers._cluster = replace(
            cluster,
            workers=(*cluster.workers, client),
            infos=(*cluster.infos, replace(cluster.infos[0], url=second.url)),
        )


def test_one_server_of_two_fails(
    service: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    front.faults[FROM_TENSORS] = Fault(status=400, body='{"error_message": "no room"}')
    with Pair(service, front).service as pair:
        scheme = connected(pair)
        with pytest.raises(PushError, match="no room") as caught:
            scheme.send(model)
        assert caught.value.engine == front.url
        assert service.lora.names() == ()
        front.faults[FROM_TENSORS] = Fault(status=200, body="{}")
        front.faults[UNLOAD] = Fault(status=200, body="{}")
        scheme.send(model)
        assert len(service.lora.names()) == 1
    assert [path for path, _ in front.seen].count(FROM_TENSORS) == 2


@pytest.mark.parametrize("lost_engines", ["raise", "drop"])
def test_a_server_is_gone(
    service: AsyncSGLang, connected: Push, model: Any, lost_engines: str
) -> None:
    with FaultProxy(service.workers[0].url) as second:
        pair = Pair(service, second).service
    with pair:
        scheme = connected(pair, lost_engines=lost_engines)
        if lost_engines == "raise":
            with pytest.raises(EngineLostError, match="the engine is gone"):
                scheme.send(model)
            assert service.lora.names() == ()
        else:
            scheme.send(model)
            assert scheme.last_push.lost_engines == (second.url,)  # type: ignore[union-attr]
            assert [worker.url for worker in pair.workers] == [service.workers[0].url]
            assert is_run(pair, merged(model))


# What can't be pushed


def test_refused_before_anything_is_touched(
    proxied: AsyncSGLang, front: FaultProxy, connected: Push, model: Any, base: Any, tmp_path: Path
) -> None:
    scheme = connected(proxied, check_finite=True)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_A" in n).fill_(torch.nan)
    front.seen.clear()
    for source, kind, says in (
        (None, WeightsError, "there is no adapter to push"),
        (base, WeightsError, "can't push an adapter from a Qwen2ForCausalLM"),
        (tmp_path, ConfigError, "is no LoRA adapter"),
        (broken, WeightsError, "NaN or infinity in"),
    ):
        with pytest.raises(kind, match=says):
            scheme.send(source)
    with pytest.raises(VersionError, match="version 0 can't be pushed"):
        scheme.push(model, version=0)
    with pytest.raises(ConfigError, match="pauses nothing"):
        scheme.pusher.push_later(model)
    assert {path for path, _ in front.seen} == {"/model_info"}
    unverified = random_adapter(tmp_path / "a", base, seed=1)
    strict = connected_with(scheme, verify_method="probe")
    with pytest.raises(VerificationError, match="in a folder can't be verified by a probe"):
        strict.push(unverified, version=10_000)
    assert proxied.lora.names() == ()
    scheme.close()
    with pytest.raises(NotConnectedError, match="not connected"):
        scheme.pusher.push(model)


def connected_with(scheme: SGLangWeightSyncScheme, **config: Any) -> Any:
    """The pusher of a scheme with other options."""
    scheme.pusher.config = replace(scheme.pusher.config, **config)
    return scheme.pusher


def test_a_name_of_another_adapter(
    service: AsyncSGLang, connected: Push, model: Any, base: Any, tmp_path: Path
) -> None:
    folder = random_adapter(tmp_path / "a", base, seed=1)
    service.lora.load("actor", folder)
    with pytest.raises(WeightsError, match=r"loaded as 'actor', .*choose another adapter_name"):
        connected(adapter_name="actor").send(model)


def test_a_name_of_ones_own(service: AsyncSGLang, connected: Push, model: Any) -> None:
    connected(adapter_name="actor").send(model)
    assert is_run(service, merged(model), "actor")
    with pytest.raises(InputError, match="'policy' is not loaded"):
        generated(service)


def test_servers_without_lora(shared_service: AsyncSGLang) -> None:
    scheme = SGLangWeightSyncScheme(shared_service, config=WeightSyncConfig(method="lora"))
    with pytest.raises(UnsupportedOptionError, match=r"without LoRA: .*enable_lora=True"):
        scheme.connect()


def test_a_broken_service(service: AsyncSGLang, connected: Push, model: Any) -> None:
    scheme = connected()
    service.gate.fail(PushError("lost", step="load"))
    try:
        with pytest.raises(ServiceBrokenError, match="push the whole model again"):
            scheme.send(model)
    finally:
        service.gate.commit()
    assert service.lora.names() == ()


def test_servers_that_hold_two_adapters(
    service: AsyncSGLang, front: FaultProxy, connected: Push, model: Any, base: Any, tmp_path: Path
) -> None:
    def limited(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), "max_loaded_loras": 2}).encode()

    front.faults["/server_info"] = Fault(garble=limited)
    with attach(front.url, service) as two:
        assert two.info.features.max_adapters == 2
        scheme = connected(two)
        for seed in (1, 2, 3, 4):
            front.seen.clear()
            scheme.send(train(model, seed))
            assert is_run(two, merged(model))
            if seed > 2:  # unloaded before, not after
                order = [path for path, _ in front.seen if path in (UNLOAD, FROM_TENSORS)]
                assert order == [UNLOAD, FROM_TENSORS]
        assert len(two.lora.names()) == 2
        version = int(two.weight_version)
        two.lora.unload(f"policy@{version - 1}")
        two.lora.load("b", random_adapter(tmp_path / "a", base, seed=1))
        with pytest.raises(PushError, match=rf"max_loaded_loras=2 and has 'b', 'policy@{version}'"):
            scheme.send(train(model, 5))
        assert two.lora.names() == ("b", f"policy@{version}")
        two.lora.unload("b")


def test_servers_that_take_no_tensors(
    service: AsyncSGLang, front: FaultProxy, connected: Push, model: Any
) -> None:
    front.faults["/openapi.json"] = Fault(
        garble=lambda content: content.replace(FROM_TENSORS.encode(), b"/something_else")
    )
    with attach(front.url, service) as older:
        assert not older.info.capabilities.adapter_tensors
        front.seen.clear()
        connected(older).send(model)
        bodies = [json.loads(body) for path, body in front.seen if path == FROM_FOLDER]
        loaded = [body["lora_path"] for body in bodies if body]  # an empty one asks for the route
        assert not Path(loaded[0]).exists()
        assert is_run(older, merged(model))


# In a training loop


@pytest.mark.filterwarnings("ignore:Using WeightUpdaterBase is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchrl")
@pytest.mark.filterwarnings("ignore::FutureWarning:torchrl")
@pytest.mark.filterwarnings("ignore::UserWarning:torchrl")
@pytest.mark.filterwarnings("ignore::UserWarning:tensordict")
def test_a_collector(service: AsyncSGLang, tokenizer: Any, model: Any) -> None:
    scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(method="lora"))
    with set_list_to_stack(True):
        collector = LLMCollector(
            make_env(tokenizer),
            policy=SGLangWrapper(service, generate_kwargs=SAMPLING, lora="policy"),
            dialog_turns_per_batch=4,
            total_dialog_turns=400,
            weight_updater=scheme,
            track_policy_version=True,
        )
        try:
            for seed in (1, 2):
                before = max(collector.policy_version, service.servers.highest_version())
                collector.update_policy_weights_(train(model, seed))
                assert collector.policy_version == before + 1
                assert service.weight_version == str(collector.policy_version)
                rows = next(iter(collector)).reshape(-1)
                for row in rows.unbind(0):
                    sampled = row["masks"].all_assistant_mask.bool()
                    found = row["rollout", "policy_version"][sampled]
                    assert set(found.tolist()) == {collector.policy_version}
        finally:
            collector.shutdown()
            scheme.close()


def test_a_sender(service: AsyncSGLang, model: Any) -> None:
    scheme = SGLangWeightSyncScheme(service, config=WeightSyncConfig(method="lora"))
    sender = scheme.create_sender()
    sender.register_model(model)
    sender.init_all_workers_group(None, vllm_engine=service)
    try:
        done = sender.update_weights()
        assert done is not None
        assert str(done.version) == service.weight_version
        assert is_run(service, merged(model))
    finally:
        sender.shutdown()


def test_threads_push_and_generate(service: AsyncSGLang, connected: Push, model: Any) -> None:
    """Every completion is of the version that it says."""
    scheme = connected(verify="first")
    scheme.send(train(model, 1))
    models = {service.weight_version: merged(model)}
    stop, found = threading.Event(), []

    def generate() -> None:
        while not stop.is_set():
            found.extend(zip(LORA_PROMPTS, generated(service), strict=True))

    def seen() -> set[str]:
        return {completion.weight_version for _, completion in list(found)}

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(generate) for _ in range(2)]
        try:
            for seed in (2, 3, 4):
                train(model, seed)
                scheme.send(model)
                models[service.weight_version] = merged(model)
                until(lambda: service.weight_version in seen())
        finally:
            stop.set()
        for run in runs:
            run.result(60)
    assert seen() >= set(list(models)[1:])
    for prompt, completion in found[:: max(1, len(found) // 10)]:
        [span] = completion.version_spans
        assert worst_error(models[span.version], [prompt], [completion]) < 0.02


def test_the_documentation(
    service: AsyncSGLang, model_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs/source/weight_sync.rst").read_text()
    section = text.partition("Adapters only\n---")[2].partition("Without a collector\n---")[0]
    (code,) = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", section)
    started = classmethod(lambda *_, **__: service)
    monkeypatch.setattr(AsyncSGLang, "from_pretrained", started)
    names: dict[str, Any] = {"base_model": copy.deepcopy(base)}
    try:
        exec(re.sub(r"(?m)^   ", "", code), names)
        completion, [loaded] = names["completion"], service.lora.names()
        assert loaded == f"policy@{completion.weight_version}"
    finally:
        names["scheme"].close()
