"""The sender: TorchRL's GRPO recipe, call by call, and who counts the versions."""

from __future__ import annotations

from helpers.servers import keys_of
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fault_proxy import Fault, FaultProxy
from helpers.servers import asked, needs_version_spans, perturb, told, wait_until
from tensordict import TensorDict, set_list_to_stack
from test_collector import make_collector, served_error
from test_weights import NORM, STEPS
from torch import nn
from torchrl.modules.llm.policies import TransformersWrapper

from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
    SGLangWeightReceiver,
    SGLangWeightSender,
    SGLangWeightSyncScheme,
    WeightSyncConfig,
    get_model_metadata,
)
from torchrl_sglang.errors import (
    AlreadyConnectedError,
    ConfigError,
    NotConnectedError,
    PushError,
    ServerFailedError,
    VersionError,
    WeightsError,
)
from torchrl_sglang.servers.threads import in_thread
from torchrl_sglang.weights.source.expected import meta_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using WeightUpdaterBase is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchrl"),
    pytest.mark.filterwarnings("ignore::UserWarning:tensordict"),
    pytest.mark.usefixtures("lists_stack"),
]

Connect = Callable[..., SGLangWeightSender]


@pytest.fixture
def lists_stack() -> Iterator[None]:
    with set_list_to_stack(True):
        yield


@pytest.fixture
def sender_to(restore_weights: None) -> Iterator[Connect]:
    """Makes senders that are connected, and shuts them down."""
    made: list[SGLangWeightSender] = []

    def connect(service: AsyncSGLang, model: Any, **kwargs: Any) -> SGLangWeightSender:
        sender = SGLangWeightSyncScheme(service, **kwargs).create_sender()
        made.append(sender)
        sender.register_model(model)
        sender.init_all_workers_group(get_model_metadata(model))
        return sender

    yield connect
    for sender in made:
        sender.shutdown()


class Counter:
    """What a collector in another process (Ray) shows of its versions."""

    def __init__(self, version: Any = 0) -> None:
        self.version = version
        self.bumps = 0

    @property
    def policy_version(self) -> Any:
        return self.version

    def increment_version(self) -> None:
        self.bumps += 1
        if isinstance(self.version, int):
            self.version += 1


class Tracked(Counter):
    """What a collector of this process shows: a counter that can be set."""

    @property
    def policy_version_tracker(self) -> Counter:
        return self


def server_versions(service: AsyncSGLang) -> list[str]:
    return [asked(worker, "/model_info")["weight_version"] for worker in service.workers]


def at_version(service: AsyncSGLang, version: int) -> None:
    """Tells the servers what they run, as an earlier trainer would have."""
    for worker in service.workers:
        body = {"new_version": str(version), "abort_all_requests": False}
        told(worker, "/update_weight_version", body)
    service.servers.versions.set_pushed(version)


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


def test_metadata_says_the_trainers_dtype_and_what_a_checkpoint_has(model: Any) -> None:
    assert get_model_metadata(model.float())[NORM][0] is torch.float32
    assert "inv_freq" not in " ".join(get_model_metadata(model))
    model.register_buffer("computed", torch.zeros(1), persistent=False)
    model.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    model.register_buffer("scale", torch.zeros(1))
    assert "computed" not in get_model_metadata(model)
    assert "count" not in get_model_metadata(model)
    assert "scale" in get_model_metadata(model)


def test_metadata_of_what_has_none() -> None:
    with pytest.raises(WeightsError, match="no parameters"):
        get_model_metadata(nn.Identity())
    with pytest.raises(WeightsError, match="int"):
        get_model_metadata(3)


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


# Versions


def test_a_push_counts_every_registered_collector_once(
    service: AsyncSGLang, model: Any, sender_to: Connect
) -> None:
    at_version(service, 3)
    sender = sender_to(service, model)
    there, remote, named, off = Tracked(3), Counter(3), Counter("uuid"), Counter(None)
    for collector in (there, remote, named, off, there, named):
        sender.register_collector(collector)
    assert sender.update_weights().version == 4
    assert [each.bumps for each in (there, remote, named, off)] == [1, 1, 1, 1]
    assert [each.version for each in (there, remote, named, off)] == [4, 4, "uuid", None]
    assert server_versions(service) == ["4"]
    with pytest.raises(ConfigError, match="increment_version"):
        sender.register_collector(object())


@pytest.mark.parametrize("kind", [Tracked, Counter])
def test_counters_that_start_again(
    service: AsyncSGLang, model: Any, sender_to: Connect, kind: type[Counter]
) -> None:
    """Servers run 7 from an earlier trainer; collectors begin at 0."""
    at_version(service, 7)
    sender = sender_to(service, model)
    early, ahead = kind(0), kind(0)
    sender.register_collector(early)
    sender.register_collector(ahead)
    assert (early.version, ahead.version) == (7, 7)  # what their rollouts are sampled by
    ahead.version = 11
    assert sender.update_weights().version == 12
    assert (early.version, ahead.version) == (12, 12)
    assert server_versions(service) == ["12"]
    early.version = 0
    assert sender.update_weights().version == 13
    assert (early.version, ahead.version) == (13, 13)


