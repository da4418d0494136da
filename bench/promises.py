"""Fairness and Retry-After in the simulator: the tenants' bound at every event, a tenant that floods, clients that come when told.

    python -m bench promises

1. Six tenants of weights 1 and 2 ask for more than there is, in bursts: after every message to the scheduler, the services of those
that
   wait differ by no more than the bound of docs/decision.md.
2. A tenant floods with 20 times its share of what the cluster carries; another at half its share must see no refusal, and a p99 of
TTFT
   within 1.3 times of what it sees alone on the same workers.
3. A burst, and clients that come back when they are told: how many are let in at once, and how long they were told to wait against
the
   first time at which there was room for them behind those refused before them (simulation/probes.py).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.traces import Arrival
from configs.tenants import DEFAULT_CLASS, SloClass, Tenant, Tenants
from simulation import policies
from simulation.cluster import Setup, Simulation
from simulation.costs import RoleLimits, read_cost
from simulation.fairness import Watch
from simulation.probes import Probes
from simulation.scenario import config_of

COST = Path(__file__).parent / "scenarios" / "costs" / "opt-13b-a100-tp1.yaml"
SLO = SloClass(ttft_s=1.0, tpot_s=0.1, attainment=0.9)
CHUNK = 256  # at most a quarter of what a prompt takes alone
POOL = 2  # workers of each role
FLOOD, SHARE = 20.0, 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=120.0, help="of virtual time, each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    capacity = capacity_rps(args.seconds, args.seed)
    print(f"{POOL} + {POOL} workers carry {capacity:.1f} requests/s (90 % within {SLO.ttft_s:g} s and {1e3 * SLO.tpot_s:g} ms)")
    found = {"capacity_rps": capacity, "bound": bound(capacity, args), "flood": flood(capacity, args)}
    found["retry_after"] = retry_after(capacity, args)
    b, f, r = found["bound"], found["flood"], found["retry_after"]
    print(
        f"bound: {b['compared']} comparisons, the largest difference {b['largest_difference']:.0f} of {b['bound']:.0f} tokens "
        f"allowed ({b['worst']:.0%} at worst)\n"
        f"flood: {f['victim_offered']} requests of the quiet tenant beside {f['flooder_offered']}, refused {f['victim_refused']}; "
        f"p99 TTFT {f['ttft_p99_s']:.3f} s, alone {f['ttft_p99_alone_s']:.3f} s: x{f['ratio']:.2f} (goal <= 1.3, 0 refused)\n"
        f"Retry-After: {r['came_back']} came back, {r['admitted_at_once']:.1%} let in at once (goal >= 90 %); told to "
        f"wait {r['median_told_of_probed_s']:.1f} s, first feasible {r['median_feasible_s']:.1f} s, x{r['ratio']:.2f} "
        f"(goal <= 1.5; {r['probed']} probed)"
    )
    return found


def some(rate: Callable[[float], float], most: float, seconds: float, tenants: Sequence[str], rng: random.Random) -> list[Arrival]:
    """Poisson arrivals of a rate that changes (never above `most`), prompts of 100 to 800 tokens, answers of 20 to 150."""
    at, found = 0.0, []
    while (at := at + rng.expovariate(most)) < seconds:
        if rng.random() * most < rate(at):
            found.append(Arrival(at, rng.choice(tenants), rng.randint(100, 800), rng.randint(20, 150)))
    return found


def setup_for(tenants: Tenants, seed: int, **changes: Any) -> Setup:
    cost = msgspec.structs.replace(read_cost(COST), prefill_limits=RoleLimits(max_num_batched_tokens=CHUNK, max_num_seqs=16))
    config = config_of(tenants, heartbeat_s=0.5)
    return Setup((cost,) * POOL, (cost,) * POOL, tenants, config, max_tokens=256, seed=seed)._replace(**changes)


def of(weights: dict[str, float], slo: SloClass = SLO) -> Tenants:
    tenants = {name: Tenant(weight=weight) for name, weight in {"default": 1.0, **weights}.items()}
    return Tenants(classes={DEFAULT_CLASS: slo}, tenants=tenants)


def simulated(setup: Setup, arrivals: Sequence[Arrival], watch: Callable[[Simulation], None] | None = None) -> Simulation:
    simulation = Simulation(setup, arrivals, policies.scheduler_for("tandem"), watch=watch)
    simulation.run()
    simulation.check_integrity()
    return simulation


def capacity_rps(seconds: float, seed: int) -> float:
    """By bisection, of one tenant."""
    low, high = 1.0, 200.0
    while high / low > 1.05:
        rate = (low * high) ** 0.5
        arrivals = some(lambda _, rate=rate: rate, rate, min(60.0, seconds), ("a",), random.Random(seed))  # type: ignore[misc]
        results = simulated(setup_for(of({"a": 1.0}), seed), arrivals).results
        low, high = (rate, high) if results.num_good >= 0.9 * len(arrivals) else (low, rate)
    return low


def bound(capacity: float, args: argparse.Namespace) -> dict[str, Any]:
    """Nobody is refused here, so that all of them wait."""
    weights = {f"t{i}": 1.0 + i % 2 for i in range(6)}
    patient = msgspec.structs.replace(SLO, when_late="queue", ttft_s=60.0)
    arrivals = some(
        lambda at: capacity * (1.6 if int(at / 10) % 2 else 0.7),
        2 * capacity,
        args.seconds,
        tuple(weights),
        random.Random(args.seed),
    )
    watch = Watch()
    simulated(setup_for(of(weights, patient), args.seed), arrivals, watch)
    return {
        "compared": watch.num_compared,
        "largest_difference": watch.largest_difference,
        "bound": watch.bound,
        "worst": watch.worst,
    }


def flood(capacity: float, args: argparse.Namespace) -> dict[str, Any]:
    share = capacity / 2
    quiet = some(lambda _: SHARE * share, SHARE * share, args.seconds, ("quiet",), random.Random(args.seed))
    loud = some(lambda _: FLOOD * share, FLOOD * share, args.seconds, ("loud",), random.Random(args.seed + 1))
    tenants = of({"quiet": 1.0, "loud": 1.0})
    alone = simulated(setup_for(tenants, args.seed), quiet).summary()["tenants"]["quiet"]
    both = simulated(setup_for(tenants, args.seed), sorted([*quiet, *loud])).summary()["tenants"]
    victim = both["quiet"]
    return {
        "victim_offered": victim["offered"], "victim_refused": victim["rejected"] + victim["timed_out"] + victim["failed"],
        "victim_attainment": victim["attainment"], "flooder_offered": both["loud"]["offered"],
        "flooder_finished": both["loud"]["finished"], "ttft_p99_s": victim["ttft_s"]["p99"],
        "ttft_p99_alone_s": alone["ttft_s"]["p99"], "ratio": victim["ttft_s"]["p99"] / alone["ttft_s"]["p99"],
    }  # fmt: skip


def retry_after(capacity: float, args: argparse.Namespace) -> dict[str, Any]:
    """Three times the capacity for a sixth of the time, 60 % of it otherwise."""
    begin, end = args.seconds / 6, args.seconds / 3
    arrivals = some(
        lambda at: capacity * (3.0 if begin <= at < end else 0.6), 3 * capacity, args.seconds, ("a", "b"), random.Random(args.seed)
    )
    mean_prompt = sum(a.prompt_tokens for a in arrivals) / len(arrivals)
    probes = Probes(capacity * mean_prompt, SLO.ttft_s)
    simulation = Simulation(
        setup_for(of({"a": 1.0, "b": 1.0}), args.seed, retries=True), arrivals, policies.scheduler_for("tandem"), watch=probes
    )
    simulation.run()
    simulation.check_integrity()
    told = simulation.results.retries
    waits = sorted(wait for _, wait, _ in told)
    return {
        "offered": len(arrivals), "came_back": len(told),
        "admitted_at_once": sum(ok for _, _, ok in told) / len(told) if told else 1.0,
        "median_wait_s": waits[len(waits) // 2] if waits else 0.0, **probes.figures(),
        "rejected_for_good": simulation.summary()["rejected"],
    }  # fmt: skip
