"""Pushes of LoRA adapters arrive: compared with forwards of the merged models."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, set_list_to_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.modules.llm.policies import TransformersWrapper

from helpers.adapters import attach, generated, is_run, requests_of, versions
from helpers.collectors import SAMPLING, make_env
from helpers.fault_proxy import FaultProxy
from helpers.lora_files import merge_adapter, random_adapter
from helpers.paths import ROOT
from helpers.peft_models import base_model, merged, peft_model, train
from helpers.processes import until
from helpers.prompts import LORA_PROMPTS
from helpers.servers import asked, worst_error
from torchrl_sglang import (
    AsyncSGLang,
    GenerateRequest,
    SGLangWeightSyncScheme,
    SGLangWrapper,
    WeightSyncConfig,
)
from torchrl_sglang.errors import InputError, WeightsError
from torchrl_sglang.servers import lora as adapters
from torchrl_sglang.servers.gate import ServiceState
from torchrl_sglang.weights.lora import loaded as adapter_room
from torchrl_sglang.weights.lora.load import prepared
from torchrl_sglang.weights.lora.source import read_adapter

Push = Callable[..., SGLangWeightSyncScheme]


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


@pytest.mark.slow
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
    text = (ROOT / "docs/source/weight_sync.rst").read_text()
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
