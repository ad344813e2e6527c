"""Weight pushes into the real server, over real gloo."""

from __future__ import annotations

from helpers.asserts import error_of
from helpers.prompts import EIGHT_PROMPTS
from helpers.servers import Connect
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import (
    needs,
    needs_version_spans,
    num_running,
    perturb,
    ready_weights,
    told,
    wait_until,
    worst_error,
)
from tensordict import TensorDict
from torchrl.modules.llm.policies import TransformersWrapper

from torchrl_sglang import AsyncSGLang, ServiceState, SGLangWeightSyncScheme, WeightSyncConfig
from torchrl_sglang.errors import (
    ConfigError,
    NotConnectedError,
    PortTakenError,
    PushError,
    ServiceBrokenError,
    TopologyError,
    VerificationError,
    WeightsError,
)
from torchrl_sglang.servers.together import Engines
from torchrl_sglang.weights.carry.broadcast import Broadcast


SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}
STEPS = {
    "init": "/init_weights_update_group",
    "pause": "/pause_generation",
    "flush": "/flush_cache",
    "begin": "/begin_weight_update",
    "transfer": "/update_weights_from_distributed",
    "end": "/end_weight_update",
    "verify": "/weights_checker",
    "version": "/update_weight_version",
    "continue": "/continue_generation",
}


