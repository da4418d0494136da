"""What Serve is asked for: one bundle of a placement group per pipeline stage, resources for every rank, time to drain."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster import app
from configs.load import load
from protocol.errors import ConfigError


def workers(role: str = "decode", **keys: Any) -> Any:
    """The deployment of one role. Keys as decode__tp=2."""
    sets = {name.replace("__", "."): value for name, value in {"model__name": "toy", **keys}.items()}
    return app._workers(role, load(flags=sets, env={}).config)


def test_a_worker_of_one_rank_needs_no_placement_group():
    made = workers(decode__replicas=3)
    assert made.num_replicas == 3
    assert made._replica_config.placement_group_bundles is None
    assert made.ray_actor_options == {"num_cpus": 0, "resources": {"tandem_decode": 1}}


@pytest.mark.parametrize(
    ("tp", "pp", "bundles"),
    [
        (2, 1, [{"tandem_prefill": 2}]),
        (1, 3, [{"tandem_prefill": 1}] * 3),
        (4, 2, [{"tandem_prefill": 4}] * 2),
    ],
)
def test_a_bundle_holds_the_tensor_ranks_of_one_stage(tp, pp, bundles):
    """A bundle lies on one node whole, and so do tensor ranks; stages may lie on several."""
    made = workers("prefill", prefill__tp=tp, prefill__pp=pp)
    assert made._replica_config.placement_group_bundles == bundles
    assert made._replica_config.placement_group_strategy == "PACK"
    assert made.ray_actor_options["resources"] == {"tandem_prefill": 1}, "of each rank; the leader's own is in the first bundle"


def test_ranks_of_groups_have_a_gpu_each_and_workers_without_groups_may_share_one():
    group = workers(model__name="bundled", model__device="cuda", decode__tp=2)
    assert group._replica_config.placement_group_bundles == [{"tandem_decode": 2, "GPU": 2}]
    assert group.ray_actor_options["num_gpus"] == 1
    assert workers("prefill", model__name="bundled", model__device="cuda", decode__tp=2).ray_actor_options["num_gpus"] == 1
    assert "num_gpus" not in workers(model__name="bundled", model__device="cuda").ray_actor_options


def test_auto_counts_the_gpus_of_the_cluster(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 3.0})
    assert "num_gpus" in workers(model__name="bundled", decode__tp=2).ray_actor_options
    assert "num_gpus" not in workers(decode__tp=2).ray_actor_options, "the toy model runs on the CPU"
    sets = {"model.name": "bundled", "decode.tp": 2, "prefill.tp": 2}
    with pytest.raises(ConfigError, match="4 ranks need a GPU each, and here are 3"):
        app.check_gpus(load(flags=sets, env={}).config)
    app.check_gpus(load(flags={**sets, "prefill.tp": 1}, env={}).config)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {})
    app.check_gpus(load(flags=sets, env={}).config)


def test_there_is_time_to_drain():
    assert workers(scheduler__drain_s=77)._deployment_config.graceful_shutdown_timeout_s >= 77 + 5
