"""How quickly the simulator runs: the 12,031 Mooncake requests, and a million requests on a thousand workers; seconds and memory.

    python -m bench simulator --traces ../shared/traces          # goals: < 10 s; < 15 min and < 4 GB, on one core

The million is synthetic: Poisson arrivals, prompts and answers drawn as long as Azure's conversations (log-normal, means 1,155 and
211), on 500 prefill and 500 decode workers at about two thirds of what they carry. CPU seconds are of this process alone.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.traces import Arrival
from configs.tenants import SloClass
from simulation import policies
from simulation.cluster import Setup, Simulation
from simulation.costs import read_cost
from simulation.scenario import arrivals_of, config_of, load, setup_of, tenants_of

SCENARIOS = Path(__file__).parent / "scenarios"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=os.environ.get("TANDEM_TRACES"), help="folder (default: $TANDEM_TRACES)")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the large run; 0: leave it out (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1000, help="of the large run, half of them prefill (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2.1, help="requests a second for each worker (default: %(default)s)")
    parser.add_argument("--policy", default="tandem")


def run(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if args.traces is not None:
        scenario = load(SCENARIOS / "mooncake.yaml")
        arrivals = arrivals_of(Path(args.traces) / scenario.trace)
        setup = setup_of(scenario, SCENARIOS, arrivals)
        found["mooncake"] = _timed(f"{len(arrivals)} Mooncake requests, 8 + 8 workers", setup, iter(arrivals), args.policy)
    if args.requests:
        cost = read_cost(SCENARIOS / "costs" / "llama2-70b-h100-tp8.yaml")
        half = args.workers // 2
        tenants = tenants_of([], SloClass(ttft_s=1.0, tpot_s=0.05, attainment=0.9))
        setup = Setup((cost,) * half, (cost,) * half, tenants, config_of(tenants), max_tokens=1024)
        name = f"{args.requests} requests, {2 * half} workers"
        found["large"] = _timed(name, setup, synthetic(args.requests, args.rate * args.workers, 0), args.policy)
    return found


def _timed(name: str, setup: Setup, arrivals: Iterator[Arrival], policy: str) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    simulation = Simulation(setup, arrivals, policies.scheduler_for(policy))
    results = simulation.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    simulation.check_integrity()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    good = results.num_good / max(1, results.num_offered)
    print(
        f"{name}: {wall:.1f} s ({cpu:.1f} s of CPU, {1e6 * cpu / results.num_offered:.0f} us a request), {simulation.now:.0f} s of "
        f"the cluster, {simulation._num_events} events, {rss:.2f} GiB at most; promises kept {good:.1%}",
        flush=True,
    )
    return {"wall_s": wall, "cpu_s": cpu, "requests": results.num_offered, "events": simulation._num_events, "max_rss_gib": rss,
            "simulated_s": simulation.now, "attainment": good}  # fmt: skip


def synthetic(number: int, rate: float, seed: int) -> Iterator[Arrival]:
    """Lengths as Azure's: log-normal, cut where its longest are."""
    rng = random.Random(seed)
    at = 0.0
    for _ in range(number):
        at += rng.expovariate(rate)
        prompt = min(14_000, max(1, int(rng.lognormvariate(math.log(1155) - 0.36, 0.85))))
        output = min(1000, max(1, int(rng.lognormvariate(math.log(211) - 0.5, 1.0))))
        yield Arrival(at, "", prompt, output)
