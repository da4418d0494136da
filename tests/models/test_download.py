"""Downloads against servers of our own: ModelScope's interface whole, resumed and damaged; a hub that cannot be reached."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from models.locate import locate
from protocol.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
FILES = {"config.json": b'{"architectures": []}', "model.safetensors": bytes(range(256)) * 20, "weights.bin": b"unwanted"}


class Hub:
    """Serves FILES as org/name at revision master."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.damaged = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                hub.requests.append(f"{query.get('FilePath', 'listing')} {self.headers.get('Range', '')}".strip())
                if not url.path.startswith("/api/v1/models/org/name/repo") or query.get("Revision") != "master":
                    self.send_error(404)
                    return
                if url.path.endswith("/files"):
                    body, start = hub.listing(), 0
                else:
                    body = FILES[query["FilePath"]]
                    if hub.damaged:
                        body = body[:-1] + b"?"
                    start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:])

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def listing(self) -> bytes:
        entries = [{"Path": name, "Type": "blob", "Sha256": hashlib.sha256(body).hexdigest()} for name, body in FILES.items()]
        entries += [{"Path": "../../evil.json", "Type": "blob"}, {"Path": "sub", "Type": "tree"}]
        return json.dumps({"Code": 200, "Data": {"Files": entries}}).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_modelscope_fetches_what_is_needed_once(hub: Hub, tmp_path: Path) -> None:
    folder = locate("modelscope:org/name")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", ".complete"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not list(tmp_path.rglob("evil.json"))
    count = len(hub.requests)
    assert locate("modelscope:org/name") == folder
    assert len(hub.requests) == count


def test_modelscope_goes_on_where_it_stopped(hub: Hub) -> None:
    folder = locate("modelscope:org/name")
    (folder / ".complete").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.part").write_bytes(FILES["model.safetensors"][:1000])
    locate("modelscope:org/name")
    assert hub.requests[-1] == "model.safetensors bytes=1000-"
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_modelscope_damage_and_absence(hub: Hub) -> None:
    hub.damaged = True
    with pytest.raises(ModelError, match=r"arrived with sha256 .* start again"):
        locate("modelscope:org/name")
    with pytest.raises(ModelError, match="modelscope:org/other could not be downloaded.*404.*check the id"):
        locate("modelscope:org/other")
    with pytest.raises(ModelError, match="is no id like"):
        locate("modelscope:../..")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """One sentence with the endpoint and what to do, within seconds."""
    code = (
        "from models.locate import locate\nfrom protocol.errors import ModelError\n"
        "try:\n    locate('org/name')\nexcept ModelError as error:\n    print(error.message)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert "org/name" in result.stdout, result.stderr
    assert "HF_ENDPOINT (now http://127.0.0.1:9)" in result.stdout
    assert result.stdout.count("\n") == 1
