"""What is fixed before anything is tuned: trace, half, promises, pools, links, cost files, seeds; one YAML per scenario.

The first half of a trace tunes, the second judges. `bench/scenarios/*.yaml` are such files; read by bench/capacity.py and
`tandem simulate --scenario`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bench.traces import Arrival, TraceError, read_trace
from configs.schema import SchedulerConfig
from configs.tenants import DEFAULT_CLASS, DEFAULT_TENANT, SloClass, Tenant, Tenants
from protocol.errors import ConfigError
from simulation.cluster import Setup
from simulation.costs import read, read_cost

Count = Annotated[int, Meta(ge=1, le=100_000)]
Half = Literal["first", "second", "whole"]


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """cost: a file, relative to the scenario's."""

    workers: Count
    cost: str


class Links(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """gbps: of each worker's own link, instead of the cost file's; shared_gbps: of one that all transfers cross."""

    gbps: Annotated[float, Meta(gt=0)] | None = None
    shared_gbps: Annotated[float, Meta(gt=0)] | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """trace: a file's name in the folder of traces. slo: of every request. max_tokens: what clients allow themselves; the only
    thing about the output's length that the scheduler is told. repeat: the half so many times in a row, where it is short."""

    name: str
    trace: str
    judge: Half = "second"
    tune: Half = "first"
    prefill: PoolSpec
    decode: PoolSpec
    slo: SloClass
    links: Links = Links()
    max_tokens: Count = 4096
    stale_s: Annotated[float, Meta(ge=0, le=10)] = 0.005
    heartbeat_s: Annotated[float, Meta(gt=0, le=60)] = 1.0
    repeat: Count = 1
    seeds: tuple[int, ...] = (1,)
    note: str = ""


def load(path: Path) -> Scenario:
    """Raises ConfigError."""
    return read(path, Scenario)


def halves(arrivals: Sequence[Arrival], half: Half, repeat: int = 1) -> list[Arrival]:
    """Half of them by number, its first at 0; `repeat` times, each after the mean gap."""
    middle = len(arrivals) // 2
    part = {"first": arrivals[:middle], "second": arrivals[middle:], "whole": arrivals}[half]
    if not part:
        return []
    origin = part[0].at_s
    part = [a._replace(at_s=a.at_s - origin) for a in part]
    span = part[-1].at_s * (1 + 1 / max(1, len(part) - 1))
    return [a._replace(at_s=a.at_s + i * span) for i in range(repeat) for a in part]


def offered_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests a second."""
    return len(arrivals) / max(arrivals[-1].at_s - arrivals[0].at_s, 1e-9)


def scaled(arrivals: Sequence[Arrival], scale: float) -> Iterator[Arrival]:
    """The same, `scale` times as fast."""
    for arrival in arrivals:
        yield arrival._replace(at_s=arrival.at_s / scale)


def arrivals_of(path: Path, half: Half = "whole", repeat: int = 1, limit: int | None = None) -> list[Arrival]:
    """Raises ConfigError for a file that cannot be read, or that has no arrivals in it."""
    try:
        kind, arrivals = read_trace(path, limit)
    except (TraceError, OSError) as error:
        raise ConfigError(f"--trace: {error}", param="--trace") from None
    if kind == "lengths":
        raise ConfigError(f"--trace {path} holds lengths and no arrivals; there is nothing to simulate", param="--trace")
    return halves(arrivals, half, repeat)


def tenants_of(arrivals: Sequence[Arrival], slo: SloClass) -> Tenants:
    """Everybody in the trace is a tenant of weight 1, and of one class."""
    names = {a.tenant for a in arrivals if a.tenant} | {DEFAULT_TENANT}
    return Tenants(classes={DEFAULT_CLASS: slo}, tenants={name: Tenant() for name in sorted(names)})


def config_of(tenants: Tenants, heartbeat_s: float = 1.0, **more: object) -> SchedulerConfig:
    """The scheduler's configuration in a run: production's, with the loosest promise as its own."""
    loosest = max(tenants.classes.values(), key=lambda one: one.ttft_s)
    fields = {
        "ttft_target_s": loosest.ttft_s,
        "tpot_target_s": max(one.tpot_s for one in tenants.classes.values()),
        "heartbeat_s": heartbeat_s,
        **more,
    }
    return msgspec.convert(fields, SchedulerConfig)


def setup_of(scenario: Scenario, where: Path, arrivals: Sequence[Arrival]) -> Setup:
    """where: the folder of the scenario's file. Raises ConfigError."""
    pools = []
    for spec in (scenario.prefill, scenario.decode):
        cost = read_cost(where / spec.cost)
        if scenario.links.gbps is not None:
            cost = msgspec.structs.replace(cost, link_gbps=scenario.links.gbps)
        pools.append((cost,) * spec.workers)
    if pools[0][0].kv != pools[1][0].kv:
        raise ConfigError(f"{scenario.name}: the KV of the two pools differs", param="decode.cost")
    tenants = tenants_of(arrivals, scenario.slo)
    return Setup(
        prefill=pools[0],
        decode=pools[1],
        tenants=tenants,
        config=config_of(tenants, scenario.heartbeat_s),
        max_tokens=scenario.max_tokens,
        hash_len=arrivals[0].block,
        stale_s=scenario.stale_s,
        shared_gbps=scenario.links.shared_gbps,
        seed=scenario.seeds[0],
    )
