"""The trainer's side of the collective, against torch's own gloo in another process."""

from __future__ import annotations

import gc
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from helpers.processes import open_files, until
from torchrl_sglang.errors import LaunchError, PortTakenError
from torchrl_sglang.servers.threads import in_thread
from torchrl_sglang.weights.carry.group import Rendezvous, TrainerGroup, WireError

HOST = "127.0.0.1"


# A server's rank, as SGLang makes one (`init_custom_process_group`). Each line of its input says
# what to do: join a group, or receive so many bytes of the last one and print their hash.
RANK = """
import datetime, hashlib, sys, torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
timeout = datetime.timedelta(seconds=60)
print("ready", flush=True)
for line in sys.stdin:
    word, *args = line.split()
    if word == "join":
        host, port, name, rank, world_size = args
        store = dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timeout
        )
        group, _ = c10d._new_process_group_helper(
            int(world_size), int(rank), [], c10d.Backend("gloo"), c10d.PrefixStore(name, store),
            group_name=name, timeout=timeout,
        )
        print("joined", flush=True)
    else:
        received = torch.zeros(int(args[0]), dtype=torch.uint8)
        group.broadcast([received], c10d.BroadcastOptions()).wait()
        print(hashlib.sha256(received.numpy().data).hexdigest(), flush=True)
"""


class Rank:
    """One rank of a server, in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def say(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Rank]]:
    """Two ranks that join one group after another; the third is there to be killed."""
    made = [Rank() for _ in range(3)]  # importing torch takes seconds: at once, and once
    assert [rank.hear() for rank in made] == ["ready"] * 3
    yield made
    for rank in made:
        rank.end()


def join(
    name: str, ranks: list[Rank], timeout_s: float = 20.0, operation_s: float = 20.0
) -> TrainerGroup:
    """A group of this process and some ranks."""
    rendezvous, size = Rendezvous(HOST, None, timeout_s), len(ranks) + 1
    for number, rank in enumerate(ranks, start=1):
        rank.say("join", HOST, rendezvous.port, name, number, size)
    group = TrainerGroup(
        rendezvous,
        name=name,
        world_size=size,
        backend="gloo",
        timeout_s=timeout_s,
        operation_s=operation_s,
    )
    assert [rank.hear() for rank in ranks] == ["joined"] * len(ranks)
    return group


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("torchrl_sglang-")]


def only_the_undertaker() -> bool:
    """Whether no thread is left but one that waits for gloo to give a broadcast up."""
    return set(our_threads()) <= {"torchrl_sglang-bury"}


def error_of(future: Future[Any], timeout_s: float = 5.0) -> BaseException | None:
    return future.exception(timeout_s)


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.fixture
def payload() -> torch.Tensor:
    return torch.randint(256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator())


def broadcast(group: TrainerGroup, *payloads: torch.Tensor) -> Future[None]:
    """Sends payloads one after another."""
    sending = group.send(lambda after: iter([[p] for p in payloads]), device=torch.device("cpu"))
    return sending.done


def check_broadcast(group: TrainerGroup, ranks: list[Rank], payload: torch.Tensor) -> None:
    for rank in ranks:
        rank.say("receive", len(payload))
    assert broadcast(group, payload).result(20.0) is None
    assert [rank.hear() for rank in ranks] == [sha(payload)] * len(ranks)


# Sending


@pytest.mark.parametrize("name", ["first", "second"])
def test_broadcasts_arrive_at_every_rank(
    ranks: list[Rank], payload: torch.Tensor, name: str
) -> None:
    group = join(name, ranks[:2])
    assert group.name == name
    for part in (payload, payload[:1], payload[5:999]):
        check_broadcast(group, ranks[:2], part)
    group.close(broken=False)
    until(lambda: our_threads() == [])


# Leaving


def test_a_broadcast_that_nobody_joined_is_freed(ranks: list[Rank], payload: torch.Tensor) -> None:
    group = join("broken", ranks[:2], operation_s=6.0)
    stuck = broadcast(group, torch.zeros(64 << 20, dtype=torch.uint8))  # more than sockets hold
    with pytest.raises(TimeoutError):
        stuck.result(0.3)
    begun = time.monotonic()
    group.close(broken=True)
    assert not stuck.done()  # the caller does not wait for it
    assert time.monotonic() - begun < 2.0
    assert error_of(stuck, 4.0) is not None
    # Nor does whoever happens to collect the garbage: gloo's destructor waits for the broadcast.
    del group, stuck
    deadline = time.monotonic() + 2.0
    while (begun := time.monotonic()) < deadline:
        gc.collect()
        assert time.monotonic() - begun < 2.4
    another = join("another", ranks[:2])
    check_broadcast(another, ranks[:2], payload)
    another.close(broken=False)
    until(lambda: our_threads() == [], 15.0)  # the broadcast runs into its own time-out


def test_a_rank_that_dies_ends_the_broadcast(ranks: list[Rank]) -> None:
    group = join("dying", ranks[2:])
    sent = broadcast(group, torch.zeros(64 << 20, dtype=torch.uint8))
    ranks[2].end()
    assert error_of(sent) is not None
    group.close(broken=True)
    until(only_the_undertaker)


def test_a_broadcast_may_take_longer_than_the_rendezvous(ranks: list[Rank]) -> None:
    """What gives a late receiver up is whoever waits, never torch: NCCL's watchdog kills for it."""
    group = join("slow", ranks[:1], timeout_s=2.0)
    payload = torch.zeros(64 << 20, dtype=torch.uint8)
    sent = broadcast(group, payload)
    with pytest.raises(TimeoutError):
        sent.result(4.0)
    ranks[0].say("receive", len(payload))
    assert error_of(sent, 20.0) is None
    assert ranks[0].hear() == sha(payload)
    group.close(broken=False)


