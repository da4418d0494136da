"""The launcher's files pass Ray's own schema; they, the Serve file and the application agree with each other."""

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


FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "serve.yaml")


@pytest.fixture(scope="module")
def ray_schema() -> dict[str, Any]:
    ray = pytest.importorskip("ray")
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    if not path.exists():
        pytest.skip(f"this Ray ({ray.__version__}) ships no ray-schema.json")
    return json.loads(path.read_text())


def test_there_is_a_file_for_each_place() -> None:
    assert set(FILES) == {f"{name}.yaml" for name in ("one-machine", "one-gpu", "on-premises", "aws", "gcp", "azure")}


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_cluster_file(name: str, ray_schema: dict[str, Any]) -> None:
    import jsonschema

    cluster = load(name)
    jsonschema.validate(cluster, ray_schema)
    for wrong in ({"max_worker": 0}, {"max_workers": "none"}, {"setup_commands": {"a": "b"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(cluster | wrong, ray_schema)
    nameless = copy.deepcopy(cluster)
    del nameless["cluster_name"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(nameless, ray_schema)


@pytest.mark.parametrize("name", [name for name in FILES if load(name)["provider"]["type"] == "local"])
def test_the_launcher_itself_prepares_it(name: str) -> None:
    """The schema knows nothing of what the local provider refuses (node types, missing addresses)."""
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import fillout_defaults, prepare_config

    cluster = load(name)
    prepared = prepare_config(fillout_defaults(cluster))
    assert prepared["max_workers"] == len(cluster["provider"]["worker_ips"])
    assert all("RAY_enable_autoscaler_v2=0" in command for command in cluster["head_start_ray_commands"] if "ray_node" in command)


@pytest.mark.parametrize("name", FILES)
def test_the_commands_name_what_the_repository_has(name: str) -> None:
    cluster = load(name)
    assert cluster["file_mounts"] == {
        REPOSITORY_THERE: ".",
        "~/.tandem/cluster.env": f"~/.tandem/clusters/{cluster['cluster_name']}.env",
    }
    kinds = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    commands = [command for kind in kinds for command in cluster.get(kind, ())]
    scripts = {word for command in commands for word in re.findall(r"~/tandem/(\S+)", command)}
    assert ".ci/setup" in scripts
    for script in scripts - {".venv/bin/ray", ".venv/bin/python", ".venv/bin/pip"}:
        assert (ROOT / script).exists(), f"{script} is not in the repository"
    for command in commands:
        shlex.split(command)  # balanced quotes


@pytest.mark.parametrize("name", FILES)
def test_ray_is_started_by_what_sets_the_token_and_the_ports(name: str) -> None:
    """`cluster.ray_node`, whose own tests look at what it starts (tests/cluster/test_up.py)."""
    for kind in ("head", "worker"):
        for command in load(name)[f"{kind}_start_ray_commands"]:
            assert command.endswith("ray stop") or f"-m cluster.ray_node {kind}" in command
            if "ray_node" in command:
                ray_node_options(command)
    assert load("serve.yaml")["http_options"]["host"] == "127.0.0.1"


def ray_node_options(command: str) -> None:
    """It parses, that is."""
    words = shlex.split(command)
    from cluster import ray_node

    seen = []
    original = ray_node.start_ray
    ray_node.start_ray = lambda *a: seen.append(a) or 0  # type: ignore[assignment, func-returns-value]
    own, read = ray_node.own_addresses, ray_node.read_env
    ray_node.own_addresses, ray_node.read_env = lambda: {"10.0.0.2", "10.0.0.1"}, lambda path: {}
    try:
        words = [word.replace("$RAY_HEAD_IP", "10.0.0.1") for word in words[words.index("cluster.ray_node") + 1 :]]
        assert ray_node.main(words) == 0
    finally:
        ray_node.start_ray, ray_node.own_addresses, ray_node.read_env = original, own, read
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "azure.yaml"])
def test_a_cloud_has_machines_of_both_roles_and_an_idle_head(name: str) -> None:
    cluster = load(name)
    kinds = cluster["available_node_types"]
    assert kinds[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    for role in ("prefill", "decode"):
        assert kinds[role]["resources"] == {f"tandem_{role}": 1, "tandem_control": 1}
        assert kinds[role]["labels"] == {"tandem-role": role}
        assert 1 <= kinds[role]["min_workers"] <= kinds[role]["max_workers"]
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) == cluster["max_workers"]


def test_the_application_is_a_configuration() -> None:
    application = load("serve.yaml")["applications"][0]
    assert application["import_path"] == "cluster.app:build"
    check(msgspec.convert(application["args"]["config"], Config))


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
    assert not {Path(name).stem for name in (*FILES, "serve.yaml")} & set(presets())
