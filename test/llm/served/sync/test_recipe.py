"""The sender: TorchRL's GRPO recipe, call by call, and metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules.llm.policies import TransformersWrapper

from helpers.collectors import Counter, at_version, make_collector, served_error, server_versions
from helpers.fault_proxy import Fault, FaultProxy
from helpers.marks import LISTS_STACK, QUIET, UPDATER
from helpers.paths import ROOT
from helpers.servers import keys_of, needs_version_spans, perturb, wait_until
from helpers.steps import NORM, STEPS
from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
    SGLangWeightReceiver,
    SGLangWeightSyncScheme,
    get_model_metadata,
)
from torchrl_sglang.errors import ConfigError, NotConnectedError, ServerFailedError, WeightsError
from torchrl_sglang.weights.source.expected import meta_model

pytestmark = [*QUIET, UPDATER, LISTS_STACK]


# The recipe


def test_the_recipe(
    service: AsyncSGLang, tokenizer: Any, model: Any, restore_weights: None
) -> None:
    """`sota-implementations/grpo/grpo-async.py` of TorchRL, with the import changed."""
    at_version(service, 7)
    collectors = [make_collector(service, tokenizer, track_policy_version=True) for _ in range(2)]
    policy_training = TransformersWrapper(
        perturb(model, seed=21), tokenizer=tokenizer, input_mode="tokens", generate=False
    )
    inference_engine = collectors[0].policy.model
    assert inference_engine is service
    scheme = SGLangWeightSyncScheme(
        server_url=inference_engine.server_url,
        master_address=inference_engine.get_master_address(),
        master_port=inference_engine.get_master_port(),
        num_gpus=inference_engine.get_tp_size() * inference_engine.get_dp_size(),
        strategy="state_dict",
        device=torch.device("cuda:0"),
    )
    sender = scheme.create_sender()
    try:
        sender.register_model(policy_training.model)
        metadata = get_model_metadata(policy_training.model)
        sender.init_all_workers_group(metadata, vllm_engine=inference_engine)
        sender.update_weights()
        assert served_error(service, model) < 0.02
        for collector in collectors:
            sender.register_collector(collector)
        for version in (9, 10):
            perturb(model, seed=version)
            assert sender.update_weights().version == version
            assert server_versions(service) == [str(version)]
            assert [collector.policy_version for collector in collectors] == [version] * 2
            assert served_error(service, model) < 0.02
        for collector in collectors:
            batch = next(iter(collector))
            assert batch["next", "policy_version"].unique().tolist() == [10]
        completion = service.generate([5, 6], {"max_new_tokens": 2})
        needs_version_spans(service)
        assert [span.version for span in completion.version_spans] == ["10"]
    finally:
        for collector in collectors:
            collector.shutdown()
        sender.shutdown()


def test_a_url_means_the_service_of_this_process(
    service: AsyncSGLang, proxied: AsyncSGLang, proxy: FaultProxy
) -> None:
    """It has the keys, and holds its requests during a push; a stranger's would do neither."""
    assert SGLangWeightSyncScheme(server_url=service.server_url + "/").service is service
    assert SGLangWeightSyncScheme(server_url=proxy.url).service is proxied
    keys = keys_of(service)
    given = SGLangWeightSyncScheme(server_url=proxy.url, **keys)
    assert given.service is proxied
    proxied.shutdown()
    again = SGLangWeightSyncScheme(server_url=proxy.url, **keys)
    assert again.service is not proxied
    assert again.service.state is ServiceState.SYNCED


def test_num_gpus_of_one_server_or_of_all(service: AsyncSGLang) -> None:
    two = SimpleNamespace(
        cluster=SimpleNamespace(infos=(service.info, service.info)),
        servers=service.servers,
        server_url=service.server_url,
        get_tp_size=service.get_tp_size,
        get_dp_size=service.get_dp_size,
    )
    for given in (1, 2, None):
        assert SGLangWeightSyncScheme(two, num_gpus=given).num_gpus == 2  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 ranks"):
        SGLangWeightSyncScheme(two, num_gpus=3)  # type: ignore[arg-type]


