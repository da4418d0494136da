"""Two raylets on one machine with a prefill and a decode worker each, and the second one lost and brought back.

Run by test_serve_faults.py in a process of its own: `python -m tests.system.two_nodes PORT [scheduler]`; with the word, the
scheduler is on the second node. A line `lose` on standard input kills the
second node's raylet; `add` starts another. Says `ready`, `lost` and `added`.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from typing import Any

import msgspec

from cluster.launch import _is_healthy
from configs.schema import Config

ROLES = {"tandem_prefill": 1, "tandem_decode": 1}


def main(port: int, with_scheduler: bool) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 2, "resources": ROLES, "object_store_memory": 128 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(**node)
    while ray.available_resources().get("tandem_decode") != 2:  # until then a soft affinity falls back to the first node
        time.sleep(0.1)
    time.sleep(1)
    args = {
        "secret": secrets.token_hex(32),
        "config": {
            "model": {"name": "toy", "block_size": 8, "num_blocks_override": 256, "max_len": 1024},
            "decode": {"replicas": 2},
            "prefill": {"replicas": 2},
            "gateway": {"port": port},
        },
    }
    config = msgspec.convert(args["config"], Config)
    try:
        from ray import serve
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from cluster import deployments
        from cluster.app import build

        if with_scheduler:  # the first node is where it comes back
            there = NodeAffinitySchedulingStrategy(second.node_id, soft=True)
            for _ in range(10):  # soft, so now and then it is made on the first node all the same
                made = deployments.scheduler_actor(msgspec.json.encode(config), args["secret"].encode(), scheduling_strategy=there)
                ray.get(made.address.remote())
                if ray._private.state.actors(made._actor_id.hex())["Address"]["NodeID"] == second.node_id:
                    break
                ray.kill(made)
                time.sleep(1)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name="tandem", blocking=False, _local_testing_mode=False)
        while not _is_healthy(config):
            threading.Event().wait(0.2)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "lose":
                os.kill(second.all_processes["raylet"][0].process.pid, signal.SIGKILL)
                print("lost", flush=True)
            if line.strip() == "add":
                second = cluster.add_node(**node)
                print("added", flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), "scheduler" in sys.argv[2:])
