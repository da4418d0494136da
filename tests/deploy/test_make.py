"""`make` in a folder with spaces: flags arrive whole, Ctrl-C reaches the server, make says nothing of its own, and a
set-up that is done costs nothing. The server and the set-up are stand-ins: what is tested is the Makefile and .ci/setup.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

SERVER = """#!/bin/sh
'''exec' "{python}" "$0" "$@" # an interpreter's path may hold spaces
' '''
import json, signal, sys, time
def stop(number, frame):
    print("stopped by", signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print(json.dumps(sys.argv[1:]), flush=True)
time.sleep(60)
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    script(folder / ".ci" / "setup", "#!/bin/sh\nexit 0\n")
    script(folder / ".venv" / "bin" / "tandem", SERVER.format(python=sys.executable))
    return folder


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["ctrl-c", "terminate"])
def test_serve_passes_flags_on_and_stops_in_silence(checkout: Path, number: signal.Signals, to_group: bool) -> None:
    """Ctrl-C goes to every process of the terminal's foreground group; a supervisor's SIGTERM goes to make alone."""
    process = subprocess.Popen(
        ["make", "serve", 'ARGS=toy --port 8123 --set "a=b c"'],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == '["serve", "toy", "--port", "8123", "--set", "a=b c"]\n'
    (os.killpg if to_group else os.kill)(process.pid, number)
    rest, _ = process.communicate(timeout=30)
    assert rest == f"stopped by {number.name}\n"


def test_a_failure_of_the_set_up_stops_make(checkout: Path) -> None:
    script(checkout / ".ci" / "setup", "#!/bin/sh\necho 'no python' >&2\nexit 1\n")
    done = subprocess.run(["make", "serve"], cwd=checkout, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "no python" in done.stderr
    assert done.stdout == ""


def test_every_target_is_explained(checkout: Path) -> None:
    done = subprocess.run(["make"], cwd=checkout, capture_output=True, text=True, timeout=30)
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert listed == set(phony.split()[1:])


def ready_checkout(folder: Path) -> Path:
    """A checkout whose set-up for tests is done, as far as .ci/setup can tell."""
    script(folder / ".ci" / "setup", (ROOT / ".ci" / "setup").read_text())
    shutil.copy(ROOT / "pyproject.toml", folder)
    script(folder / ".venv" / "bin" / "tandem", "")
    # No interpreter in .venv/bin: anything that wanted to install would have to make one first.
    script(folder / "probe" / "python3", "#!/bin/sh\necho asked >>asked\nexit 1\n")
    script(folder / "probe" / "nvidia-smi", "#!/bin/sh\nexit 1\n")
    key = subprocess.run(["cksum"], input=(ROOT / "pyproject.toml").read_bytes(), capture_output=True, check=True)
    stamp = f"{key.stdout.decode().strip()} cpu torch==2.13.0  {folder} */__init__.py"
    (folder / ".venv" / ".ready-test").write_text(stamp)
    return folder


def set_up(folder: Path, kind: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in {"TORCH", "TORCH_INDEX", "PYTHON"}}
    path = f"{folder / 'probe'}{os.pathsep}{os.environ['PATH']}"
    env = clean | {"PATH": path, "PYTHON": "python3"} | env
    return subprocess.run([".ci/setup", kind], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", ["serve", "test"])
def test_a_set_up_that_is_done_does_nothing(checkout: Path, kind: str) -> None:
    folder = ready_checkout(checkout)
    started = time.monotonic()
    done = set_up(folder, kind)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (folder / "asked").exists()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("change", ["kind", "dependencies", "torch", "place", "package"])
def test_a_set_up_that_is_not_done_begins(checkout: Path, change: str) -> None:
    folder = ready_checkout(checkout)
    env = {}
    if change == "dependencies":
        (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n")
    elif change == "torch":
        env["TORCH"] = "torch==2.12.0"
    elif change == "place":
        folder = folder.rename(folder.parent / "moved")
    elif change == "package":
        script(folder / "extra" / "__init__.py", "")
    done = set_up(folder, "dev" if change == "kind" else "test", **env)
    assert done.returncode == 1
    assert "is not a Python >= 3.11" in done.stderr
    assert (folder / "asked").exists()


def test_continuous_integration_reads_no_stdin_and_points_at_the_data(checkout: Path) -> None:
    script(checkout / ".ci" / "run", (ROOT / ".ci" / "run").read_text())
    (checkout.parent / "shared" / "traces").mkdir(parents=True)
    makefile = 'test:\n\t@echo "traces $$TANDEM_TRACES crds $$TANDEM_CRDS"; cat\ntest-more:\n\t@echo more; cat\n'
    (checkout / "Makefile").write_text(makefile)
    # Stand-ins for what it would otherwise install with apt-get.
    for tool in ("python3", "apt-get"):
        script(checkout / "probe" / tool, "#!/bin/sh\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    clean["PATH"] = f"{checkout / 'probe'}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(
        [".ci/run"], cwd=checkout, env=clean, input="must not be read", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"traces {checkout}/../shared/traces crds \nmore\n"
