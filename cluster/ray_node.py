"""What a host of a cluster file (configs/ray/*.yaml) runs: `python -m cluster.ray_node COMMAND`. Ray's launcher calls it over ssh.

    head [--prefill RANKS] [--decode RANKS]  Ray's head here; without work, but where it is the only machine
    worker --head ADDRESS [--prefill HOSTS] [--decode HOSTS]
                                             a Ray node here; HOSTS is like 10.0.0.2,10.0.0.3:4 and says which hosts take how many
                                             ranks of the role; without them the cluster file's node types say so (clouds)
    deploy FILE                              hand a Serve configuration to the Ray here (on the head)
    wait SECONDS                             until the application runs and answers (on the head)
    leave SECONDS                            drain what runs on this host, then stop its Ray
    end SECONDS                              end the application, draining all of it, then stop this host's Ray (on the head)
    stop                                     stop this host's Ray at once
    alive                                    the addresses of the nodes that Ray counts as alive, one a line (on the head)

All of them read ~/.tandem/cluster.env: RAY_AUTH_TOKEN, TANDEM_CLUSTER_SECRET, TANDEM_GATEWAY_API_KEY, the same on every host. Ray's
ports are fixed (RAY_PORTS), so that a firewall can list them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.placement import HEAD
from protocol.errors import ConfigError

ENV_FILE = Path("~/.tandem/cluster.env")
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # the launcher's, on the head only
SECRETS = ("RAY_AUTH_TOKEN", "TANDEM_CLUSTER_SECRET", "TANDEM_GATEWAY_API_KEY")
GCS_PORT = 6379
RAY_PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-grpc-port": 6383,
    "dashboard-agent-listen-port": 52365,
    "metrics-export-port": 8080,
    "min-worker-port": 10002,
    "max-worker-port": 10999,
}
CONTROL = "tandem_control"
ROLES = ("prefill", "decode")
ATTEMPTS = 3
# A host that refuses connections is dead to Ray after 4 s, one that is silent after a minute: a head whose cable is out for half of
# that loses nobody. Tandem's own heartbeats know within seconds.
PATIENCE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "15000",
    "RAY_health_check_failure_threshold": "4",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.ray_node", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser("head")
    for role in ROLES:
        head.add_argument(f"--{role}", type=int, default=0)
    worker = commands.add_parser("worker")
    worker.add_argument("--head", required=True)
    for role in ROLES:
        worker.add_argument(f"--{role}", default="")
    deploy = commands.add_parser("deploy")
    deploy.add_argument("file")
    commands.add_parser("stop")
    for name in ("wait", "leave", "end"):
        commands.add_parser(name).add_argument("seconds", type=float)
    commands.add_parser("alive")
    args = parser.parse_args(argv)
    try:
        os.environ.update(read_env(ENV_FILE.expanduser()))
        return int(globals()[f"run_{args.command}"](args))
    except ConfigError as error:
        print(f"tandem: {error.message}", file=sys.stderr)
        return 2


def read_env(path: Path) -> dict[str, str]:
    """NAME=VALUE lines. Raises ConfigError."""
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `tandem up` makes it and the cluster file mounts it") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} holds secrets and others can read it: chmod 600 {path}")
    found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    missing = [name for name in SECRETS if len(found.get(name, "")) < 16]
    if missing:
        raise ConfigError(f"{path} has no {', '.join(missing)} of at least 16 characters")
    return found


# ---- starting Ray ------------------------------------------------------------------------------------------------------


def run_head(args: argparse.Namespace) -> int:
    address = head_address(BOOTSTRAP.expanduser())
    options = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false", "--ray-client-server-port=10001"]
    offered = {f"tandem_{role}": getattr(args, role) for role in ROLES if getattr(args, role)}
    if offered:
        options.append(f"--resources={json.dumps({**offered, CONTROL: 1})}")
    if BOOTSTRAP.expanduser().exists():
        options.append(f"--autoscaling-config={BOOTSTRAP.expanduser()}")
    return start_ray(address, options, PATIENCE)


def run_worker(args: argparse.Namespace) -> int:
    tables = {role: hosts_of(getattr(args, role)) for role in ROLES}
    named = {host for table in tables.values() for host in table}
    here = own_addresses()
    if named:
        address = next((host for host in named if host in here), None)
        if address is None:
            raise ConfigError(
                f"this host ({', '.join(sorted(here))}) is in neither --prefill nor --decode of worker_start_ray_commands"
            )
    else:
        address = address_towards(args.head)
    offered = {f"tandem_{role}": table[address] for role, table in tables.items() if address in table}
    options = [f"--address={args.head}:{GCS_PORT}"]
    if named:  # else the launcher tells `ray start` what the node type has
        options.append(f"--resources={json.dumps({**offered, CONTROL: 1})}")
    return start_ray(address, options, {})


def start_ray(address: str, options: list[str], more: Mapping[str, str]) -> int:
    """-> the exit status of `ray start`."""
    ports = [f"--{name}={port}" for name, port in RAY_PORTS.items()]
    environment = {
        **os.environ,
        **more,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TANDEM_CONTROL_RESOURCE": CONTROL,
        "TANDEM_SCHEDULER_RESOURCE": HEAD,
        "TANDEM_TRANSFER_BIND_HOST": address,
    }
    environment.pop("OMP_NUM_THREADS", None)  # the launcher exports 1, and workers would inherit it
    os.chdir(Path.home())  # Ray's processes look for modules where they were started
    command = [_ray(), "start", f"--node-ip-address={address}", *options, *ports]
    for attempt in range(1, ATTEMPTS + 1):
        status = subprocess.run(command, env=environment).returncode
        if status == 0:
            break
        # Ray gives its agent 15 s to start, and nobody can change that: a busy disk or a resolver that is silent takes longer.
        again = "; it is tried again" if attempt < ATTEMPTS else ""
        print(f"tandem: Ray did not start on {address} (attempt {attempt} of {ATTEMPTS}){again}", file=sys.stderr, flush=True)
        subprocess.run([_ray(), "stop", "--force"], env=environment)
    return status


def _ray() -> str:
    beside = Path(sys.executable).with_name("ray")
    return str(beside) if beside.exists() else "ray"


def hosts_of(text: str) -> dict[str, int]:
    """ "10.0.0.2,10.0.0.3:4" -> ranks by host. Raises ConfigError."""
    found = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        host, _, units = part.partition(":")
        if not units:
            units = "1"
        if not units.isdecimal() or int(units) < 1:
            raise ConfigError(f"{part!r} is not a host, or a host and a number of ranks such as 10.0.0.3:4")
        found[host] = int(units)
    return found


def own_addresses() -> set[str]:
    import psutil

    return {entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET}


def address_towards(peer: str) -> str:
    """Of this host, on the way to `peer`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, GCS_PORT))  # a datagram socket: nothing is sent
        except OSError as error:
            raise ConfigError(f"no way from this host to {peer}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def head_address(bootstrap: Path) -> str:
    """The head's own address: the cluster file's where it names one (hosts of ours), else the one that others would see."""
    if bootstrap.exists():
        provider = yaml.safe_load(bootstrap.read_text()).get("provider", {})
        if provider.get("head_ip"):
            return str(provider["head_ip"])
    return address_towards("192.0.2.1")  # any address beyond this host


# ---- on the head, once Ray runs ----------------------------------------------------------------------------------------


def join() -> Any:
    """ray, connected to the cluster of this host. Raises ConfigError."""
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    address = f"{head_address(BOOTSTRAP.expanduser())}:{GCS_PORT}"
    try:
        ray.init(address=address, namespace="tandem", log_to_driver=False, logging_level="WARNING")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"no Ray at {address} ({type(error).__name__}: {reason}); was it started here?") from None
    return ray


