"""`tandem up FILE` and `tandem down FILE`: a cluster by Ray's launcher, with checks in words before and an endpoint after.

up: checks, secrets (made once), `ray up`, the nodes, the application, ready. down: what runs may end, `ray down`. The launcher's
own output is shown as it comes. Called by `cli.py`.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from cluster import up_checks
from cluster.deploy import document
from cluster.ray_node import SECRETS, read_env
from configs.load import Resolved
from protocol.errors import ConfigError, TandemError

JOIN_TIMEOUT_S = 900.0  # of all machines; each installs first
READY_TIMEOUT_S = 600.0
LEAVE_S = 30.0
PLACEHOLDER = "the key that tandem up makes"
SERVE_FILE = "~/.tandem/serve.yaml"


def up(path: str, resolved: Resolved, only_check: bool) -> int:
    cluster = up_checks.read(path)
    _refuse(up_checks.problems(cluster, resolved.config), path)
    if only_check:
        print(f"{path}: nothing is in the way")
        return 0
    make_secrets(cluster.env_file)
    _ray(cluster, "up", "--yes", "--no-config-cache")
    expected = 1 + _num_workers(cluster)
    if not _wait_for_nodes(cluster, expected):
        raise TandemError(f"not all {expected} machines joined within {JOIN_TIMEOUT_S:.0f} s; `ray monitor {path}` shows why")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document(resolved.config), file)
        file.flush()
        _ray(cluster, "rsync-up", file.name, SERVE_FILE)
    _on_head(cluster, f"deploy {SERVE_FILE}")
    _on_head(cluster, f"wait {READY_TIMEOUT_S:.0f}")
    gateway = resolved.config.gateway
    print(f"\nready: http://{gateway.host}:{gateway.port}/v1 on the head; the key is TANDEM_GATEWAY_API_KEY in {cluster.env_file}")
    return 0


def down(path: str) -> int:
    cluster = up_checks.read(path)
    problems = up_checks.problems(cluster, None)
    head = cluster.hosts[0] if cluster.hosts else None
    if any(head is None or problem.startswith(f"{head}:") or ":" not in problem for problem in problems):
        _refuse(problems, path)
    for problem in problems:  # a dead worker is no reason to keep the others
        print(f"note: {problem}", file=sys.stderr)
    if head is not None:
        _stop_hosts(cluster, [head], f"end {LEAVE_S:.0f}")  # first: as long as it lives, it starts workers anew
        _stop_hosts(cluster, cluster.hosts[1:], "stop")  # the launcher stops the head only; the others would notice after a minute
    _ray(cluster, "down", "--yes")
    return 0


def _stop_hosts(cluster: up_checks.Cluster, hosts: list[str], words: str) -> None:
    """In parallel. Whoever cannot be reached is named, and has no part in the cluster any more."""
    command = _login(f"{_python(cluster)} -m cluster.ray_node {words}")

    def stop(host: str) -> None:
        done = up_checks.ssh(cluster, host, command, LEAVE_S + 90)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["?"])[-1]
            print(f"note: {host} was not stopped in good order: {said}", file=sys.stderr)

    with ThreadPoolExecutor(max(1, min(16, len(hosts)))) as pool:
        list(pool.map(stop, hosts))


def _refuse(problems: list[str], path: str) -> None:
    if problems:
        text = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{path}: {len(problems)} {'things are' if len(problems) > 1 else 'thing is'} in the way:\n{text}")


def make_secrets(path: Path) -> None:
    """Once: tokens that others know already are kept. Raises ConfigError when the file is there and not right."""
    if path.exists():
        read_env(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write("# Secrets of one cluster; the same on all of its machines. Made by `tandem up`.\n")
        file.writelines(f"{name}={secrets.token_hex(32)}\n" for name in SECRETS)
    print(f"made {path}")


def _num_workers(cluster: up_checks.Cluster) -> int:
    if cluster.provider == "local":
        return len(cluster.hosts) - 1
    kinds = cluster.raw.get("available_node_types", {})
    return sum(int(kind.get("min_workers", 0)) for name, kind in kinds.items() if name != cluster.raw.get("head_node_type"))


def _wait_for_nodes(cluster: up_checks.Cluster, expected: int) -> bool:
    deadline, said = time.monotonic() + JOIN_TIMEOUT_S, -1
    while time.monotonic() < deadline:
        done = _ray(cluster, "exec", f"{_python(cluster)} -m cluster.ray_node alive", quiet=True)
        joined = sum(1 for line in done.stdout.splitlines() if _is_address(line.strip()))
        if joined != said:
            print(f"{joined} of {expected} machines are there", flush=True)
            said = joined
        if joined >= expected:
            return True
        time.sleep(3)
    return False


def _is_address(text: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _on_head(cluster: up_checks.Cluster, words: str) -> None:
    _ray(cluster, "exec", f"{_python(cluster)} -m cluster.ray_node {words}")


def _python(cluster: up_checks.Cluster) -> str:
    """The interpreter that the file's own commands use there."""
    for command in cluster.raw.get("head_start_ray_commands") or ():
        words = shlex.split(str(command))
        if "cluster.ray_node" in words:
            return " ".join(words[: words.index("cluster.ray_node") - 1])
    return "~/tandem/.venv/bin/python"


def _login(command: str) -> str:
    return f"bash --login -c {shlex.quote(command)}"


def _ray(cluster: up_checks.Cluster, verb: str, *words: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """The launcher. Raises TandemError when it fails (not when quiet)."""
    program = Path(sys.executable).with_name("ray")
    options = [word for word in words if word.startswith("--")]
    rest = [word for word in words if not word.startswith("--")]
    command = [str(program) if program.exists() else "ray", verb, *options, str(cluster.path), *rest]
    environment = {
        **os.environ,
        **(read_env(cluster.env_file) if cluster.env_file.exists() else {}),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(command, env=environment, text=True, capture_output=quiet, stdin=subprocess.DEVNULL)
    if done.returncode and not quiet:
        raise TandemError(f"`ray {verb} {cluster.path}` failed (exit status {done.returncode}); what it said is above")
    return done
