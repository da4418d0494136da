"""`tandem up` and `tandem down`: what is wrong is said before the launcher is called, each in a sentence; secrets are made once."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli, ray_node, up, up_checks
from configs.load import load
from protocol.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GOOD = "python=3.11\nrsync=/usr/bin/rsync\nhome=yes\nhost=x\nclock=$(date +%s)"
SSH = """#!/bin/bash
# stands in for ssh: the last argument but one is user@host; answers.HOST says what it says and how it ends
words=("$@")
host=${words[-2]#*@}
echo "$*" >>"$(dirname "$0")/calls"
source "$(dirname "$0")/answers.$host"
"""


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """answer(host, text, status, error); hosts answer well until told otherwise."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("ssh", SSH), ("rsync", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)

    def answer(host: str, text: str = GOOD, status: int = 0, error: str = "") -> None:
        (tools / f"answers.{host}").write_text(f'echo "{text}"\necho "{error}" >&2\nexit {status}\n')

    for host in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        answer(host)
    key = tmp_path / ".ssh" / "id_ed25519"
    key.parent.mkdir()
    key.touch(mode=0o600)
    return answer


def cluster_of(tmp_path: Path, name: str = "on-premises.yaml", **changes: Any) -> up_checks.Cluster:
    raw = yaml.safe_load((ROOT / "configs" / "ray" / name).read_text()) | changes
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    return up_checks.read(str(path))


def said(cluster: up_checks.Cluster, *argv: str) -> list[str]:
    args = cli.build_parser().parse_args(["up", str(cluster.path), *argv])
    return up_checks.problems(cluster, cli.resolve(args, {}).config)


def test_nothing_is_in_the_way_of_the_example_where_its_machines_answer(machines: Any, tmp_path: Path) -> None:
    assert said(cluster_of(tmp_path)) == []
    calls = (tmp_path / "tools" / "calls").read_text()
    assert all(f"ubuntu@10.0.0.{i}" in calls for i in (1, 2, 3))
    assert calls.count("BatchMode=yes") == 3, "nobody is asked for a password"


@pytest.mark.parametrize(
    ("host", "answer", "sentence"),
    [
        ("10.0.0.2", {"status": 255, "error": "Permission denied (publickey)."}, "10.0.0.2: ssh does not take the key"),
        ("10.0.0.1", {"status": 255, "error": "connect to host x port 22: Connection refused"}, "no sshd listens"),
        ("10.0.0.3", {"status": 255, "error": "connect: No route to host"}, "10.0.0.3: no way there from here"),
        ("10.0.0.3", {"status": 255, "error": "ssh: connect to host x port 22: Connection timed out"}, "a firewall"),
        ("10.0.0.2", {"text": GOOD.replace("3.11", "3.9")}, "10.0.0.2: it has Python 3.9; Tandem needs 3.11"),
        ("10.0.0.2", {"text": GOOD.replace("3.11", "")}, "10.0.0.2: it has no python3"),
        ("10.0.0.2", {"text": GOOD.replace("/usr/bin/rsync", "")}, "10.0.0.2: it has no rsync"),
        ("10.0.0.2", {"text": GOOD.replace("yes", "")}, "the home folder of ubuntu cannot be written"),
        ("10.0.0.2", {"text": GOOD.replace("$(date +%s)", "$(($(date +%s) - 500))")}, "10.0.0.2: its clock is 50"),
    ],
)
def test_what_a_machine_lacks_is_said(machines: Any, tmp_path: Path, host: str, answer: dict[str, Any], sentence: str) -> None:
    machines(host, **answer)
    (problem,) = said(cluster_of(tmp_path))
    assert sentence in problem


def test_all_that_is_wrong_is_said_at_once(machines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines("10.0.0.1", status=255, error="No route to host")
    machines("10.0.0.3", text="")
    path = str(cluster_of(tmp_path).path)
    assert cli.main(["up", path, "--decode", "5", "--check"]) == 2
    text = capsys.readouterr().err
    for part in ("5 ranks of decode", "10.0.0.1: no way", "10.0.0.3: it has no python3", "10.0.0.3: it has no rsync"):
        assert part in text
    assert not (tmp_path / ".tandem").exists(), "a check makes nothing"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"file_mounts": {"~/tandem": "."}},
            "file_mounts lacks `~/.tandem/cluster.env: ~/.tandem/clusters/tandem-on-premises.env`",
        ),
        ({"auth": {"ssh_user": "u", "ssh_private_key": "~/.ssh/nope"}}, "auth.ssh_private_key ~/.ssh/nope does not exist"),
        (
            {"provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}},
            "gives 10.0.0.3 a role, and it is not among worker_ips",
        ),
        (
            {"provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3", "10.0.0.1"]}},
            "10.0.0.1 is among worker_ips, and worker_start_ray_commands gives it no role",
        ),
    ],
)
def test_a_file_at_odds_with_itself_is_said(machines: Any, tmp_path: Path, changes: Any, sentence: str) -> None:
    assert any(sentence in problem for problem in said(cluster_of(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"provider": {"type": "abacus"}}, "provider.type 'abacus' is none of local, aws, gcp, azure"),
        ({"provider": {"type": "local"}}, "provider.head_ip is missing"),
        ({"cluster_name": None}, "has no cluster_name"),
        ({"max_worker": 3}, "max_worker"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, changes: Any, sentence: str) -> None:
    pytest.importorskip("jsonschema")
    with pytest.raises(ConfigError, match=sentence):
        cluster_of(tmp_path, **changes)


def test_a_key_that_others_can_read_is_said(machines: Any, tmp_path: Path) -> None:
    (tmp_path / ".ssh" / "id_ed25519").chmod(0o644)
    assert "chmod 600" in said(cluster_of(tmp_path))[0]


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("on-premises.yaml", {"prefill": 1, "decode": 1}),
        ("one-machine.yaml", {"prefill": 1, "decode": 1}),
        ("one-gpu.yaml", {"prefill": 1, "decode": 1}),
        ("aws.yaml", {"prefill": 1, "decode": 2}),
        ("gcp.yaml", {"prefill": 1, "decode": 2}),
        ("azure.yaml", {"prefill": 1, "decode": 2}),
    ],
)
def test_how_many_ranks_a_file_has_room_for(tmp_path: Path, name: str, room: dict[str, int]) -> None:
    assert up_checks.room(cluster_of(tmp_path, name)) == room