def test_which_payload_failed_and_whose_fault_it_was(ranks: list[Rank]) -> None:
    """All are sent ahead; the one that is waited for is named, not the last that was started."""
    killed = Rank()
    assert killed.hear() == "ready"
    group = join("number", [killed])
    payload = torch.zeros(64 << 20, dtype=torch.uint8)
    sending = group.send(lambda after: iter([[payload]] * 5), device=torch.device("cpu"))
    killed.say("receive", len(payload))
    assert killed.hear() == sha(payload)
    killed.end()
    assert isinstance(error_of(sending.done), WireError)
    assert sending.at == 1
    group.close(broken=True)


def test_what_goes_wrong_here_is_not_put_down_to_the_wire(ranks: list[Rank]) -> None:
    group = join("own", ranks[:1])

    def raising(after: Callable[[int], None]) -> Iterator[list[torch.Tensor]]:
        raise RuntimeError("no memory")
        yield []

    sending = group.send(raising, device=torch.device("cpu"))
    assert type(error_of(sending.done)) is RuntimeError
    group.close(broken=True)


@pytest.mark.parametrize("broken", [False, True])
def test_leaving_without_a_broadcast(ranks: list[Rank], broken: bool) -> None:
    group = join(f"idle-{broken}", ranks[:1])
    group.close(broken=broken)
    group.close(broken=broken)
    until(lambda: our_threads() == [])


# Meeting


def test_closing_frees_a_member_that_waits_for_the_others() -> None:
    rendezvous = Rendezvous(HOST, None, 60.0)
    waiting = in_thread(
        lambda: TrainerGroup(
            rendezvous,
            name="alone",
            world_size=2,
            backend="gloo",
            timeout_s=60.0,
            operation_s=60.0,
        ),
        "torchrl_sglang-join",
    )
    with pytest.raises(TimeoutError):
        waiting.result(0.5)
    rendezvous.close()
    assert error_of(waiting) is not None
    until(lambda: our_threads() == [])


def test_nobody_comes_in_time() -> None:
    rendezvous = Rendezvous(HOST, None, 1.0)
    begun = time.monotonic()
    with pytest.raises(RuntimeError):
        TrainerGroup(
            rendezvous,
            name="alone",
            world_size=2,
            backend="gloo",
            timeout_s=1.0,
            operation_s=60.0,
        )
    assert time.monotonic() - begun < 10.0
    rendezvous.close()


def test_closing_twice_gives_port_and_files_back() -> None:
    Rendezvous(HOST, None, 5.0).close()  # the first one of a process opens a pipe for good
    before = open_files()
    rendezvous = Rendezvous(HOST, None, 5.0)
    member = rendezvous.member()
    member.set("key", "value")
    assert member.get("key") == b"value"
    rendezvous.close()
    rendezvous.close()
    del member
    with socket.socket() as following:
        following.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        following.bind((HOST, rendezvous.port))
        following.listen()
    assert open_files() <= before  # what others have idle may close meanwhile


def test_a_port_of_ones_own() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    rendezvous = Rendezvous(HOST, port, 5.0)
    assert (rendezvous.address, rendezvous.port) == (HOST, port)
    rendezvous.member().set("key", "value")
    rendezvous.close()


def test_a_port_in_use() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"{HOST}:{port}.*another master_port") as caught:
            Rendezvous(HOST, port, 5.0)
    assert isinstance(caught.value, OSError)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours(address: str) -> None:
    with pytest.raises(PortTakenError, match=f"{address}.*a master_address of this machine"):
        Rendezvous(address, None, 5.0)


def test_a_number_that_is_no_port() -> None:
    with pytest.raises(LaunchError):
        Rendezvous(HOST, 70000, 5.0)
