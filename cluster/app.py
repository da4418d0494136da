"""The Serve application: `build(args)` for a Serve config file (`import_path: cluster.app:build`) and for `tandem serve`.

args: {"config": {section: {key: value}}, "secret": "...", "has_policy": false}. Secrets may stay out of the file: without them the
environment's TANDEM_CLUSTER_SECRET and TANDEM_GATEWAY_API_KEY are taken.
Each role is a deployment; each rank of its replicas asks for one unit of a resource of ours (`tandem_prefill`,
`tandem_decode`), and for no CPU: Serve's default of one CPU per replica would leave half of the workers of a laptop waiting
for ever.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve import Application

from cluster.deployments import GatewayReplica, OverflowReplica, WorkerReplica
from cluster.placement import control_options
from cluster.sizes import deployment_name
from cluster.tenants_file import check_tenants
from configs.check import check
from configs.schema import Config, with_inherited
from models.config import read_config
from models.locate import locate
from protocol.errors import ConfigError

GOING_S = 10.0  # what a replica may take to go, beside its drain
POOL_POLICY = "cluster.sizes:pool_policy"
ROLE_RESOURCES = {"prefill": "tandem_prefill", "decode": "tandem_decode"}


def build(args: dict[str, Any]) -> Application:
    """Gateway -> (Decode, Prefill), and the same two for each further model. Raises ConfigError."""
    try:
        config = msgspec.convert(with_inherited(args.get("config", {})), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the application's config: {error}") from None
    if config.gateway.api_key is None and (key := os.environ.get("TANDEM_GATEWAY_API_KEY")):
        config = msgspec.structs.replace(config, gateway=msgspec.structs.replace(config.gateway, api_key=key))
    check(config)
    check_tenants(config)
    secret = args.get("secret") or os.environ.get("TANDEM_CLUSTER_SECRET", "")
    if len(secret) < 16:
        raise ConfigError("no cluster secret of at least 16 characters: set TANDEM_CLUSTER_SECRET on every node")
    return application(config, secret.encode(), bool(args.get("has_policy")))


def application(config: Config, secret: bytes, has_policy: bool = False) -> Application:
    """has_policy: whether the application has an autoscaling policy, so that its deployments need none."""
    config_json = msgspec.json.encode(config)
    pools = []
    for i, one in enumerate(config.each()):
        pools += [
            _workers(role, one, i, has_policy).bind(role, config_json, secret, _rank_options(role, one), i) for role in one.roles
        ]
    pools += [_overflow(config, i).bind(config_json, secret, i) for i in range(len(config.overflow))]
    gateway = serve.deployment(
        GatewayReplica,
        name="Gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=100_000,
        ray_actor_options=control_options(),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.scheduler.drain_s + GOING_S,
    )
    return gateway.bind(config_json, secret, *pools)


def _workers(role: str, config: Config, number: int = 0, has_policy: bool = False) -> Any:
    """One deployment per role of a model, which is the number-th. A worker of several ranks has a placement group: a bundle for
    each stage, which holds the stage's tensor ranks on one node; the first one also holds the replica itself, which is rank 0."""
    parallel, options = config.parallel(role), _rank_options(role, config)
    group: dict[str, Any] = {}
    if parallel.num_ranks > 1:
        stage = {name: number * parallel.tp_size for name, number in _resources(options).items()}
        group = {"placement_group_bundles": [stage] * parallel.pp_size, "placement_group_strategy": "PACK"}
    return serve.deployment(
        WorkerReplica,
        name=deployment_name(config, role, number),
        **_size(config, role, has_policy),
        max_ongoing_requests=1000,
        max_constructor_retry_count=5,
        ray_actor_options=options,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.scheduler.drain_s + GOING_S,
        **group,
    )


def _overflow(config: Config, number: int) -> Any:
    """One deployment per server, with one replica: what stands behind it is one queue, and a second would not know of it."""
    return serve.deployment(
        OverflowReplica,
        name=f"Overflow-{number}",
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options=control_options(),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.scheduler.drain_s + GOING_S,
    )


def _size(config: Config, role: str, has_policy: bool) -> dict[str, Any]:
    """How many replicas. A pool that follows its load has bounds, and leaves the rest to the scheduler, which has all the patience
    there is: Serve's own policy would see no load at all and shrink it."""
    pool = config.pool(role)
    if pool.fewest == pool.most:
        return {"num_replicas": pool.replicas}
    bounds = {"min_replicas": pool.fewest, "initial_replicas": pool.replicas, "max_replicas": pool.most}
    policy = {} if has_policy else {"policy": {"policy_function": POOL_POLICY}}
    return {"autoscaling_config": {**bounds, **policy, "upscale_delay_s": 0, "downscale_delay_s": 0}}


def _rank_options(role: str, config: Config) -> dict[str, Any]:
    """What Ray is asked for each rank, the leader included. A GPU only where there are groups, whose ranks must have one each: Ray
    then shows every rank its own. Without groups, workers may share one."""
    options: dict[str, Any] = {"num_cpus": 0, "resources": {ROLE_RESOURCES[role]: 1}}
    if config.num_ranks > config.num_workers and _computes_on_gpus(config):
        options["num_gpus"] = 1
    return options


def _computes_on_gpus(config: Config) -> bool:
    """Whether workers will find a GPU where Ray starts them; the process that builds the application may have none."""
    if config.model.device != "auto":
        return config.model.device == "cuda"
    has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    return has_gpus and any(read_config(locate(c.model.name, c.model.revision)).family != "toy" for c in config.each())


def check_gpus(config: Config) -> None:
    """On one machine: raises ConfigError when groups want more GPUs than there are; Ray would let them wait for ever."""
    options = _rank_options("decode", config)
    there = int(ray.cluster_resources().get("GPU", 0))
    if "num_gpus" in options and config.num_ranks > there:
        raise ConfigError(
            f"{config.num_ranks} ranks need a GPU each, and here are {there}; use smaller --prefill-tp, --prefill-pp, --decode-tp, "
            "--decode-pp, fewer workers, or --device cpu",
            param="decode.tp",
        )


def _resources(options: dict[str, Any]) -> dict[str, float]:
    gpus = {"GPU": options["num_gpus"]} if "num_gpus" in options else {}
    return {**options["resources"], **gpus}
