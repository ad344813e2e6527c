"""How a scheme comes to its servers: by itself, late, and under TorchRL's names."""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrl.trainers.trainers import UpdateWeights

from helpers.collectors import Counter, served_error, server_versions
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import perturb
from torchrl_sglang import (
    AsyncSGLang,
    SGLangWeightSyncScheme,
    WeightSyncConfig,
    get_model_metadata,
)
from torchrl_sglang.errors import (
    AlreadyConnectedError,
    ConfigError,
    NotConnectedError,
    PushError,
    UnsupportedOptionError,
    WeightsError,
)
from torchrl_sglang.servers.control import GIVING
from torchrl_sglang.servers.gate import ServiceState
from torchrl_sglang.weights.carry.broadcast import Broadcast

pytestmark = pytest.mark.filterwarnings("ignore:state_dict strategy is experimental:UserWarning")


Make = Callable[..., SGLangWeightSyncScheme]


@pytest.fixture
def made(restore_weights: None) -> Iterator[Make]:
    """Makes schemes, and closes them."""
    all_made: list[SGLangWeightSyncScheme] = []

    def make(*args: Any, **kwargs: Any) -> SGLangWeightSyncScheme:
        all_made.append(SGLangWeightSyncScheme(*args, **kwargs))
        return all_made[-1]

    yield make
    for scheme in all_made:
        scheme.close()


# By itself


@pytest.mark.parametrize("how", ["push", "send", "update_weights"])
def test_a_first_push_connects(service: AsyncSGLang, model: Any, made: Make, how: str) -> None:
    scheme = made(service)
    owner: Any = scheme.create_sender() if how == "update_weights" else scheme
    getattr(owner, how)(perturb(model, seed=31))
    assert served_error(service, model) < 0.02
    scheme.connect()  # harmless
    scheme.close()
    with pytest.raises(NotConnectedError, match=r"call connect\(\)"):
        getattr(owner, how)(model)
    scheme.connect()
    getattr(owner, how)(model)


