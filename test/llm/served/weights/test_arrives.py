"""A push arrives: every form of weights, over real gloo, verified."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules.llm.policies import TransformersWrapper

from helpers.asserts import error_of
from helpers.prompts import EIGHT_PROMPTS
from helpers.servers import Connect, perturb, ready_weights, worst_error
from helpers.steps import NORM
from torchrl_sglang import AsyncSGLang, ServiceState, WeightSyncConfig
from torchrl_sglang.errors import ConfigError, ServiceBrokenError, VerificationError
from torchrl_sglang.weights.carry.broadcast import Broadcast

SAMPLING = {"max_new_tokens": 16, "ignore_eos": True}


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


SECOND_PROCESS = """
import json, pickle, sys
service = pickle.loads(bytes.fromhex(sys.argv[1]))
prompts, sampling = json.loads(sys.argv[2])
answers = service.generate(prompts, sampling)
print(json.dumps([service.weight_version, [[c.output_ids, c.log_probs] for c in answers]]))
service.shutdown()
"""


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "collected"])
def test_a_trainer_that_closes_nothing_ends_all_the_same(
    service: AsyncSGLang, model: Any, connected: Connect, end: str
) -> None:
    command = [sys.executable, "-c", EXIT_WITHOUT_CLOSE, pickle.dumps(service).hex(), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    connected().send(model)  # the servers are there for the next trainer


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
    service.close_weight_update_group()
    ready_weights(service, model_path)
