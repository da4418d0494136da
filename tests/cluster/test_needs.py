"""Sizes of pools as the scheduler's process says them, over its own restarts; numbers for workers that come and go."""

from __future__ import annotations

from typing import Any

from cluster.needs import Sizes, waiting_in
from configs.load import load
from protocol.kv import KVLayout
from protocol.messages import Admit, WorkerInfo
from scheduler.scheduler import Scheduler
from scheduler.sizing import Waiting

SETS = ["decode.max_replicas=3", "decode.replicas=1", "scheduler.scale_up_s=2", "scheduler.scale_down_s=10"]


def info(name: str, model: str = "toy", role: str = "decode") -> WorkerInfo:
    return WorkerInfo(
        incarnation=f"{name}-x",
        role=role,
        name=name,
        address=f"{name}:0",
        model=model,
        layout=KVLayout(1, 1, 1, 16, "float32", "h"),
        num_blocks=1000,
        max_model_len=4096,
        max_num_seqs=4,
        pid=1,
        host="h",
        device="cpu",
    )


def admit(request_id: str, model: str = "toy", **more: Any) -> Admit:
    return Admit(
        request_id=request_id, model=model, tenant="t", slo_class="standard", priority=0, prompt_len=32, max_tokens=50, **more
    )


def cluster(*names: str) -> tuple[Sizes, Scheduler]:
    config = load(env={}, flags={"model.name": "toy"}, sets=SETS).config
    scheduler = Scheduler(config.scheduler)
    for name in names:
        scheduler.register(info(name), 0.0)
    return Sizes(config), scheduler


def test_a_pool_that_is_short_for_long_grows() -> None:
    sizes, scheduler = cluster("decode:0")
    for i in range(12):
        scheduler.submit(admit(f"r{i}"), 0.0)
    scheduler.decisions(0.0)
    assert waiting_in(scheduler)["toy"].num_choices >= 6, waiting_in(scheduler)
    assert [sizes.wanted(scheduler, float(now), {"Decode": 1})["Decode"] for now in range(4)] == [1, 1, 3, 3]
    assert sizes.wanted(scheduler, 4.0, {}) == {}, "nobody asked"


def test_the_successor_of_a_scheduler_begins_with_the_size_that_a_pool_has() -> None:
    """Its own idea of it is one worker; a pool of three would lose two in the middle of its work."""
    sizes, scheduler = cluster("decode:0", "decode:1", "decode:2")
    found = [sizes.wanted(scheduler, float(now), {"Decode": 3})["Decode"] for now in range(12)]
    assert found[:10] == [3] * 10
    assert found[-1] == 1, "and takes its whole patience to shrink it"


def test_numbers_are_never_two_workers() -> None:
    sizes, scheduler = cluster("decode:0", "decode:2")
    assert sizes.index_for(scheduler, "toy", "decode", 2, 1.0) == 1, "the one proposed lives already"
    assert sizes.index_for(scheduler, "toy", "decode", 1, 1.0) == 3, "that one was given away just now"
    assert sizes.index_for(scheduler, "toy", "decode", 7, 1.0) == 7
    assert sizes.index_for(scheduler, "other", "decode", 2, 1.0) == 2, "another model's"
    assert sizes.index_for(scheduler, "toy", "decode", 1, 2000.0) == 1, "nobody came with it"


def test_what_waits_is_counted_by_model() -> None:
    _, scheduler = cluster()
    scheduler.submit(admit("a", num_choices=3), 0.0)
    scheduler.submit(admit("b"), 0.0)
    scheduler.submit(admit("c", model="else"), 0.0)
    assert waiting_in(scheduler) == {"toy": Waiting(4, 64), "else": Waiting(1, 32)}
