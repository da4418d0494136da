"""A Ray and a Serve of its own with Tandem deployed from a Serve config, as `serve deploy` does it, and scaled while it runs.

Run by test_groups_served.py in a process of its own: `python -m tests.system.scaled PORT`. Each line of standard input is
`NAME NUMBER`, the new number of replicas of one deployment. Says `ready` and `scaled` on standard output.
"""

from __future__ import annotations

import secrets
import sys
import threading
import urllib.request
from typing import Any

from cluster.launch import Line, _is_healthy, _private_ray
from configs.load import load

ENV = {"TANDEM_CLUSTER_SECRET": secrets.token_hex(32)}


def main(port: int) -> None:
    overrides = {"Decode": 2, "Prefill": 2}
    args = {
        "secret": ENV["TANDEM_CLUSTER_SECRET"],
        "config": {
            "model": {"name": "toy", "block_size": 8, "num_blocks_override": 256, "max_len": 1024},
            "decode": {"replicas": overrides["Decode"]},
            "prefill": {"replicas": overrides["Prefill"]},
            "scheduler": {"disaggregation_threshold": 0, "drain_s": 2.0},
            "gateway": {"port": port},
        },
    }
    config = load(flags={"gateway.port": port}, env={}).config
    with _private_ray(Line(), threading.Event()):
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})

        def deploy() -> None:
            deployments: list[dict[str, Any]] = [{"name": name, "num_replicas": number} for name, number in overrides.items()]
            application = {"name": "tandem", "import_path": "cluster.app:build", "args": args, "deployments": deployments}
            schema = ServeDeploySchema.parse_obj({"applications": [application]})
            _get_global_client().deploy_apps(schema, _blocking=False)

        deploy()
        while not _is_healthy(config):
            threading.Event().wait(0.2)
        print("ready", flush=True)
        for line in sys.stdin:
            name, number = line.split()
            overrides[name] = int(number)
            deploy()
            print("scaled", flush=True)


if __name__ == "__main__":
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({})))
    main(int(sys.argv[1]))
