"""Nginx and HAProxy in front of a server that streams: tokens come through as they are made, strangers' limits hold, what is for
insiders stays inside, and a client that leaves is noticed. The files are the repository's, with this test's addresses in them.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HOSTS = Path(__file__).resolve().parents[2] / "configs" / "hosts"
PIECES, PAUSE_S = 6, 0.25


class Server(http.server.BaseHTTPRequestHandler):
    """/v1/...: PIECES pieces, PAUSE_S apart. Whether a client stayed to the end is in `left`."""

    protocol_version = "HTTP/1.1"
    left: list[str] = []
    seen: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(PIECES):
                data = f"data: {number}\n\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
                time.sleep(PAUSE_S)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.left.append(self.path)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made.server_address[1]
    made.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run([*command, *files], check=True, capture_output=True)
    (folder / "tls.pem").write_text((folder / "tls.crt").read_text() + (folder / "tls.key").read_text())


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, f"{old} is not in the file any more"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def front(request: pytest.FixtureRequest, server: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    name: str = request.param
    program = shutil.which(name) or shutil.which(f"/usr/sbin/{name}")
    if program is None or shutil.which("openssl") is None:
        pytest.skip(f"{name} or openssl is not installed here (apt-get install nginx-light haproxy)")
    folder, port = tmp_path_factory.mktemp(name), free_port()
    certificate(folder)
    upstream = f"127.0.0.1:{server}"
    if name == "nginx":
        pairs = [("server tandem:8000;", f"server {upstream};"), ("listen 8443 ssl;", f"listen 127.0.0.1:{port} ssl;")]
        pairs += [
            ("pid /run/nginx.pid", f"pid {folder}/pid"),
            ("/etc/tandem/tls/", f"{folder}/"),
            ("/tmp/nginx_", f"{folder}/tmp_"),
        ]
        text = replaced((HOSTS / "nginx.conf").read_text(), *pairs)
        if "http2 off;" in text and version(program) < (1, 25):  # older ones have no such word, and it is off there
            text = text.replace("http2 off;", "#")
        check, run = ["-t", "-c"], ["-g", "daemon off; user root;", "-c"]
    else:
        pairs = [("server one tandem:8000", f"server one {upstream}"), ("bind :8443", f"bind 127.0.0.1:{port}")]
        pairs += [("/etc/tandem/tls/", f"{folder}/")]
        text = replaced((HOSTS / "haproxy.cfg").read_text(), *pairs)
        check, run = ["-c", "-f"], ["-db", "-f"]
    file = folder / "conf"
    file.write_text(text)
    checked = subprocess.run([program, *check, str(file)], capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "[WARNING]" not in checked.stderr
    with open(folder / "log", "w") as log, subprocess.Popen([program, *run, str(file)], stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 20
            while ask(port, "GET", "/ready")[0] != 200:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            yield port
            assert "Bearer" not in (folder / "log").read_text()
        finally:
            process.terminate()
            process.wait(10)


def version(program: str) -> tuple[int, int]:
    text = subprocess.run([program, "-v"], capture_output=True, text=True).stderr
    major, minor = text.rpartition("/")[2].split(".")[:2]
    return int(major), int(minor)


def connect(port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = connect(port)
    try:
        connection.request(method, path, body, {"Authorization": "Bearer abc"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def test_each_piece_arrives_when_it_is_made(front: int) -> None:
    connection = connect(front)
    connection.request("POST", "/v1/completions", b"{}", {"Authorization": "Bearer abc"})
    answer = connection.getresponse()
    arrivals, text = [], b""
    while piece := answer.read1(65536):
        arrivals.append(time.monotonic())
        text += piece
    connection.close()
    assert text == b"".join(b"data: %d\n\n" % number for number in range(PIECES))
    gaps = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
    assert len(gaps) >= PIECES - 1, "pieces were held back and came together"
    assert min(gaps[: PIECES - 1]) > PAUSE_S / 5
    assert ("/v1/completions", "Bearer abc") in Server.seen


@pytest.mark.parametrize("path", ["/admin/sla", "/dashboard", "/dashboard/data", "/metrics", "/load", "/openapi.json"])
def test_what_is_for_insiders_stays_inside(front: int, path: str) -> None:
    Server.seen.clear()
    assert ask(front, "GET", path)[0] == 403
    assert not [seen for seen in Server.seen if seen[0] != "/ready"]  # which HAProxy asks by itself


def test_a_body_beyond_the_cap_is_refused_by_the_front(front: int) -> None:
    Server.seen.clear()
    connection = connect(front)
    with contextlib.suppress(OSError):
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", str(33 << 20))
        connection.endheaders()
        assert connection.getresponse().status == 413
    connection.close()
    assert not [seen for seen in Server.seen if seen[0] != "/ready"]


def test_a_header_that_never_ends_is_cut_off(front: int) -> None:
    raw = socket.create_connection(("127.0.0.1", front), 20)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(raw) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        sock.settimeout(20)
        began = time.monotonic()
        answer = sock.recv(1000)
    assert time.monotonic() - began < 15
    assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0]


def test_a_client_that_leaves_ends_its_request(front: int) -> None:
    Server.left.clear()
    connection = connect(front)
    connection.request("POST", "/v1/leaving", b"{}")
    connection.getresponse().read1(100)
    connection.close()
    deadline = time.monotonic() + PIECES * PAUSE_S + 3
    while not Server.left and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Server.left == ["/v1/leaving"]