def test_a_push_arrives(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected()
    before = error_of(service, perturb(model, seed=1, scale=0.2), EIGHT_PROMPTS, SAMPLING)
    assert before > 0.1  # the new weights are far from the old, so a push that did nothing shows
    scheme.send(model)
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02
    push = scheme.last_push
    assert push is not None
    assert push.verified_by == "checksum"
    assert push.num_bytes == 2 * sum(p.numel() for p in model.parameters())  # tied weights once
    completion = service.generate([5, 6], {"max_new_tokens": 2})
    assert [span.version for span in completion.version_spans] == [str(push.version)]
    assert service.weight_version == str(push.version)


def test_versions_count_up(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected()
    versions = []
    for _ in range(3):
        scheme.send(model)
        versions.append(scheme.last_push.version)  # type: ignore[union-attr]
    assert versions == [versions[0], versions[0] + 1, versions[0] + 2]


def as_compiled_names(model: Any) -> dict[str, torch.Tensor]:
    return {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}


def as_ddp_names(model: Any) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


def as_wrapper(model: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)


FORMS = {
    "module": lambda model: model,
    "state_dict": lambda model: model.state_dict(),
    "tensordict": lambda model: TensorDict.from_module(model),
    "tensordict_data": lambda model: TensorDict.from_module(model).data,
    "wrapper": as_wrapper,
    "wrapper_tensordict": lambda model: TensorDict.from_module(as_wrapper(model)),
    "wrapper_state_dict": lambda model: as_wrapper(model).state_dict(),
    "float32": lambda model: model.float(),
    "compiled_names": as_compiled_names,
    "ddp_names": as_ddp_names,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights(
    service: AsyncSGLang, model: Any, connected: Connect, form: str
) -> None:
    scheme = connected()
    scheme.send(FORMS[form](perturb(model, seed=2)))
    assert error_of(service, model.bfloat16(), EIGHT_PROMPTS, SAMPLING) < 0.02


def test_the_registered_model(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected()
    scheme.register_model(perturb(model, seed=3))
    scheme.send()
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02


def test_many_small_buckets(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected(config=WeightSyncConfig(bucket_bytes=20_000))
    scheme.send(perturb(model, seed=4))
    assert scheme.last_push.num_buckets > 10  # type: ignore[union-attr]
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02


def test_a_prefix_cached_before_the_push_is_not_used_after(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    scheme = connected()
    prompt = list(range(100, 164))
    service.generate(prompt, SAMPLING)
    assert service.generate(prompt, SAMPLING).cached_tokens > 32
    scheme.send(perturb(model, seed=5))
    completion = service.generate(prompt, SAMPLING)
    assert completion.cached_tokens == 0
    assert worst_error(model, [prompt], [completion]) < 0.02
    assert service.generate(prompt, SAMPLING).cached_tokens > 32  # hits within a version go on


def test_without_salt_and_flush_stale_prefixes_would_be_used(
    service: AsyncSGLang, model: Any, connected: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above guards against does happen, so it can fail."""
    monkeypatch.setattr(AsyncSGLang, "_cache_salt", lambda self, version: "always the same")
    scheme = connected(config=WeightSyncConfig(flush_cache=False))
    prompt = list(range(100, 164))
    service.generate(prompt, SAMPLING)
    scheme.send(perturb(model, seed=6))
    assert service.generate(prompt, SAMPLING).cached_tokens > 32


@pytest.mark.parametrize("pause_mode", ["retract", "in_place", "abort"])
def test_requests_posted_during_a_push(
    service: AsyncSGLang,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
    pause_mode: Any,
) -> None:
    """They wait, and what they return was sampled by the new weights."""
    scheme = connected(config=WeightSyncConfig(pause_mode=pause_mode))
    perturb(model, seed=7)
    paused, results = threading.Event(), []
    original = Engines.begin

    def begin_when_others_wait(engines: Engines) -> None:
        paused.set()
        time.sleep(0.3)  # the others post into the pause
        original(engines)

    def generate() -> None:
        assert paused.wait(20.0)
        results.append(service.generate(EIGHT_PROMPTS, SAMPLING))

    monkeypatch.setattr(Engines, "begin", begin_when_others_wait)
    thread = threading.Thread(target=generate)
    thread.start()
    scheme.send(model)
    thread.join(60.0)
    assert worst_error(model, EIGHT_PROMPTS, results[0]) < 0.02


def test_requests_in_flight_when_a_push_comes(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    """They go on under the new weights, and every token says which weights sampled it."""
    scheme = connected()
    long = {"max_new_tokens": 1200, "ignore_eos": True}
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(service.generate(EIGHT_PROMPTS[:4], long)))
    thread.start()
    wait_until(lambda: num_running(service) >= 4, 20.0)  # each has a token by then
    scheme.send(perturb(model, seed=8))
    thread.join(120.0)
    assert len(results) == 4
    assert all(len(completion.output_ids) == 1200 for completion in results)
    needs_version_spans(service)
    for completion in results:
        versions = [span.version for span in completion.version_spans]
        assert len(versions) == 2
        assert versions[1] == str(scheme.last_push.version)  # type: ignore[union-attr]


SECOND_PROCESS = """
import json, pickle, sys
service = pickle.loads(bytes.fromhex(sys.argv[1]))
prompts, sampling = json.loads(sys.argv[2])
answers = service.generate(prompts, sampling)
print(json.dumps([service.weight_version, [[c.output_ids, c.log_probs] for c in answers]]))
service.shutdown()
"""


def test_a_second_process_right_after_a_push(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    from types import SimpleNamespace

    scheme = connected()
    service.generate(EIGHT_PROMPTS, SAMPLING)  # the old weights' prefixes are cached
    scheme.send(perturb(model, seed=9))
    command = [
        sys.executable,
        "-c",
        SECOND_PROCESS,
        pickle.dumps(service).hex(),
        json.dumps([EIGHT_PROMPTS, SAMPLING]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120.0, check=True)
    version, rows = json.loads(done.stdout.splitlines()[-1])
    completions = [SimpleNamespace(output_ids=ids, log_probs=values) for ids, values in rows]
    assert version == str(scheme.last_push.version)  # type: ignore[union-attr]
    assert worst_error(model, EIGHT_PROMPTS, completions) < 0.02


def test_verification_by_probe(service: AsyncSGLang, model: Any, connected: Connect) -> None:
    scheme = connected(config=WeightSyncConfig(verify_method="probe"))
    scheme.send(perturb(model, seed=10))
    assert scheme.last_push.verified_by == "probe"  # type: ignore[union-attr]
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02


# What goes wrong


@pytest.mark.parametrize("method", ["checksum", "probe"])
def test_garbled_weights_are_noticed(
    proxied: AsyncSGLang,
    model: Any,
    connected: Connect,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
) -> None:
    """The server answers 200 to every step, but holds something else: one norm is larger."""
    scheme = connected(proxied, config=WeightSyncConfig(verify_method=method))
    perturb(model, seed=11, scale=0.5)
    transfer = Broadcast.transfer

    def transfer_other_weights(carrier: Broadcast, buckets: Any, weights: Any, timer: Any) -> str:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed["model.norm.weight"] *= 1.5
        return transfer(carrier, buckets, changed, timer)

    monkeypatch.setattr(Broadcast, "transfer", transfer_other_weights)
    with pytest.raises(VerificationError):
        scheme.send(model)
    assert proxied.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError):
        proxied.generate([5, 6], {"max_new_tokens": 2})


@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut"])
@pytest.mark.parametrize("step", [step for step in STEPS if step != "init"])
def test_a_step_that_fails(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    step: str,
    cut: bool,
) -> None:
    """The error comes within seconds, nothing generates, and the next push repairs everything."""
    # Older servers have no begin and end, and may refuse a flush, which is no failure there.
    if step in ("begin", "end", "flush"):
        needs(proxied, "update_session")
    scheme = connected(proxied)
    perturb(model, seed=12)
    proxy.faults[STEPS[step]] = Fault(cut=True) if cut else Fault(status=400)
    start = time.monotonic()
    with pytest.raises(PushError) as caught:
        scheme.send(model)
    assert time.monotonic() - start < 5.0
    assert caught.value.step == step
    assert caught.value.engine == proxy.url
    assert caught.value.bucket == (0 if step == "transfer" else None)
    assert proxied.state is ServiceState.BROKEN
    with pytest.raises(ServiceBrokenError, match=step):
        proxied.generate([5, 6], {"max_new_tokens": 2})
    proxy.faults.clear()
    scheme.send(model)
    assert proxied.state is ServiceState.SYNCED
    assert error_of(proxied, model, EIGHT_PROMPTS, SAMPLING) < 0.02


def test_a_server_that_refuses_to_join(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, restore_weights: None
) -> None:
    proxy.faults[STEPS["init"]] = Fault(status=400)
    scheme = SGLangWeightSyncScheme(proxied)
    scheme.init_on_sender()
    start = time.monotonic()
    with pytest.raises(PushError, match="injected fault") as caught:
        scheme.connect()
    assert time.monotonic() - start < 5.0
    assert (caught.value.step, caught.value.engine) == ("init", proxy.url)
    assert proxied.state is ServiceState.SYNCED  # nothing was touched
    proxy.faults.clear()
    scheme.connect()
    scheme.send(model)
    scheme.close()


def test_a_session_that_a_dead_trainer_left_open(
    service: AsyncSGLang, model: Any, connected: Connect
) -> None:
    needs(service, "update_session")
    scheme = connected()
    told(service.workers[0], "/begin_weight_update")
    scheme.send(perturb(model, seed=13))
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02


def without(name: str) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[name]

    return change


def replaced(name: str, make: Any) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name] = make(state.get(name))

    return change


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without(NORM), "missing: model.norm.weight"),
        (replaced("model.norm.wait", lambda _: torch.zeros(3)), "model.norm.wait"),
        (replaced(NORM, lambda t: t[:-1]), "shape"),
        (replaced(NORM, lambda t: t.int()), "dtype"),
        (replaced(NORM, lambda t: t.to(torch.float8_e4m3fn)), "dtype"),
        (replaced(NORM, lambda t: t.to("meta")), "meta"),
        (replaced(NORM, lambda t: t.tolist()), "no tensors"),
        (lambda state: state.clear(), "empty"),
    ],
    ids=["missing", "unknown", "shape", "int", "fp8", "meta", "list", "empty"],
)
def test_wrong_weights_touch_nothing(
    proxied: AsyncSGLang,
    proxy: FaultProxy,
    model: Any,
    connected: Connect,
    change: Any,
    match: str,
) -> None:
    scheme = connected(proxied)
    state = dict(model.state_dict())
    change(state)
    proxy.seen.clear()
    with pytest.raises(WeightsError, match=match):
        scheme.send(state)
    assert not [path for path, _ in proxy.seen if path in STEPS.values()]
    assert proxied.state is ServiceState.SYNCED


def test_no_weights(connected: Connect) -> None:
    with pytest.raises(WeightsError, match="no weights"):
        connected().send()


def test_a_push_before_connect(service: AsyncSGLang, model: Any) -> None:
    """`test_connecting` has the scheme's, which connects by itself."""
    with pytest.raises(NotConnectedError, match="init_weight_update_group"):
        service.update_weights(model.state_dict().items())


def test_worker_ids_name_every_worker(model: Any, connected: Connect) -> None:
    scheme = connected()
    scheme.init_on_sender(num_workers=2)
    for some in (0, [0], [2], [0, 2], [0, 0, 1], []):
        with pytest.raises(ConfigError, match=r"worker_ids=.* every worker .*\[0, 1\]"):
            scheme.send(model, worker_ids=some)
    scheme.send(model, worker_ids=[1, 0])
    scheme.init_on_sender()
    for every in (0, [0], (0,)):
        scheme.send(model, worker_ids=every)


def test_a_port_that_is_taken(service: AsyncSGLang) -> None:
    port = int(service.workers[0].url.rpartition(":")[2])
    scheme = SGLangWeightSyncScheme(service, master_port=port)
    scheme.init_on_sender()
    with pytest.raises(PortTakenError, match=str(port)):
        scheme.connect()


EXIT_WITHOUT_CLOSE = """
import pickle, sys, time
from torchrl_sglang import SGLangWeightSyncScheme
service = pickle.loads(bytes.fromhex(sys.argv[1]))
scheme = SGLangWeightSyncScheme(service)
scheme.init_on_sender()
scheme.connect()
if sys.argv[2] == "collected":
    del scheme
print("done", flush=True)
"""


@pytest.mark.parametrize("end", ["exit", "collected"])
def test_a_trainer_that_closes_nothing_ends_all_the_same(
    service: AsyncSGLang, model: Any, connected: Connect, end: str
) -> None:
    command = [sys.executable, "-c", EXIT_WITHOUT_CLOSE, pickle.dumps(service).hex(), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    connected().send(model)  # the servers are there for the next trainer


def test_wrong_arguments(service: AsyncSGLang) -> None:
    with pytest.raises(ConfigError, match="not both"):
        SGLangWeightSyncScheme(service, server_url=service.server_url)
    with pytest.raises(ConfigError, match="num_gpus=2"):
        SGLangWeightSyncScheme(service, num_gpus=2)


def test_data_parallel_servers_are_refused(proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    proxy.faults["/server_info"] = Fault(
        garble=lambda content: json.dumps({**json.loads(content), "dp_size": 2}).encode()
    )
    proxied.refresh()
    for method in ("broadcast", "tensor"):
        with pytest.raises(TopologyError, match="num_replicas"):
            SGLangWeightSyncScheme(proxied, config=WeightSyncConfig(method=method))


def test_the_engine_takes_weights_itself(
    service: AsyncSGLang, model: Any, model_path: Path
) -> None:
    metadata = service.get_model_metadata()
    assert metadata[NORM] == (torch.bfloat16, torch.Size([128]))
    assert "lm_head.weight" not in metadata  # tied
    perturb(model, seed=14)
    service.init_weight_update_group()
    service.update_weights(iter(model.state_dict().items()))
    assert error_of(service, model, EIGHT_PROMPTS, SAMPLING) < 0.02
    service._pusher.close()  # type: ignore[union-attr]
    ready_weights(service, model_path)