def test_secrets_are_made_once_and_readable_by_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "clusters" / "x.env"
    up.make_secrets(path)
    first = ray_node.read_env(path)
    assert set(first) == set(ray_node.SECRETS)
    assert len(set(first.values())) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    up.make_secrets(path)
    assert ray_node.read_env(path) == first
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read it"):
        up.make_secrets(path)
    path.chmod(0o600)
    path.write_text("RAY_AUTH_TOKEN=short\n")
    with pytest.raises(ConfigError, match="has no RAY_AUTH_TOKEN, TANDEM_CLUSTER_SECRET, TANDEM_GATEWAY_API_KEY"):
        ray_node.read_env(path)


# ---- on the hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The `ray start` commands that would have run, and their environments."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(ray_node.subprocess, "run", lambda command, env: seen.append((command, env)) or Done())
    monkeypatch.setattr(ray_node, "own_addresses", lambda: {"127.0.0.1", "10.0.0.3"})
    monkeypatch.setattr(ray_node.os, "chdir", lambda path: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in (*ray_node.SECRETS, "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
    up.make_secrets(tmp_path / ".tandem" / "cluster.env")
    return seen


def test_a_worker_finds_its_address_and_its_roles_in_the_tables(started: Any) -> None:
    assert ray_node.main(["worker", "--head", "10.0.0.1", "--prefill", "10.0.0.2", "--decode", "10.0.0.2,10.0.0.3:4"]) == 0
    ((command, environment),) = started
    options = dict(word.removeprefix("--").split("=", 1) for word in command[2:])
    assert options["node-ip-address"] == "10.0.0.3"
    assert options["address"] == "10.0.0.1:6379"
    assert json.loads(options["resources"]) == {"tandem_decode": 4, "tandem_control": 1}
    assert {name: int(options[name]) for name in ray_node.RAY_PORTS} == ray_node.RAY_PORTS
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["TANDEM_TRANSFER_BIND_HOST"] == "10.0.0.3"
    assert "OMP_NUM_THREADS" not in environment


def test_a_worker_that_nobody_knows_does_not_start(started: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ray_node.main(["worker", "--head", "10.0.0.1", "--prefill", "10.0.0.8", "--decode", "10.0.0.9"]) == 2
    assert "is in neither --prefill nor --decode" in capsys.readouterr().err
    assert ray_node.main(["worker", "--head", "10.0.0.1", "--decode", "10.0.0.3:many"]) == 2
    assert started == []


def test_a_head_does_no_work_unless_it_is_the_only_machine(started: Any, tmp_path: Path) -> None:
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: local, head_ip: 10.0.0.1}\n")
    assert ray_node.main(["head"]) == 0
    assert ray_node.main(["head", "--prefill", "1", "--decode", "2"]) == 0
    (idle, environment), (busy, _) = started
    assert {"--num-cpus=0", "--node-ip-address=10.0.0.1", "--include-dashboard=false"} <= set(idle)
    assert not [word for word in idle if word.startswith("--resources")]
    assert '--resources={"tandem_prefill": 1, "tandem_decode": 2, "tandem_control": 1}' in busy
    names = ("period_ms", "timeout_ms", "failure_threshold")
    period, timeout, threshold = (int(environment[f"RAY_health_check_{name}"]) for name in names)
    assert period * threshold <= 5_000, "a host that refuses connections"
    assert (period + timeout) * threshold > 30_000, "a host that is silent"


def test_rays_start_is_tried_again(started: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[str] = []

    class Done:
        def __init__(self, command: list[str], env: Any) -> None:
            commands.append(command[1])
            self.returncode = 1 if commands.count("start") < 3 and command[1] == "start" else 0

    monkeypatch.setattr(ray_node.subprocess, "run", Done)
    assert ray_node.main(["worker", "--head", "10.0.0.1", "--decode", "10.0.0.3"]) == 0
    assert commands == ["start", "stop", "start", "stop", "start"]
    assert "attempt 1 of 3" in capsys.readouterr().err


def test_the_ports_are_those_of_the_chart() -> None:
    chart = (ROOT / "helm" / "tandem" / "templates" / "_helpers.tpl").read_text()
    for name, port in ray_node.RAY_PORTS.items():
        assert f'{name}: "{port}"' in chart


def test_what_up_deploys_is_the_document_of_deploy() -> None:
    assert up.document(load(env={}).config)["applications"][0]["import_path"] == "cluster.app:build"
