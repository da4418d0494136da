"""What `tandem up` and `tandem down` look at before Ray's launcher is called, each in a sentence. Called by `up.py`.

The launcher itself fails late and in Ray's words: after minutes, on the fourth machine, with a traceback.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cluster.ray_node import ROLES, hosts_of
from configs.schema import Config
from protocol.errors import ConfigError

SSH_TIMEOUT_S = 8
PROVIDERS = {"local": (), "aws": ("boto3",), "gcp": ("googleapiclient",), "azure": ("azure.mgmt.compute", "azure.identity")}
# What each machine is asked, in one go: name=answer lines.
QUESTION = (
    "echo python=$(python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])' 2>/dev/null); "
    "echo rsync=$(command -v rsync); echo home=$(test -w ~ && echo yes); echo host=$(hostname); echo clock=$(date +%s)"
)
MAX_SKEW_S = 30


class Cluster(NamedTuple):
    """A cluster file, read."""

    path: Path
    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["cluster_name"])

    @property
    def provider(self) -> str:
        return str(self.raw["provider"]["type"])

    @property
    def hosts(self) -> list[str]:
        """Those that stand in the file: none on a cloud."""
        provider = self.raw["provider"]
        return [str(provider["head_ip"]), *map(str, provider.get("worker_ips") or ())] if self.provider == "local" else []

    @property
    def env_file(self) -> Path:
        """Where this machine keeps the cluster's secrets."""
        return Path(f"~/.tandem/clusters/{self.name}.env").expanduser()


