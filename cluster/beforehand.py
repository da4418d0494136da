"""What is looked at before anything is started: foreign packages in the way, ports that are taken. Light, as `cli.py` is."""

from __future__ import annotations

import errno
import socket
from importlib import util
from pathlib import Path

from protocol.errors import ConfigError

PACKAGES = (
    "protocol",
    "configs",
    "kernels",
    "models",
    "kvtransfer",
    "engine",
    "prefill",
    "decode",
    "scheduler",
    "api",
    "cluster",
)
ROOT = Path(__file__).resolve().parents[1]


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches what listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_nothing_shadows() -> None:
    """Our top-level packages have everyday names; another `api` or `models` earlier on the path would be imported instead.

    Raises ConfigError that names both folders. Finding is not importing: nothing foreign runs.
    """
    for name in PACKAGES:
        spec = util.find_spec(name)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places and spec is not None and spec.origin:
            places = [spec.origin]
        if not any(Path(place).resolve() == ROOT / name for place in places):
            found = places[0] if places else "nothing"
            raise ConfigError(
                f"`{name}` would be imported from {found} instead of {ROOT / name}; start the `tandem` script from another "
                "directory, or take that folder off PYTHONPATH",
                param="PYTHONPATH",
            )


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when `host:port` cannot be listened on, with who may hold it and a port that is free."""
    problem = listen_problem(host, port)
    if problem is None:
        return
    if problem.errno == errno.EADDRINUSE:
        free = next((p for p in range(port + 1, min(port + 200, 65536)) if listen_problem(host, p) is None), None)
        another = f"--port {free}" if free else "another --port"
        raise ConfigError(f"port {port} on {host} is taken{holder(port)}; stop that, or use {another}", param="gateway.port")
    if problem.errno == errno.EACCES:
        raise ConfigError(f"port {port} needs privileges that this user has not; use --port 8000", param="gateway.port")
    raise ConfigError(f"cannot listen on {host}: {problem.strerror or problem}; see --host", param="gateway.host")


def listen_problem(host: str, port: int) -> OSError | None:
    """What the kernel says to listening there; None when it would be fine."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection's last minute does not count
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def holder(port: int) -> str:
    """` by NAME (process PID)` of who listens on it, as far as this user may see; else a hint."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address and address.port == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())[:80]
                return f" by process {connection.pid} ({command})"
    except (psutil.Error, OSError):
        pass
    return f" by a process of another user (`ss -ltnp sport = :{port}` as root names it)"