def test_another_trainer_pushed_in_between(
    service: AsyncSGLang, attached: AsyncSGLang, model: Any, sender_to: Connect
) -> None:
    """The servers are asked, not this process's memory."""
    first, second = sender_to(service, model), sender_to(attached, model)
    versions = [each.update_weights().version for each in (first, second, first, second)]
    assert versions == [versions[0] + i for i in range(4)]


@pytest.mark.parametrize("wanted", [-1, 0, 6, 7])
def test_a_version_that_does_not_go_up_is_refused(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, sender_to: Connect, wanted: int
) -> None:
    at_version(proxied, 7)
    sender = sender_to(proxied, model)
    collector = Tracked(2)
    sender.register_collector(collector)
    proxy.seen.clear()
    with pytest.raises(VersionError, match="run version 7") as caught:
        sender.update_weights(version=wanted)
    assert isinstance(caught.value, ValueError)
    assert not [path for path, _ in proxy.seen if path in STEPS.values()]
    assert (proxied.state, collector.bumps) == (ServiceState.SYNCED, 0)
    with pytest.raises(ConfigError, match="integer"):
        sender.update_weights(version="8")  # type: ignore[arg-type]
    assert sender.update_weights(version=20).version == 20
    assert (collector.version, server_versions(proxied)) == (20, ["20"])
    collector.version = 30
    with pytest.raises(VersionError, match="counts version 30"):
        sender.update_weights(version=25)


def test_a_version_with_a_name_counts_as_none(
    attached: AsyncSGLang, model: Any, sender_to: Connect
) -> None:
    for worker in attached.workers:
        told(worker, "/update_weight_version", {"new_version": "best", "abort_all_requests": False})
    assert sender_to(attached, model).update_weights().version == 1


def test_who_calls_counts(
    service: AsyncSGLang, tokenizer: Any, model: Any, restore_weights: None
) -> None:
    """A push through one collector, then through the sender: each counts once, all agree."""
    at_version(service, 5)
    scheme = SGLangWeightSyncScheme(service)
    pushing = make_collector(service, tokenizer, weight_updater=scheme, track_policy_version=True)
    other = make_collector(service, tokenizer, track_policy_version=True)
    sender = scheme.create_sender()
    try:
        sender.register_model(model)
        sender.init_all_workers_group(get_model_metadata(model), vllm_engine=service)
        pushing.update_policy_weights_(model)  # unknown to the sender yet, and behind the servers
        assert pushing.policy_version == 6
        for collector in (pushing, other):
            sender.register_collector(collector)
        for version, push in [
            (7, lambda: pushing.update_policy_weights_(perturb(model, seed=22))),
            (8, sender.update_weights),
            (9, lambda: pushing.update_policy_weights_(model)),
        ]:
            push()
            assert scheme.last_push is not None
            assert scheme.last_push.version == version
            assert [pushing.policy_version, other.policy_version] == [version, version]
            assert server_versions(service) == [str(version)]
            assert served_error(service, model) < 0.02
        history = pushing.policy_version_tracker.version_history  # of increment_version() alone
        assert [change.new_version for change in history] == [0, 6, 7, 8, 9]
    finally:
        for collector in (pushing, other):
            collector.shutdown()
        sender.shutdown()


def test_collectors_that_share_a_counter(
    service: AsyncSGLang, model: Any, sender_to: Connect
) -> None:
    at_version(service, 5)
    sender = sender_to(service, model)
    tracker = Tracked(5)

    class Sharing(Counter):
        policy_version_tracker = tracker
        policy_version = property(lambda self: tracker.version)  # type: ignore[assignment]
        increment_version = staticmethod(tracker.increment_version)  # type: ignore[assignment]

    collectors = [Sharing(), Sharing()]
    for collector in collectors:
        sender.register_collector(collector)
    sender.update_weights()
    assert (tracker.version, tracker.bumps) == (6, 1)
    sender._scheme.push(model, collectors[0])
    assert (tracker.version, tracker.bumps) == (6, 1)  # the caller counts it itself


