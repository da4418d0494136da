"""Where our own sockets listen: on which of this host's addresses, and within which range of ports.

Used by the KV receivers here and by `cluster/` for everything else that listens. Reads nothing but the host's interfaces.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import secrets
import socket
from typing import NamedTuple

import psutil

from configs.schema import TransferConfig
from protocol.errors import ConfigError


class Ports(NamedTuple):
    """Both ends are part of it."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}-{self.high}"


ANY = Ports(0, 0)


class Bind(NamedTuple):
    """Where the sockets of one process listen."""

    host: str
    ports: Ports = ANY


def bind_of(transfer: TransferConfig) -> Bind:
    """On this host. Raises ConfigError."""
    return Bind(address_here(transfer.bind_host), ports_of(transfer.port_range))


def ports_of(text: str | None) -> Ports:
    """ "20000-20999", which `configs.check` has looked at, -> Ports; none: ANY."""
    if text is None:
        return ANY
    low, _, high = text.partition("-")
    return Ports(int(low), int(high))


def listen(host: str, ports: Ports = ANY, backlog: int = 128, port: int = 0) -> socket.socket:
    """A listening socket on `port`, or on a free one of `ports`. Raises OSError; EADDRINUSE with a sentence when none is free.

    The search begins anywhere in the range, so that a new process rarely gets the port that a dead one is still remembered for.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port or ports == ANY:
        return socket.create_server((host, port), family=family, backlog=backlog)
    num = ports.high - ports.low + 1
    first = secrets.randbelow(num)
    for i in range(num):
        try:
            return socket.create_server((host, ports.low + (first + i) % num), family=family, backlog=backlog)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"no port of transfer.port_range {ports} is free on {host}; make the range larger")


@functools.lru_cache(maxsize=64)
def address_here(bind_host: str) -> str:
    """The address to bind: `bind_host` itself, or this host's one address in the network (10.0.0.0/16) or on the interface (eth1)
    that it names. So hosts with several addresses can share one configuration. Raises ConfigError that lists what there is."""
    name = bind_host.strip("[]")
    try:
        ipaddress.ip_address(name)
        return name
    except ValueError:
        pass
    found = _addresses()
    if "/" in name:
        try:
            network = ipaddress.ip_network(name, strict=False)
        except ValueError:
            raise ConfigError(
                f"transfer.bind_host {bind_host} is no network such as 10.0.0.0/16", param="transfer.bind_host"
            ) from None
        fitting = [address for _, address in found if ipaddress.ip_address(address) in network]
    elif name in {interface for interface, _ in found}:
        fitting = [address for interface, address in found if interface == name]
    else:
        return name  # a host's name, which the resolver knows
    if not fitting:
        there = ", ".join(f"{address} ({interface})" for interface, address in found)
        raise ConfigError(
            f"transfer.bind_host {bind_host}: {socket.gethostname()} has no address there; it has {there}",
            param="transfer.bind_host",
        )
    return fitting[0]


def _addresses() -> list[tuple[str, str]]:
    """(interface, address) of this host, IPv4 first, link-local ones left out."""
    found = []
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                address = entry.address.partition("%")[0]
                if not ipaddress.ip_address(address).is_link_local:
                    found.append((interface, address))
    return sorted(found, key=lambda one: ":" in one[1])


def why(error: BaseException) -> str:
    """What to do about a connection that cannot be made, beside the kernel's own words."""
    number = getattr(error, "errno", None)
    if isinstance(error, TimeoutError) or number == errno.ETIMEDOUT:
        return "no answer: a host that is gone, a firewall that drops, or a process that is stopped"
    if number == errno.ECONNREFUSED:
        return "refused: the host is there, and nothing listens on that port (or a firewall rejects)"
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return f"{os.strerror(number)}: no route from here"
    return str(error) or type(error).__name__
