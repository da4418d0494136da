"""What only a real `tandem serve` can show of its options: addresses, the key, connections, processes; and that `kill` stops it."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.served import Served, serve

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

KEY = "a-key-of-the-tests"
HOST = "127.0.0.2"  # on Linux all of 127/8 is this machine
ARGV = (
    "toy --prefill 1 --decode 1 --served-model-name mine --max-num-seqs 3 --block-size 16 --num-gpu-blocks-override 99 "
    f"--kv-transport tcp --preset low-latency --host {HOST} --seed 3 --set gateway.keep_alive_s=2 "
    "--bind-host lo --port-range 28800-28839"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("flags")
    with serve(folder, *ARGV.split(), env={"TANDEM_GATEWAY_API_KEY": KEY}, ready=False) as running:
        running.url = f"http://{HOST}:{running.port}"
        running.wait(running.is_healthy, 120, "healthy")
        running.wait(lambda: len(alive(running)) == 2, 60, "both workers")
        yield running


def ask(served: Served, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(served.url + path, data, headers), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def alive(served: Served) -> dict[str, Any]:
    rows = ask(served, "/dashboard/data?once=1")[1]["status"]["workers"]
    return {row["name"]: row for row in rows if row["alive"]}


def test_host_and_port_are_listened_on_and_nothing_else(served: Served) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", served.port), timeout=5)
    listening = {
        tuple(connection.laddr)
        for process in served.processes()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == served.port
    }
    assert listening == {(HOST, served.port)}
    assert f"curl {served.url}/v1/chat/completions" in served.log.read_text()


def test_our_own_sockets_are_on_the_interface_and_within_the_ports_that_were_given(served: Served) -> None:
    """Beside them a process of ours has what Ray and Serve open in it: two ports, on loopback as well."""
    found: dict[str, list[tuple[str, int]]] = {}
    for process in served.processes():
        title = (process.cmdline() or [""])[0]
        if title.startswith("tandem:"):
            connections = process.net_connections(kind="tcp")
            found[title] = [tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN]
    for name in ("scheduler", "gateway", "prefill", "decode"):
        (listening,) = (ports for title, ports in found.items() if name in title)
        ours = [address for address in listening if 28800 <= address[1] <= 28839]
        assert len(ours) == (2 if name == "decode" else 1), f"{name}: {listening}"  # control; a decode worker also takes KV
        assert {host.removeprefix("::ffff:") for host, _ in listening} == {"127.0.0.1"}, name


def test_a_key_is_asked_for_and_never_shown(served: Served) -> None:
    assert ask(served, "/v1/models", key=None)[0] == 401
    assert ask(served, "/v1/models", key="wrong")[0] == 401
    assert ask(served, "/v1/models")[1]["data"][0]["id"] == "mine"
    text = served.log.read_text()
    assert "$TANDEM_GATEWAY_API_KEY" in text
    assert KEY not in text
    for process in served.processes():
        assert KEY not in " ".join(process.cmdline())


def test_workers_of_other_processes_have_what_was_asked_for(served: Served) -> None:
    rows = alive(served)
    for row in rows.values():
        assert row["stats"]["num_free_blocks"] == 99
    assert rows["decode:0"]["max_num_seqs"] == 3
    before = rows["decode:0"]["stats"]["transfer_bytes"]
    status, answer = ask(served, "/v1/completions", {"model": "mine", "prompt": list(range(80)), "max_tokens": 4})
    assert status == 200, answer
    served.wait(lambda: alive(served)["decode:0"]["stats"]["transfer_bytes"] > before, 10, "KV came over tcp")
    pid = served.pid_of("tandem:prefill:0")
    peers = [c.raddr.port for c in psutil.Process(pid).net_connections(kind="tcp") if c.raddr]
    ports = [
        c.laddr.port
        for c in psutil.Process(served.pid_of("tandem:decode:0")).net_connections(kind="tcp")
        if c.status == psutil.CONN_LISTEN
    ]
    assert set(peers) & set(ports)


def test_an_idle_connection_is_closed_after_keep_alive(served: Served) -> None:
    with socket.create_connection((HOST, served.port), timeout=20) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        while sock.recv(4096):
            pass
        assert 1.0 < time.monotonic() - began < 10.0


def test_kill_stops_everything_and_leaves_nothing_behind(served: Served) -> None:
    children = served.processes()
    assert children
    folder = next(word for child in children for arg in child.cmdline() for word in re.findall(r"/[\w/]*/tandem-[\w-]+", arg))
    assert Path(folder).is_dir()
    served.process.send_signal(signal.SIGTERM)
    served.process.send_signal(signal.SIGTERM)  # as a supervisor may: not a wish for haste
    assert served.process.wait(60) == 0
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left, left
    assert not Path(folder).exists()
    assert "stopped" in served.tail()
    assert "Traceback" not in served.log.read_text()
