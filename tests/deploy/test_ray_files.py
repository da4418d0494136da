"""The launcher's file passes Ray's own schema; it, the Serve file and the application agree with each other."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from configs.check import check
from configs.load import presets
from configs.schema import Config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "ray"
REPOSITORY_THERE = "~/tandem"


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def start_command(cluster: dict[str, Any]) -> str:
    return next(command for command in cluster["head_start_ray_commands"] if "ray start" in command)


@pytest.fixture(scope="module")
def ray_schema() -> dict[str, Any]:
    ray = pytest.importorskip("ray")
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    if not path.exists():
        pytest.skip(f"this Ray ({ray.__version__}) ships no ray-schema.json")
    return json.loads(path.read_text())


def test_ray_accepts_the_cluster_file(ray_schema: dict[str, Any]) -> None:
    import jsonschema

    cluster = load("one-machine.yaml")
    jsonschema.validate(cluster, ray_schema)
    for wrong in ({"max_worker": 0}, {"max_workers": "none"}, {"setup_commands": {"a": "b"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(cluster | wrong, ray_schema)
    nameless = copy.deepcopy(cluster)
    del nameless["cluster_name"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(nameless, ray_schema)


def test_the_launcher_itself_prepares_it() -> None:
    """The schema knows nothing of what the local provider refuses (node types, missing addresses)."""
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import fillout_defaults, prepare_config

    prepared = prepare_config(fillout_defaults(load("one-machine.yaml")))
    assert prepared["max_workers"] == 0


def test_the_commands_name_what_the_repository_has() -> None:
    cluster = load("one-machine.yaml")
    assert cluster["file_mounts"] == {REPOSITORY_THERE: "."}
    commands = cluster["setup_commands"] + cluster["head_start_ray_commands"]
    scripts = {word for command in commands for word in re.findall(r"~/tandem/(\S+)", command)}
    assert ".ci/setup" in scripts
    for script in scripts - {".venv/bin/ray", ".venv/bin/python"}:
        assert (ROOT / script).exists(), f"{script} is not in the repository"
    for command in commands:
        shlex.split(command)  # balanced quotes


def test_nothing_listens_beyond_loopback_and_rays_token_is_on() -> None:
    command = start_command(load("one-machine.yaml"))
    assert "RAY_AUTH_MODE=token" in command
    assert "--node-ip-address=127.0.0.1" in command
    assert "--dashboard-host=127.0.0.1" in command
    assert load("serve.yaml")["http_options"]["host"] == "127.0.0.1"


def test_the_application_is_a_configuration_that_the_cluster_has_room_for() -> None:
    application = load("serve.yaml")["applications"][0]
    assert application["import_path"] == "cluster.app:build"
    config = msgspec.convert(application["args"]["config"], Config)
    check(config)
    words = shlex.split(start_command(load("one-machine.yaml")))
    resources = json.loads(next(word.removeprefix("--resources=") for word in words if word.startswith("--resources=")))
    assert resources["tandem_prefill"] >= config.prefill.replicas
    assert resources["tandem_decode"] >= config.decode.replicas


def test_serve_reads_its_file() -> None:
    pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(load("serve.yaml")).applications[0].name == "tandem"


def test_the_application_builds_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from cluster.app import build

    monkeypatch.setenv("TANDEM_CLUSTER_SECRET", "s" * 32)
    assert build(load("serve.yaml")["applications"][0]["args"])


def test_these_files_are_not_taken_for_presets() -> None:
    assert not {"one-machine", "serve"} & set(presets())