def run_deploy(args: argparse.Namespace) -> int:
    from cluster.deploy import apply

    found = yaml.safe_load(Path(args.file).expanduser().read_text())
    ray = join()
    from ray import serve

    try:
        serve.start(proxy_location=found["proxy_location"], http_options=found["http_options"])
        apply(found)
    finally:
        ray.shutdown()
    print("deployed")
    return 0


def run_wait(args: argparse.Namespace) -> int:
    ray = join()
    from ray import serve

    deadline, said = time.monotonic() + args.seconds, ""
    try:
        while True:
            application = serve.status().applications.get("tandem")
            words = {
                name: f"{d.status.value.lower()} {sum(d.replica_states.values())}" for name, d in application.deployments.items()
            } if application is not None else {}  # fmt: skip
            state = ", ".join(f"{name} {what}" for name, what in words.items()) or "nothing is deployed"
            if state != said:
                print(state, flush=True)
                said = state
            if application is not None and application.status.value == "RUNNING" and answers():
                print("ready", flush=True)
                return 0
            if application is not None and application.status.value == "DEPLOY_FAILED":
                raise ConfigError(
                    f"it cannot start: {application.message.strip().splitlines()[-1] if application.message else state}"
                )
            if time.monotonic() > deadline:
                raise ConfigError(f"not ready after {args.seconds:g} s: {state}; `ray status` on the head may know what is missing")
            time.sleep(1)
    finally:
        ray.shutdown()


def answers() -> bool:
    from ray.serve._private.api import _get_global_client

    options = _get_global_client().http_config
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    try:
        with urllib.request.urlopen(f"http://{host}:{options.port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def run_alive(args: argparse.Namespace) -> int:
    ray = join()
    try:
        for node in ray.nodes():
            if node["Alive"]:
                print(node["NodeManagerAddress"])
    finally:
        ray.shutdown()
    return 0


def run_end(args: argparse.Namespace) -> int:
    try:
        ray = join()
    except ConfigError as error:
        print(f"tandem: nothing is drained: {error.message}", file=sys.stderr)
        return run_stop(args)
    from ray import serve

    gone = threading.Thread(target=lambda: serve.delete("tandem"), daemon=True)  # it waits for the replicas, without a deadline
    gone.start()
    gone.join(args.seconds)
    if gone.is_alive():
        print(f"tandem: still draining after {args.seconds:g} s; it ends now", file=sys.stderr)
    else:
        ray.shutdown()
    return run_stop(args)


def run_stop(args: argparse.Namespace) -> int:
    return subprocess.run([_ray(), "stop"]).returncode


def run_leave(args: argparse.Namespace) -> int:
    from cluster import leaving

    os.environ["RAY_AUTH_MODE"] = "token"
    leaving.main([str(args.seconds)])
    return run_stop(args)


if __name__ == "__main__":
    sys.exit(main())