def test_the_engine_must_be_the_one_pushed_to(
    service: AsyncSGLang, attached: AsyncSGLang, proxied: AsyncSGLang
) -> None:
    scheme = SGLangWeightSyncScheme(service)
    metadata = service.get_model_metadata()
    for wrong in ({"vllm_engine": proxied}, {"engine": proxied}):
        with pytest.raises(ConfigError, match=re.escape(proxied.server_url)):
            scheme.create_sender().init_all_workers_group(metadata, **wrong)
    with pytest.raises(ConfigError, match="object is no SGLang engine"):
        scheme.create_sender().init_all_workers_group(metadata, vllm_engine=object())
    with pytest.raises(ConfigError, match=re.escape(proxied.server_url)):
        scheme.create_receiver(proxied)
    sender = scheme.create_sender()
    sender.init_all_workers_group(metadata, attached)  # another object, the same servers
    sender.init_all_workers_group(metadata, engine=SimpleNamespace(server_url=service.server_url))
    sender.shutdown()


# Metadata


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")  # inductor warns on import


def wrapped(model: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)


def compiled_layers(model: Any) -> Any:
    model.model.layers[0] = compiled(model.model.layers[0])
    return model


class Parallel(nn.Module):
    """As DDP holds its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


FORMS: dict[str, Callable[[Any], Any]] = {
    "module": lambda model: model,
    "wrapper": wrapped,
    "ddp": Parallel,
    "compiled": compiled,
    "compiled_layers": compiled_layers,
    "compiled_ddp": lambda model: compiled(Parallel(model)),
    "ddp_compiled": lambda model: Parallel(compiled(model)),
    "compiled_wrapper": lambda model: compiled(wrapped(model)),
    "meta": lambda model: meta_model(model.config._name_or_path),
    "state_dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("form", FORMS)
def test_metadata_is_the_served_models(service: AsyncSGLang, model: Any, form: str) -> None:
    served = service.get_model_metadata()
    assert served[NORM] == (torch.bfloat16, torch.Size([128]))
    assert "lm_head.weight" not in served  # tied
    assert get_model_metadata(FORMS[form](model)) == served


def test_metadata_of_a_tensordict(service: AsyncSGLang, model: Any) -> None:
    """Which does not tell buffers from parameters; they do no harm."""
    metadata = get_model_metadata(TensorDict.from_module(model).data)
    assert service.get_model_metadata().items() <= metadata.items()
    receiver = SGLangWeightSyncScheme(service).create_receiver()
    receiver.init_all_workers_group(metadata)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({NORM: None}, "missing: model.norm.weight"),
        ({"model.norm.wait": (BF16, torch.Size([3]))}, "model.norm.wait"),
        ({NORM: (BF16, torch.Size([127]))}, r"norm.weight has shape \(127,\) instead of \(128,\)"),
        ({"lm_head.weight": (BF16, torch.Size([2, 2]))}, "lm_head.weight has shape"),
        ({NORM: (torch.int8, torch.Size([128]))}, "norm.weight has dtype torch.int8"),
        ({NORM: (torch.float8_e4m3fn, torch.Size([128]))}, "has dtype torch.float8_e4m3fn"),
        ({NORM: torch.Size([128])}, "not so: model.norm.weight"),
        ({NORM: ("bfloat16", [128])}, "not so: model.norm.weight"),
    ],
)
@pytest.mark.parametrize("role", ["create_sender", "create_receiver"])
def test_wrong_metadata_is_refused_and_touches_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, change: Any, match: str, role: str
) -> None:
    metadata = {**get_model_metadata(model), **change}
    metadata = {name: entry for name, entry in metadata.items() if entry is not None}
    proxy.seen.clear()
    scheme = SGLangWeightSyncScheme(proxied)
    with pytest.raises(WeightsError, match=match):
        getattr(scheme, role)().init_all_workers_group(metadata)
    assert not [path for path, _ in proxy.seen if path in STEPS.values()]
    assert not scheme.synchronized_on_sender


def test_metadata_as_torchrl_makes_it(service: AsyncSGLang, model: Any) -> None:
    """All of the state dict, tied names too, and the names that a wrapper gives them."""
    sender = SGLangWeightSyncScheme(service).create_sender()
    for source in (model, Parallel(model), wrapped(model)):
        state = source.state_dict()
        assert any("lm_head" in name for name in state)
        sender.init_all_workers_group({k: (v.dtype, v.shape) for k, v in state.items()})
    sender.shutdown()
    with pytest.raises(WeightsError, match="not a NoneType"):
        sender.init_all_workers_group(None)  # type: ignore[arg-type]


# The rest of what the recipes call


def test_out_of_order(service: AsyncSGLang, model: Any, restore_weights: None) -> None:
    sender = SGLangWeightSyncScheme(service).create_sender()
    with pytest.raises(WeightsError, match="str"):
        sender.register_model("a model")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="register_model"):
        sender.update_weights()
    sender.init_all_workers_group(get_model_metadata(model))
    sender.update_weights(perturb(model, seed=24).state_dict())
    assert served_error(service, model) < 0.02
    counter = Counter()
    sender.register_collector(counter)
    sender.shutdown()
    sender.shutdown()
    with pytest.raises(NotConnectedError, match=r"was closed: call connect\(\)"):
        sender.update_weights(model)
    bumps = counter.bumps
    sender.init_all_workers_group(get_model_metadata(model))  # and once more
    sender.update_weights(model)
    assert counter.bumps == bumps  # was forgotten
    sender.shutdown()


def test_flush_cache(service: AsyncSGLang, proxied: AsyncSGLang, proxy: FaultProxy) -> None:
    sender = SGLangWeightSyncScheme(proxied).create_sender()
    prompt = list(range(100, 164))
    proxied.generate(prompt, {"max_new_tokens": 1})
    assert proxied.generate(prompt, {"max_new_tokens": 1}).cached_tokens > 32
    # The server refuses while its loop has not passed the last answer yet.
    wait_until(lambda: sender.flush_cache() is True, 5.0)
    assert proxied.generate(prompt, {"max_new_tokens": 1}).cached_tokens == 0
    proxy.faults["/flush_cache"] = Fault(status=400)
    assert sender.flush_cache() is False
    proxy.faults["/flush_cache"] = Fault(status=500)
    with pytest.raises(ServerFailedError):
        sender.flush_cache()


def test_the_receiver_says_who_receives(service: AsyncSGLang, model: Any) -> None:
    receiver = SGLangWeightSyncScheme(service).create_receiver(service)
    assert isinstance(receiver, SGLangWeightReceiver)
    receiver.init_all_workers_group(get_model_metadata(model))
    assert receiver.poll_and_apply(timeout=60.0) is False
    with pytest.raises(NotConnectedError, match=r"servers themselves.*update_weights"):
        receiver.apply_weights(model.state_dict())


def test_the_engine_takes_a_lazy_iterator(
    service: AsyncSGLang, model: Any, restore_weights: None
) -> None:
    made: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in perturb(model, seed=25).state_dict().items():
            made.append(name)
            yield name, tensor

    lazy = weights()
    service.close_weight_update_group()
    with pytest.raises(NotConnectedError, match="init_weight_update_group"):
        service.update_weights(lazy)
    assert not made
    at_version(service, 4)
    service.init_weight_update_group()
    service.init_weight_update_group(master_address="127.0.0.1")  # leaves the first
    try:
        service.update_weights(lazy)
        assert served_error(service, model) < 0.02
        assert server_versions(service) == ["5"]
        service.update_weights(model.state_dict())  # type: ignore[arg-type]
        assert service.weight_version == "6"
        pairs = list(model.state_dict().items())
        with pytest.raises(WeightsError, match=f"{pairs[0][0]} twice"):
            service.update_weights([*pairs, pairs[0]])
        with pytest.raises(WeightsError, match="pairs of name and tensor"):
            service.update_weights(iter(model.state_dict()))  # type: ignore[arg-type]
        with pytest.raises(WeightsError, match="missing"):
            service.update_weights(pairs[1:])
        assert service.state is ServiceState.SYNCED
        assert service.weight_version == "6"
    finally:
        service.close_weight_update_group()
        service.close_weight_update_group()


def test_the_documents_snippet(
    service: AsyncSGLang, tokenizer: Any, model: Any, restore_weights: None
) -> None:
    text = (ROOT / "docs/source/weight_sync.rst").read_text()
    text = text.partition("Without a collector\n---")[2]
    (block,) = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    collector = make_collector(service, tokenizer, track_policy_version=True)
    names = {"service": service, "train_model": perturb(model, seed=26), "collector": collector}
    try:
        exec(re.sub(r"(?m)^   ", "", block), names)
        assert server_versions(service) == [str(collector.policy_version)]
        assert served_error(service, model) < 0.02
    finally:
        collector.shutdown()
