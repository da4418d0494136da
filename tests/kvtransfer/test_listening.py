"""Which address and port our sockets get, and what is said when there is none."""

from __future__ import annotations

import errno
import socket

import pytest

from configs.schema import TransferConfig
from kvtransfer import listening
from kvtransfer.listening import Bind, Ports, address_here, bind_of, listen, ports_of, why
from protocol.errors import ConfigError

INTERFACES = [("lo", "127.0.0.1"), ("eth0", "10.1.0.5"), ("eth1", "192.168.7.5"), ("eth1", "fd00::5")]


@pytest.fixture
def two_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_addresses", lambda: INTERFACES)
    monkeypatch.setattr(listening, "address_here", address_here.__wrapped__)


@pytest.mark.parametrize(
    ("bind_host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("192.168.0.0/16", "192.168.7.5"),
        ("10.1.0.0/16", "10.1.0.5"),
        ("eth1", "192.168.7.5"),
        ("fd00::/8", "fd00::5"),
        ("10.9.9.9", "10.9.9.9"),
        ("some.host", "some.host"),
    ],
)
def test_a_network_or_an_interface_names_one_of_this_hosts_addresses(two_homes: None, bind_host: str, address: str) -> None:
    assert bind_of(TransferConfig(bind_host=bind_host)).host == address


def test_a_host_that_is_not_in_the_network_says_where_it_is(two_homes: None) -> None:
    with pytest.raises(ConfigError, match=r"172\.16\.0\.0/12.*no address there; it has .*10\.1\.0\.5 \(eth0\)"):
        bind_of(TransferConfig(bind_host="172.16.0.0/12"))
    with pytest.raises(ConfigError, match=r"is no network such as"):
        bind_of(TransferConfig(bind_host="10.0.0.0/99"))


def test_the_real_loopback_is_found() -> None:
    assert address_here("127.0.0.0/8") == "127.0.0.1"
    assert address_here("lo") == "127.0.0.1"


def test_sockets_stay_within_the_range_and_say_so_when_it_is_full() -> None:
    ports = bind_of(TransferConfig(port_range="28731-28733")).ports
    assert ports == Ports(28731, 28733)
    made = [listen("127.0.0.1", ports) for _ in range(3)]
    try:
        assert {sock.getsockname()[1] for sock in made} == {28731, 28732, 28733}
        with pytest.raises(OSError, match=r"no port of transfer.port_range 28731-28733 is free on 127.0.0.1") as error:
            listen("127.0.0.1", ports)
        assert error.value.errno == errno.EADDRINUSE
    finally:
        for sock in made:
            sock.close()
    assert ports_of(None) == Bind("x").ports


def test_an_address_of_somebody_else_is_no_question_of_ports() -> None:
    with pytest.raises(OSError) as error:
        listen("203.0.113.9", Ports(28731, 28733))
    assert error.value.errno == errno.EADDRNOTAVAIL


def test_what_to_do_about_a_peer_that_cannot_be_reached() -> None:
    assert "firewall" in why(TimeoutError())
    assert "no route" in why(OSError(errno.EHOSTUNREACH, "x"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError) as error:
        socket.create_connection(("127.0.0.1", port), 2)
    assert "nothing listens on that port" in why(error.value)
