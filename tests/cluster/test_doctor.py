"""The doctor on this machine, and its verdicts on machines that are not at hand."""

from __future__ import annotations

import json
import socket
from importlib import metadata
from pathlib import Path

import pytest

from cluster import doctor
from cluster.doctor import MISSING, NOTE, OK, Finding, examine, findings, gpu
from configs.load import load
from configs.schema import Config


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert examine(load(sets=[f"gateway.port={port}"]).config) == 0
    out = capsys.readouterr().out
    for name in ("python", "ray", "torch", "cpu", "memory", "device cpu", "shm", "tmp", "loopback", "port", "kernels"):
        assert any(line[8:].startswith(name) for line in out.splitlines()), name
    assert "this check failed" not in out
    assert "nothing that is needed is missing" in out


def test_json_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.system))
    assert examine(Config(), as_json=True) == 0
    assert [row["level"] for row in json.loads(capsys.readouterr().out)] == [OK, OK]


def test_a_taken_port_is_a_note_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = by_name(doctor.network(load(sets=[f"gateway.port={taken.getsockname()[1]}"]).config))
    assert found["port"].level == NOTE
    assert "by process" in found["port"].text
    assert "--port" in found["port"].todo


def test_hugging_faces_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.5" if name == "kernels" else real(name))
    (found,) = doctor.kernels_package(Config())
    assert found.level == MISSING
    assert "pip uninstall kernels" in found.todo


def test_what_is_not_installed_is_missing_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("ray", "xxhash"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: ["ray[serve]>=2.60", "xxhash>=3.5", "torch", "cupy; extra == 'gpu'"])
    found = by_name(doctor.packages(Config()))
    assert found["packages"].level == MISSING
    assert found["packages"].todo == "pip install ray xxhash"
    monkeypatch.setattr(doctor, "CHECKS", (doctor.packages,))
    assert examine(Config()) == 1
    assert "1 of what is needed is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "triton", "says"),
    [((9, 0), "3.9.0", "untested"), ((7, 5), "3.9.0", "not supported"), ((8, 0), None, "Triton is not installed")],
)
def test_verdicts_on_gpus(capability: tuple[int, int], triton: str | None, says: str) -> None:
    found = gpu(0, "Some GPU", capability, 80 * 2**30, triton)
    assert found.level == NOTE
    assert says in found.text
    assert "80 GiB" in found.text
    assert found.todo


def test_a_gpu_that_was_asked_for_and_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_name(doctor.devices(load(flags={"model.device": "cuda"}).config))
    assert found["device cuda"].level == MISSING
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "NVIDIA H200")
    found = by_name(doctor.devices(Config()))
    assert found["device cuda"].level == NOTE
    assert "NVIDIA H200, but this torch" in found["device cuda"].text


def test_shared_memory_that_is_refused_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor.shared_memory(Config())
    assert found.level == OK
    monkeypatch.setattr(doctor, "_CHILD", "print(99999, flush=True)")
    (found,) = doctor.shared_memory(Config())
    assert found.level == NOTE
    assert "tcp" in found.todo


def test_a_tmp_that_cannot_be_written_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    (found,) = doctor.files(Config())
    assert found.level == MISSING
    assert "TMPDIR" in found.todo


def test_models() -> None:
    assert by_name(doctor.model(Config()))["model"].level == OK
    assert "hub" in doctor.model(load(flags={"model.name": "someone/something"}).config)[0].text
    (found,) = doctor.model(load(flags={"model.name": "/tmp"}).config)
    assert found.level == MISSING
    assert "config.json" in found.text


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config) -> list[Finding]:
        raise RuntimeError("odd machine")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.python))
    found = findings(Config())
    assert [f.level for f in found] == [NOTE, OK]
    assert "odd machine" in found[0].text