def read(path: str) -> Cluster:
    """Raises ConfigError with what is wrong, by Ray's own schema."""
    try:
        raw = yaml.safe_load(Path(path).expanduser().read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the repository's configs/ray has examples") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("provider"), dict) or not raw.get("cluster_name"):
        raise ConfigError(f"{path} is not a cluster file: it has no cluster_name or no provider")
    kind = raw["provider"].get("type")
    if kind not in PROVIDERS:
        raise ConfigError(
            f"{path}: provider.type {kind!r} is none of {', '.join(PROVIDERS)}, which Tandem knows", param="provider.type"
        )
    if kind == "local" and not raw["provider"].get("head_ip"):
        raise ConfigError(f"{path}: provider.head_ip is missing", param="provider.head_ip")
    for message in schema_errors(raw):
        raise ConfigError(f"{path}: {message}")
    return Cluster(Path(path).expanduser().resolve(), raw)


def schema_errors(raw: dict[str, Any]) -> list[str]:
    """By Ray's schema for cluster files; nothing where jsonschema is not installed, and the launcher is left to say it."""
    spec = importlib.util.find_spec("ray")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("jsonschema") is None:
        return []
    import jsonschema

    schema = json.loads((Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text())
    found = jsonschema.Draft7Validator(schema).iter_errors(raw)
    return [f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {error.message}" for error in found]


def problems(cluster: Cluster, config: Config | None) -> list[str]:
    """Everything that would make it fail, in words. config: what is to be deployed; none: nothing is (down)."""
    out = []
    if shutil.which("rsync") is None or shutil.which("ssh") is None:
        out.append("this machine has no ssh or no rsync, which Ray's launcher uses: apt-get install openssh-client rsync")
    missing = [name for name in PROVIDERS[cluster.provider] if _absent(name)]
    if missing:
        out.append(
            f"provider {cluster.provider} needs {', '.join(missing)} here: the first lines of its example say what to install"
        )
    if config is not None:
        out += _mount_problems(cluster)
        out += _room_problems(cluster, config)
    if cluster.provider == "local":
        key = _key_problem(cluster)
        out += [key] if key else _host_problems(cluster, config is not None)
    return out


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


def _mount_problems(cluster: Cluster) -> list[str]:
    mounts = {there: str(here) for there, here in (cluster.raw.get("file_mounts") or {}).items()}
    source = mounts.get("~/.tandem/cluster.env")
    if source is None or Path(source).expanduser() != cluster.env_file:
        return [f"file_mounts lacks `~/.tandem/cluster.env: ~/.tandem/clusters/{cluster.name}.env`: no secrets would be there"]
    out = []
    for here in mounts.values():
        path = Path(here).expanduser()
        if path != cluster.env_file and not path.exists():
            out.append(f"file_mounts: {here} is not on this machine" + (" (you are not in the repository)" if here == "." else ""))
    if mounts.get("~/tandem") == "." and not Path(".ci/setup").exists():
        out.append("file_mounts copies this folder to ~/tandem, and it is not the repository: call `tandem up` from there")
    return out


def _room_problems(cluster: Cluster, config: Config) -> list[str]:
    """Whether the machines take as many ranks of each role as the configuration has."""
    offered = room(cluster)
    out = []
    for role in ROLES:
        wanted = sum(getattr(one, role).most * getattr(one, role).parallel.num_ranks for one in config.each())
        if offered is not None and wanted > offered[role]:
            out.append(
                f"{wanted} ranks of {role} are asked for (--{role}), and the machines of {cluster.path.name} take {offered[role]}; "
                "give fewer, or more machines (or ranks of a machine, HOST:RANKS)"
            )
    if cluster.provider == "local" and offered is not None:
        named = {host for role in ROLES for host in _table(cluster, role)}
        idle = [host for host in map(str, cluster.raw["provider"].get("worker_ips") or ()) if host not in named]
        out += [
            f"{host} is among worker_ips, and worker_start_ray_commands gives it no role (--prefill, --decode)" for host in idle
        ]
        unknown = named - set(cluster.hosts)
        out += [f"worker_start_ray_commands gives {host} a role, and it is not among worker_ips" for host in sorted(unknown)]
    return out


def room(cluster: Cluster) -> dict[str, int] | None:
    """Ranks by role; None where the file's commands are not ours."""
    if cluster.provider != "local":
        kinds = cluster.raw.get("available_node_types", {}).values()
        return {
            role: sum(kind.get("resources", {}).get(f"tandem_{role}", 0) * kind.get("max_workers", 0) for kind in kinds)
            for role in ROLES
        }
    if not any("cluster.ray_node" in command for command in _commands(cluster, "worker") + _commands(cluster, "head")):
        return None
    return {role: sum(_table(cluster, role).values()) + _head_units(cluster, role) for role in ROLES}


def _commands(cluster: Cluster, kind: str) -> list[str]:
    return [str(command) for command in cluster.raw.get(f"{kind}_start_ray_commands") or ()]


def _option(commands: list[str], role: str) -> str:
    for command in commands:
        words = shlex.split(command)
        if "cluster.ray_node" in words:
            for i, word in enumerate(words):
                if word == f"--{role}" and i + 1 < len(words):
                    return words[i + 1]
                if word.startswith(f"--{role}="):
                    return word.partition("=")[2]
    return ""


def _table(cluster: Cluster, role: str) -> dict[str, int]:
    return hosts_of(_option(_commands(cluster, "worker"), role))


def _head_units(cluster: Cluster, role: str) -> int:
    text = _option(_commands(cluster, "head"), role)
    return int(text) if text.isdecimal() else 0


# ---- machines of one's own ---------------------------------------------------------------------------------------------


def _key_problem(cluster: Cluster) -> str | None:
    name = cluster.raw.get("auth", {}).get("ssh_private_key")
    if name is None:
        return None  # ssh's own defaults
    key = Path(name).expanduser()
    if not key.exists():
        return f"auth.ssh_private_key {name} does not exist: ssh-keygen -t ed25519 -f {name}, then ssh-copy-id it to each machine"
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        return f"auth.ssh_private_key {name} can be read by others, so ssh will not use it: chmod 600 {name}"
    return None


def ssh(cluster: Cluster, host: str, command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs it there, as the launcher would log in, but never asks anything."""
    auth = cluster.raw.get("auth", {})
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}", "-o", "StrictHostKeyChecking=no"]
    options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]  # as Ray's launcher does
    if auth.get("ssh_private_key"):
        options += ["-i", str(Path(auth["ssh_private_key"]).expanduser()), "-o", "IdentitiesOnly=yes"]
    if auth.get("ssh_proxy_command"):
        options += ["-o", f"ProxyCommand={auth['ssh_proxy_command']}"]
    where = f"{auth['ssh_user']}@{host}" if auth.get("ssh_user") else host
    try:
        return subprocess.run(["ssh", *options, where, command], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 255, "", f"no answer within {timeout_s:g} s")


def _host_problems(cluster: Cluster, is_up: bool) -> list[str]:
    hosts = list(dict.fromkeys(cluster.hosts))
    with ThreadPoolExecutor(min(16, len(hosts))) as pool:
        found = list(pool.map(lambda host: _host_problem(cluster, host, is_up), hosts))
    return [problem for problems_ in found for problem in problems_]


def _host_problem(cluster: Cluster, host: str, is_up: bool) -> list[str]:
    import time

    done = ssh(cluster, host, QUESTION, SSH_TIMEOUT_S + 20)
    if done.returncode == 255:
        return [f"{host}: {_why_ssh(done.stderr)}"]
    if not is_up:
        return []
    answers = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    out = []
    version = tuple(int(part) for part in re.findall(r"\d+", answers.get("python", ""))[:2])
    if version < (3, 11):
        has = f"has Python {answers['python']}" if version else "has no python3"
        out.append(f"{host}: it {has}; Tandem needs 3.11 or newer there")
    if not answers.get("rsync"):
        out.append(f"{host}: it has no rsync, with which Ray's launcher copies files: apt-get install rsync")
    if answers.get("home") != "yes":
        out.append(
            f"{host}: the home folder of {cluster.raw.get('auth', {}).get('ssh_user', os.environ.get('USER'))} cannot be written"
        )
    skew = abs(time.time() - float(answers.get("clock") or 0))
    if skew > MAX_SKEW_S:
        out.append(
            f"{host}: its clock is {skew:.0f} s away from the one here; set it (chrony), or deadlines of keys and logs mislead"
        )
    return out


def _why_ssh(text: str) -> str:
    line = (text.strip().splitlines() or ["ssh failed and did not say why"])[-1]
    for sign, words in (
        (
            "Permission denied",
            "ssh does not take the key: ssh-copy-id it to that user (auth.ssh_user, auth.ssh_private_key)",
        ),
        ("Connection refused", "the machine is there and no sshd listens: apt-get install openssh-server"),
        ("No route to host", "no way there from here: a wrong address, or it is switched off"),
        ("timed out", "no answer: a wrong address, a firewall, or it is switched off"),
        ("no answer within", "no answer: a wrong address, a firewall, or it is switched off"),
        ("Could not resolve", "its name is unknown here"),
    ):
        if sign in line:
            return f"{words} ({line})"
    return line
