"""`tandem doctor --cluster`: can every host reach every other where KV and control messages travel? Who, whom, which port.

On each node of the Ray cluster that takes workers, an actor opens a socket just as a worker does (transfer.bind_host and
transfer.port_range, as that host sees them); then each of them calls at all the others, and at the workers that are running.
Nothing is changed; the actors end with the command. Called by `cli.py`; RAY_ADDRESS or the Ray of this machine.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, NamedTuple

import msgspec

from cluster.doctor import MISSING, NOTE, OK, Finding, report
from configs.schema import Config
from kvtransfer.listening import address_here, bind_of, listen, why
from protocol.errors import ConfigError

REACH_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
HELLO = b"tandem doctor\n"


class Place(NamedTuple):
    """Where one host would listen. problem: why it could not."""

    host: str
    address: str
    port: int
    problem: str = ""


class Reached(NamedTuple):
    """problem: empty when it answered."""

    seconds: float
    problem: str = ""


class Probe:
    """On one host: a door like a worker's, and a hand that knocks at others."""

    def __init__(self, config_json: bytes) -> None:
        from cluster.group import config_here

        self._transfer = config_here(config_json).transfer
        self._listener: socket.socket | None = None

    def open(self) -> Place:
        name = socket.gethostname()
        try:
            bind = bind_of(self._transfer)
            self._listener = listen(bind.host, bind.ports)
        except ConfigError as error:
            return Place(name, self._transfer.bind_host, 0, error.message)
        except OSError as error:
            return Place(name, address_here(self._transfer.bind_host), 0, error.strerror or str(error))
        threading.Thread(target=self._answer, daemon=True).start()
        return Place(name, bind.host, self._listener.getsockname()[1])

    def _answer(self) -> None:
        assert self._listener is not None
        while True:
            try:
                caller, _ = self._listener.accept()
                with caller:
                    caller.sendall(HELLO)
            except OSError:
                return

    def reach(self, address: str, port: int, expected: bytes = HELLO) -> Reached:
        """expected: what whoever listens there says first; empty: anything, or nothing."""
        began = time.monotonic()
        try:
            with socket.create_connection((address, port), REACH_TIMEOUT_S) as sock:
                sock.settimeout(REACH_TIMEOUT_S)
                if expected and sock.recv(len(expected), socket.MSG_WAITALL) != expected:
                    return Reached(time.monotonic() - began, "somebody else answers there")
        except OSError as error:
            return Reached(time.monotonic() - began, why(error))
        return Reached(time.monotonic() - began)


def examine(config: Config, as_json: bool) -> int:
    """Prints the findings. 0 unless a pair cannot talk."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace="tandem", log_to_driver=False, logging_level="WARNING")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"no Ray cluster can be joined from here ({type(error).__name__}: {reason}); RAY_ADDRESS names one"
        ) from None
    try:
        return report(findings(ray, config), as_json)
    finally:
        ray.shutdown()


def findings(ray: Any, config: Config) -> list[Finding]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and any(name.startswith("tandem_") for name in node["Resources"])]
    if not nodes:
        return [
            Finding(
                MISSING, "nodes", "no node of this Ray takes workers", "start them with --resources tandem_prefill, tandem_decode"
            )
        ]
    made = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        made.append(ray.remote(Probe).options(num_cpus=0, scheduling_strategy=strategy).remote(msgspec.json.encode(config)))
    places: list[Place] = ray.get([probe.open.remote() for probe in made], timeout=START_TIMEOUT_S)
    out = [node_finding(place, len(nodes)) for place in places]
    calls = [
        (here, there, probe.reach.remote(there.address, there.port))
        for here, probe in zip(places, made, strict=True)
        for there in places
        if here is not there and not here.problem and not there.problem
    ]
    timeout = REACH_TIMEOUT_S * 2 * len(nodes) + START_TIMEOUT_S
    answers = ray.get([call for _, _, call in calls], timeout=timeout)
    out += [pair_finding(here, there, reached, config) for (here, there, _), reached in zip(calls, answers, strict=True)]
    return out + worker_findings(ray, places, made)


def node_finding(place: Place, num_nodes: int) -> Finding:
    if place.problem:
        return Finding(
            MISSING, place.host, f"it cannot listen on {place.address}: {place.problem}", "see --bind-host and --port-range"
        )
    text = f"its workers listen on {place.address}"
    if num_nodes > 1 and place.address.startswith("127."):
        todo = "--bind-host 10.0.0.0/16 (the hosts' network), or TANDEM_TRANSFER_BIND_HOST on each host"
        return Finding(MISSING, place.host, f"{text}: no other host reaches loopback", todo)
    return Finding(OK, place.host, text)


def pair_finding(here: Place, there: Place, reached: Reached, config: Config) -> Finding:
    name = f"{here.host} -> {there.host}"
    where = f"{there.address}:{there.port}"
    if not reached.problem:
        return Finding(OK, name, f"{here.address} reaches {where} ({reached.seconds * 1000:.1f} ms)")
    ports = config.transfer.port_range or "all ports (or fix them with --port-range)"
    todo = f"let TCP from {here.address} to {there.address}, {ports}, pass"
    return Finding(
        MISSING, name, f"{here.address} cannot reach {where} (tcp, from the first to the second): {reached.problem}", todo
    )


def worker_findings(ray: Any, places: list[Place], probes: list[Any]) -> list[Finding]:
    """The running workers' control sockets, from every host; a note when nothing is deployed."""
    from cluster.sizes import SCHEDULER

    try:
        status = ray.get(ray.get_actor(SCHEDULER[0], namespace=SCHEDULER[1]).status.remote(), timeout=10)
    except (ValueError, ray.exceptions.RayError):
        return [Finding(NOTE, "workers", "nothing is deployed here, so no worker was called at")]
    out = []
    for row in status.get("workers", ()):
        host, _, port = str(row.get("address", "")).rpartition(":")
        if not row.get("alive") or not port.isdecimal():
            continue
        for here, probe in zip(places, probes, strict=True):
            reached = ray.get(probe.reach.remote(host, int(port), b""), timeout=REACH_TIMEOUT_S * 3)
            name = f"{here.host} -> {row['name']}"
            if reached.problem:
                out.append(
                    Finding(MISSING, name, f"{here.address} cannot reach {host}:{port} (tcp, from the first): {reached.problem}")
                )
            else:
                out.append(Finding(OK, name, f"{here.address} reaches {host}:{port} ({reached.seconds * 1000:.1f} ms)"))
    return out
