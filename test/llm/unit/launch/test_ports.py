"""`PortReservation`: nobody takes the port before the child binds it."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from helpers.processes import open_files
from torchrl_sglang.errors import LaunchError, PortTakenError
from torchrl_sglang.launch.ports import PortReservation, refuse_if_listening, wait_until_free

IP_LOCAL_PORT_RANGE = 51  # Linux 6.3 and later

HOST = "127.0.0.1"


def bound(port: int, *, reuse: bool, only: int | None = None) -> socket.socket:
    """A bound socket; ``only`` leaves the kernel one port to choose from."""
    made = socket.socket()
    try:
        if reuse:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if only is not None:
            made.setsockopt(
                socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", only << 16 | only)
            )
        made.bind((HOST, port))
    except BaseException:
        made.close()
        raise
    return made


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bound(0, reuse=True) as made:
        made.listen()
        yield made


def test_a_reserved_port_is_refused_to_a_plain_bind() -> None:
    with PortReservation() as held, pytest.raises(OSError, match="in use"):
        bound(held.port, reuse=False)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_reserved_port_is_not_given_out_again(reuse: bool) -> None:
    with PortReservation() as held:
        port = held.port
        try:
            bound(0, reuse=reuse, only=port).close()
        except OSError as error:
            refused = error.errno
        else:
            refused = 0
    if refused == errno.ENOPROTOOPT:
        pytest.skip("this kernel can't be left one port to choose from")
    assert refused == errno.EADDRINUSE
    bound(0, reuse=reuse, only=port).close()  # nothing but the reservation stood in the way


def test_reservations_differ() -> None:
    held = [PortReservation() for _ in range(50)]
    assert len({one.port for one in held}) == 50
    for one in held:
        one.release()


def test_a_server_that_reuses_addresses_takes_the_reserved_port() -> None:
    with PortReservation() as held, bound(held.port, reuse=True) as server:
        server.listen()
        with socket.create_connection((HOST, held.port), timeout=5.0):
            accepted, _ = server.accept()
            accepted.close()
        held.release()
        with socket.create_connection((HOST, held.port), timeout=5.0):
            pass


def test_nothing_answers_on_a_reserved_port() -> None:
    with PortReservation() as held:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, held.port), timeout=5.0)
        refuse_if_listening(HOST, held.port)


def test_a_wanted_port() -> None:
    with PortReservation() as held:
        port = held.port
    with PortReservation(HOST, port) as wanted:
        assert wanted.port == port


def test_released_ports_are_free_and_no_file_is_left() -> None:
    before = open_files()
    with PortReservation() as held:
        pass
    held.release()
    bound(held.port, reuse=False).close()
    assert open_files() <= before  # others may close meanwhile


def test_a_port_in_use(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    before = open_files()
    with pytest.raises(PortTakenError, match=f"port {port} on {HOST} is in use.*port=None"):
        PortReservation(HOST, port)
    assert open_files() <= before  # others may close meanwhile


def test_a_port_that_is_bound_but_does_not_listen() -> None:
    with bound(0, reuse=False) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} .*can't be bound.*in use"):
            PortReservation(HOST, port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(PortTakenError, match="can't be bound") as caught:
        PortReservation(host)
    assert isinstance(caught.value, LaunchError)
    assert isinstance(caught.value, OSError)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("port", [70000, -1])
def test_a_number_that_is_no_port(port: int) -> None:
    with pytest.raises(LaunchError):
        PortReservation(HOST, port)


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with (
        PortReservation("::1") as held,
        socket.socket(socket.AF_INET6) as other,
        pytest.raises(OSError, match="in use"),
    ):
        other.bind(("::1", held.port))


def test_a_port_is_waited_for() -> None:
    """A process that was killed closes its sockets a little later than it is gone."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError):
            wait_until_free("127.0.0.1", port, 0.2)
        timer = threading.Timer(0.3, taken.close)
        timer.start()
        wait_until_free("127.0.0.1", port, 5.0)
        timer.join()
