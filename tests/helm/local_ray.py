"""A Ray in the shape of the chart's: a head without work, and a node of each worker group; the rendered Serve configuration on it.

Run by test_deployed.py in a process of its own: `python -m tests.helm.local_ray PORT`, the RayService's document on standard input.
The nodes offer what the worker groups do. Says `ready`, then a line of JSON: on which node each of our actors is. Each further line
of standard input is a further Serve configuration (JSON), applied in place; says `applied`. Ends with standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.request
from typing import Any

import yaml


def main(port: int) -> None:
    service = json.loads(sys.stdin.readline())
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from cluster.deploy import apply

    spec = service["spec"]["rayClusterConfig"]
    head: dict[str, Any] = {"num_cpus": int(spec["headGroupSpec"]["rayStartParams"]["num-cpus"]), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 100 << 20})
    ray.init(address=cluster.address, namespace="tandem", log_to_driver=False)
    names = {ray.nodes()[0]["NodeID"]: "head"}
    for group in spec["workerGroupSpecs"]:
        offered = {name: float(value) for name, value in group["resources"].items()}
        for i in range(group["replicas"]):
            node = cluster.add_node(num_cpus=1, resources=offered, object_store_memory=100 << 20)
            names[node.node_id] = f"{group['groupName']}-{i}"
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    http = {"host": "127.0.0.1", "port": port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=http)  # one machine has one such port
        apply({**config, "proxy_location": "HeadOnly", "http_options": http})
        wait_for(lambda: is_ready(port), 180, "ready")
        print("ready", flush=True)
        where = {}
        for actor in ray._private.state.actors().values():
            if actor["State"] == "ALIVE":
                where[actor["Name"] or actor["ActorClassName"]] = names.get(actor["Address"]["NodeID"], "?")
        print(json.dumps(where), flush=True)
        for line in sys.stdin:
            apply({**json.loads(line), "proxy_location": "HeadOnly", "http_options": http})
            wait_for(lambda: "DEPLOYING" in str(application().status), 60, "taken up")
            wait_for(lambda: "RUNNING" in str(application().status), 180, "applied")
            print("applied", flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def application() -> Any:
    from ray import serve

    return serve.status().applications["tandem"]


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            print(f"not {what} after {seconds:g} s: {application()}", file=sys.stderr)
            raise SystemExit(1)
        threading.Event().wait(0.2)


if __name__ == "__main__":
    main(int(sys.argv[1]))
