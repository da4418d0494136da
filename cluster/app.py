"""The Serve application: `build(args)` for a Serve config file (`import_path: cluster.app:build`) and for `tandem serve`.

args: {"config": {section: {key: value}}, "secret": "..."}. Secrets may stay out of the file: without them the environment's
TANDEM_CLUSTER_SECRET and TANDEM_GATEWAY_API_KEY are taken.
Each role is a deployment whose replicas ask for one unit of a resource of ours (`tandem_prefill`, `tandem_decode`), and for no CPU:
Serve's default of one CPU per replica would leave half of the workers of a laptop waiting for ever.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from ray import serve
from ray.serve import Application

from cluster.deployments import DRAIN_S, GatewayReplica, WorkerReplica
from configs.schema import Config, check
from protocol.errors import ConfigError

ROLE_RESOURCES = {"prefill": "tandem_prefill", "decode": "tandem_decode"}


def build(args: dict[str, Any]) -> Application:
    """Gateway -> (Decode, Prefill). Raises ConfigError."""
    try:
        config = msgspec.convert(args.get("config", {}), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the application's config: {error}") from None
    if config.gateway.api_key is None and (key := os.environ.get("TANDEM_GATEWAY_API_KEY")):
        config = msgspec.structs.replace(config, gateway=msgspec.structs.replace(config.gateway, api_key=key))
    check(config)
    secret = args.get("secret") or os.environ.get("TANDEM_CLUSTER_SECRET", "")
    if len(secret) < 16:
        raise ConfigError("no cluster secret of at least 16 characters: set TANDEM_CLUSTER_SECRET on every node")
    return application(config, secret.encode())


def application(config: Config, secret: bytes) -> Application:
    config_json = msgspec.json.encode(config)
    pools = [
        _worker_deployment(role, replicas).bind(role, config_json, secret)
        for role, replicas in (("decode", config.decode.replicas), ("prefill", config.prefill.replicas))
        if replicas > 0
    ]
    gateway = serve.deployment(
        GatewayReplica,
        name="Gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=DRAIN_S + 10,
    )
    return gateway.bind(config_json, secret, *pools)


def _worker_deployment(role: str, replicas: int) -> Any:
    return serve.deployment(
        WorkerReplica,
        name=role.capitalize(),
        num_replicas=replicas,
        max_ongoing_requests=1000,
        max_constructor_retry_count=5,
        ray_actor_options={"num_cpus": 0, "resources": {ROLE_RESOURCES[role]: 1}},
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=DRAIN_S + 10,
    )
