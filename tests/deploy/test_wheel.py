"""The wheel, built from what the image's build sees, holds all that serving needs and nothing else; installed into an environment
of its own it serves from any folder. Dependencies are not downloaded: that environment looks into the one of the tests for them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MUST = (
    "models/bundled/model.safetensors",
    "models/bundled/tokenizer.json",
    "models/toy_files/config.json",
    "configs/general.yaml",
    "configs/low-latency.yaml",
    "configs/tenants.example.yaml",
    "configs/ray/on-premises.yaml",
    "configs/observability/rules.yml",
    "cluster/leaving.py",
    "tandem.py",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in wanted:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.mark.more
def test_the_wheel_has_what_serving_needs_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not set(MUST) - set(names)
    pages = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "api").rglob("*") if path.suffix in (".html", ".css", ".js", ".svg")
    ]
    assert pages
    assert not set(pages) - set(names)
    modules = {path.relative_to(ROOT).as_posix() for name in ("cluster", "api", "kernels") for path in (ROOT / name).rglob("*.py")}
    assert not modules - set(names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "helm", "docs", "examples") or "__pycache__" in name]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scripts of a new environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True, system_site_packages=False)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, timeout=200)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # behind the environment's own
    return folder / "bin"


def clean_environment(folder: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", "TMPDIR": "/tmp"}


@pytest.mark.more
def test_commands_work_from_any_folder(installed: Path, tmp_path: Path) -> None:
    for command in (
        ["version"],
        ["config", "show", "--preset", "low-latency"],
        ["doctor", "--port", "18999"],
        ["deploy", "--print"],
    ):
        done = subprocess.run(
            [str(installed / "tandem"), *command],
            cwd="/",
            env=clean_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    where = "import cluster, tandem; print(cluster.__file__, tandem.__file__)"
    done = subprocess.run(
        [str(installed / "python"), "-c", where], cwd="/", env=clean_environment(tmp_path), capture_output=True, text=True
    )
    assert all(path.startswith(str(installed.parent)) for path in done.stdout.split()), done.stdout + done.stderr


@pytest.mark.more
@pytest.mark.timeout(300)
def test_it_serves_from_the_root_folder(installed: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [str(installed / "tandem"), "serve", "--port", str(port)]
    with (
        open(log, "w") as file,
        subprocess.Popen(command, cwd="/", env=clean_environment(tmp_path), stdout=file, stderr=file) as process,
    ):
        try:
            deadline = time.monotonic() + 180
            while get(f"http://127.0.0.1:{port}/ready") != 200:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            body = {"model": "bundled", "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.loads(answer.read())
            assert found["usage"]["completion_tokens"] == 12
            assert get(f"http://127.0.0.1:{port}/dashboard") == 200
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(90)
    assert process.returncode == 0
    assert not any((Path("/") / name).exists() for name in ("cluster", "api.log")), "something was left in the folder"
    assert os.listdir(tmp_path)  # the log, and what Ray keeps in a home


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