def test_a_failed_push_counts_nobody(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, sender_to: Connect
) -> None:
    """And the next one repairs it, over the same fixed port."""
    at_version(proxied, 5)
    sender = sender_to(proxied, model, master_port=proxied.get_master_port())
    collector = Tracked(0)
    sender.register_collector(collector)
    proxy.faults["/update_weights_from_distributed"] = Fault(status=500)
    with pytest.raises(PushError):
        sender.update_weights()
    assert (collector.version, collector.bumps) == (5, 0)
    assert proxied.state is ServiceState.BROKEN
    proxy.faults.clear()
    assert sender.update_weights(perturb(model, seed=23)).version == 6
    assert (collector.version, collector.bumps) == (6, 1)
    assert served_error(proxied, model) < 0.02


def test_servers_that_do_not_say_their_version(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, sender_to: Connect
) -> None:
    sender = sender_to(proxied, model)
    proxy.faults["/model_info"] = Fault(status=400)
    proxy.seen.clear()
    with pytest.raises(PushError, match="ask"):
        sender.update_weights()
    assert not [path for path, _ in proxy.seen if path in STEPS.values()]
    assert proxied.state is ServiceState.SYNCED


# One weight sync at a time


def test_a_second_scheme_takes_over(service: AsyncSGLang, model: Any, sender_to: Connect) -> None:
    """As a notebook's cell that is run again makes it, while a traceback holds the first."""
    first = sender_to(service, model)
    second = SGLangWeightSyncScheme(service)
    sender = second.create_sender()
    sender.register_model(model)
    with pytest.warns(RuntimeWarning, match=re.escape(f"place of {first._scheme!r}")):
        sender.init_all_workers_group(get_model_metadata(model))
    done = sender.update_weights(perturb(model, seed=28))
    assert done is not None
    with pytest.raises(NotConnectedError, match=re.escape(f"{second!r} has taken the place")):
        first.update_weights()  # says so instead of taking turns
    assert server_versions(service) == [str(done.version)]
    assert served_error(service, model) < 0.02
    with pytest.warns(RuntimeWarning, match=re.escape(f"place of {second!r}")):
        service.init_weight_update_group()
    service.update_weights(model.state_dict().items())
    with pytest.warns(RuntimeWarning, match="takes the place"):
        first.init_all_workers_group(get_model_metadata(model))  # and back, when told to
    first.update_weights()
    second.close()  # has no claim to give up
    service.close_weight_update_group()
    first.update_weights()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_a_scheme_in_the_middle_of_a_push_is_not_taken_over(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, sender_to: Connect, non_blocking: bool
) -> None:
    first = sender_to(proxied, model, config=WeightSyncConfig(non_blocking=non_blocking))
    second = SGLangWeightSyncScheme(proxied)
    proxy.faults[STEPS["transfer"]] = Fault(delay_s=1.0)
    pushing = in_thread(first.update_weights, "test-push")
    wait_until(lambda: proxied.state is ServiceState.UPDATING)
    with pytest.raises(AlreadyConnectedError, match=re.escape(f"{first._scheme!r} is in the mid")):
        second.connect()
    pushing.result(20.0)
    first._scheme.wait()
    with pytest.warns(RuntimeWarning, match="takes the place"):
        second.connect()
    second.close()


def test_a_failed_connect_holds_nothing(
    proxied: AsyncSGLang, proxy: FaultProxy, model: Any, sender_to: Connect
) -> None:
    proxy.faults[STEPS["init"]] = Fault(status=400)
    with pytest.raises(PushError):
        sender_to(proxied, model)
    proxy.faults.clear()
    sender_to(proxied, model).update_weights()


FORKED = """
import os, pickle, sys
from torchrl_sglang import SGLangWeightSyncScheme, get_model_metadata
from transformers import AutoModelForCausalLM
service = pickle.loads(bytes.fromhex(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="bfloat16")
sender = SGLangWeightSyncScheme(service).create_sender()
sender.register_model(model)
sender.init_all_workers_group(get_model_metadata(model))
before = sender.update_weights().version
child = os.fork()
if child == 0:
    try:
        sender.update_weights()
    except Exception as error:
        print(type(error).__name__, error, sep=": ", flush=True)
    sender.shutdown()  # harmless: the group is the parent's
    del sender
    os._exit(0)
os.waitpid(child, 0)
print("paused" if service.workers[0].model_info()["weight_version"] != str(before) else "ok")
print(sender.update_weights().version - before, flush=True)
sender.shutdown()
service.shutdown()
"""


def test_a_forked_process_is_refused(
    service: AsyncSGLang, model_path: Path, restore_weights: None
) -> None:
    command = [sys.executable, "-c", FORKED, pickle.dumps(service).hex(), str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120.0, check=False)
    assert done.returncode == 0, done.stderr
    error, same, step = done.stdout.splitlines()
    assert re.match(r"NotConnectedError: process \d+ has a copy .* process \d+ made", error)
    assert (same, step) == ("ok", "1")


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
    text = (Path(__file__).parents[2] / "docs/source/weight_sync.rst").read_text()
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
