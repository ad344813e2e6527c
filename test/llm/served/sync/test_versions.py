"""Who counts the versions, and who may push."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.collectors import Counter, at_version, make_collector, served_error, server_versions
from helpers.fault_proxy import Fault, FaultProxy
from helpers.marks import LISTS_STACK, QUIET, UPDATER
from helpers.servers import perturb, told, wait_until
from helpers.steps import STEPS
from torchrl_sglang import (
    AsyncSGLang,
    ServiceState,
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
    VersionError,
)
from torchrl_sglang.servers.threads import in_thread

pytestmark = [*QUIET, UPDATER, LISTS_STACK]


Connect = Callable[..., SGLangWeightSender]


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


class Tracked(Counter):
    """What a collector of this process shows: a counter that can be set."""

    @property
    def policy_version_tracker(self) -> Counter:
        return self


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


@pytest.mark.slow
def test_a_forked_process_is_refused(
    service: AsyncSGLang, model_path: Path, restore_weights: None
) -> None:
    command = [sys.executable, "-c", FORKED, pickle.dumps(service).hex(), str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120.0, check=False)
    assert done.returncode == 0, done.stderr
    error, same, step = done.stdout.splitlines()
    assert re.match(r"NotConnectedError: process \d+ has a copy .* process \d+ made", error)
    assert (same, step) == ("ok", "1")