def test_ctrl_c_while_connecting_leaves_it_to_be_connected(
    service: AsyncSGLang, model: Any, made: Make
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    scheme = made(service)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Broadcast, "connect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheme.connect()
    scheme.push(perturb(model, seed=32))
    assert served_error(service, model) < 0.02


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("method", ["broadcast", "tensor", "disk"])
def test_a_key_that_is_refused_is_known_before_anything_is_begun(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, made: Make, status: int, method: str
) -> None:
    scheme = made(proxied, config=WeightSyncConfig(method=method))  # type: ignore[arg-type]
    route = {"broadcast": GIVING["announce"]}.get(method, f"/update_weights_from_{method}")
    proxy.faults[route] = Fault(status=status)
    proxy.seen.clear()
    with pytest.raises(PushError, match=f"step 'connect', engine .* answered {status}"):
        scheme.push(model)
    assert {path for path, _ in proxy.seen} <= {route, "/model_info"}
    assert proxied.state is ServiceState.SYNCED
    proxy.faults.clear()
    scheme.push(perturb(model, seed=33))
    assert served_error(proxied, model) < 0.02


# What is pushed


def test_pairs_and_labels(service: AsyncSGLang, model: Any, made: Make) -> None:
    scheme = made(service)
    perturb(model, seed=34)
    first = scheme.push(iter(model.state_dict().items()), label="step_1000")
    assert first is not None
    assert first.label == "step_1000"
    assert served_error(service, model) < 0.02
    assert server_versions(service) == [str(first.version)]  # the number alone
    assert service.weight_version == str(first.version)
    assert service.weight_label == "step_1000"
    second = scheme.push(list(model.state_dict().items()))
    assert second is not None
    assert (second.label, service.weight_label) == (None, None)
    for wrong in ("", 7):
        with pytest.raises(ConfigError, match="label is a name such as"):
            scheme.push(model, label=wrong)  # type: ignore[arg-type]
    sender = scheme.create_sender()
    sender.update_weights(model, version=second.version + 10, label="step_2000")
    assert service.version_labels == {
        first.version: "step_1000",
        second.version + 10: "step_2000",
    }
    for wrong in (model.state_dict().keys(), [1, 2], [("a", 1, 2)]):
        with pytest.raises(WeightsError, match="pairs of name and tensor"):
            scheme.push(wrong)


def test_the_label_of_a_push_that_does_not_block(
    service: AsyncSGLang, model: Any, made: Make
) -> None:
    scheme = made(service, config=WeightSyncConfig(non_blocking=True))
    scheme.push(model, label="late")
    done = scheme.wait()
    assert done is not None
    assert done.label == "late"
    assert scheme.last_push is done


# TorchRL's names


def test_expert_iterations_calls(service: AsyncSGLang, model: Any, made: Make) -> None:
    """Its scheme is made with ports and ranks alone, and hears of the engine on joining."""
    scheme = made(
        master_address="localhost",
        master_port=service.get_master_port(),
        gpus_per_replica=1,
        num_replicas=1,
        strategy="state_dict",
    )
    sender = scheme.create_sender()
    sender.register_model(model)
    for early in (scheme.connect, sender.update_weights, lambda: scheme.service):
        with pytest.raises(NotConnectedError, match=r"no servers yet.*engine=service"):
            early()
    assert "no servers yet" in repr(scheme)
    assert scheme.wait() is None
    counter = Counter()
    sender.register_collector(counter)
    sender.init_all_workers_group(get_model_metadata(model), vllm_engine=service)
    assert counter.version == int(server_versions(service)[0].replace("default", "0"))
    perturb(model, seed=35)
    done = sender.update_weights()
    assert done is not None
    assert counter.version == done.version
    assert served_error(service, model) < 0.02
    assert (scheme.num_gpus, scheme.world_size, scheme.master_address) == (1, 2, "localhost")
    sender.flush_cache()
    sender.shutdown()


def test_an_engine_that_comes_late_is_checked_like_any(
    service: AsyncSGLang, proxied: AsyncSGLang, made: Make
) -> None:
    with pytest.raises(ConfigError, match="num_gpus=6, but the servers have 1"):
        made(gpus_per_replica=3, num_replicas=2).push_to(service)
    with pytest.raises(ConfigError, match="object is no SGLang engine"):
        made().push_to(object())
    for given in (service, service.server_url, SimpleNamespace(server_url=service.server_url)):
        scheme = made()
        scheme.push_to(given)
        assert scheme.service is service
        scheme.push_to(given)
        with pytest.raises(ConfigError, match=re.escape(proxied.server_url)):
            scheme.push_to(proxied)
    assert made(service.server_url).service is service  # TorchRL's first argument
    assert made().create_receiver(service)._scheme.service is service
    assert made().create_receiver(vllm_engine=service)._scheme.service is service
    with pytest.raises(ConfigError, match="not both"):
        made(service, server_url=service.server_url)


def test_options_of_torchrls_scheme(service: AsyncSGLang, made: Make) -> None:
    config = made(service, flush_cache_on_update=True, pause_mode="abort").config
    assert config == WeightSyncConfig(flush_cache=True, pause_mode="abort")
    assert made(service, flush_cache_on_update=False).config.flushes is False
    with pytest.raises(ConfigError, match=r"write WeightSyncConfig\(..., pause_mode='abort'\)"):
        made(service, pause_mode="abort", config=WeightSyncConfig())
    with pytest.raises(ConfigError, match="pause_mode must be one of"):
        made(service, pause_mode="stop")


def test_what_the_trainers_hook_calls(service: AsyncSGLang, model: Any, made: Make) -> None:
    """`GRPOTrainer(weight_sync_sender=sender)` hands the sender to this hook."""
    sender = made(service).create_sender()
    sender.register_model(perturb(model, seed=36))
    hook = UpdateWeights(sender=sender, trainer=SimpleNamespace(), update_weights_interval=1)
    hook()
    assert served_error(service, model) < 0.02


def test_names_of_torchrls_engine(service: AsyncSGLang) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"update_weights\(\[\(name, tensor\)"):
        service.update_weights_from_distributed("lm_head.weight", torch.bfloat16, (2, 3))
    assert service.flush_cache() is True


def test_the_engines_own_group_gives_no_way_while_it_joins(
    proxied: AsyncSGLang, proxy: FaultProxy, restore_weights: None
) -> None:
    proxy.faults["/init_weights_update_group"] = Fault(delay_s=2.0)
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(proxied.init_weight_update_group)
        deadline = time.monotonic() + 10.0
        while not proxy.seen and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(AlreadyConnectedError, match="weight update group of"):
            SGLangWeightSyncScheme(proxied).connect()
        joining.result(30.0)
    proxy.faults.clear()
    first = weakref.ref(proxied._local.sync._pusher)  # type: ignore[arg-type]
    scheme = SGLangWeightSyncScheme(proxied)
    with pytest.warns(RuntimeWarning, match="takes the place of <weight update group of"):
        scheme.connect()
    with pytest.raises(NotConnectedError, match="has taken the place of this weight sync"):
        proxied.update_weights([])
    scheme.close()
    gc.collect()
    assert first() is None
