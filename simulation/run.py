"""`tandem simulate`: one trace, two pools, one policy -> figures, as JSON and as a plot.

    tandem simulate --trace mooncake_conversation.jsonl.gz --prefill 8 --decode 8 --policy tandem \\
        --cost bench/scenarios/costs/llama2-70b-h100-tp8.yaml --slo ttft=30,tpot=0.1 --json out.json --plot out.svg

Traces: Azure CSV, Mooncake JSONL (512-token hash blocks), ServeGen CSV with tenants, VTC CSV; .gz too. Ten seconds of a cluster
take milliseconds: the scheduler is the real one, its workers are formulas.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench.summary import Promise
from configs.tenants import DEFAULT_CLASS, SloClass, Tenants, read_tenants
from protocol.errors import ConfigError
from simulation import plot, policies
from simulation.cluster import Setup, Simulation
from simulation.costs import Cost, read_cost
from simulation.scenario import arrivals_of, config_of, load, offered_rate, scaled, setup_of, tenants_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is simulated")
    what.add_argument("--scenario", type=Path, help="a file of bench/scenarios; --trace is then the folder of traces, or a file")
    what.add_argument("--trace", type=Path, required=True, help="a file of arrivals")
    what.add_argument("--prefill", type=_count, metavar="N", help="prefill workers; 0: decode workers prefill for themselves")
    what.add_argument("--decode", type=_count, metavar="N", help="decode workers")
    what.add_argument("--policy", default="tandem", metavar="NAME", help=f"{', '.join(policies.NAMES)} (default: %(default)s)")
    what.add_argument("--cost", metavar="FILE|prefill=FILE,decode=FILE", help="what a step takes (simulation/costs.py)")
    what.add_argument("--slo", type=_promise, metavar="ttft=S,tpot=S", help="the promise (default: ttft=2,tpot=0.2)")
    what.add_argument("--tenants", type=Path, metavar="FILE", help="classes and tenants as `tandem serve --tenants` reads them")
    how = parser.add_argument_group("how")
    how.add_argument("--scale", type=_positive, default=1.0, metavar="X", help="arrivals X times as fast (default: %(default)s)")
    how.add_argument(
        "--half", choices=("first", "second", "whole"), help="of the trace (default: whole, or what the scenario judges by)"
    )
    how.add_argument("--repeat", type=_count, default=None, help="that part so many times in a row")
    how.add_argument("--requests", type=_count, metavar="N", help="only the first N")
    how.add_argument("--max-tokens", type=_count, default=4096, help="what clients allow themselves (default: %(default)s)")
    how.add_argument("--oracle-lengths", action="store_true", help="the scheduler is told each output's length")
    how.add_argument("--retries", action="store_true", help="clients that are refused come back when they were told to")
    how.add_argument("--link-gbps", type=_positive, metavar="G", help="of each worker's link, instead of the cost file's")
    how.add_argument("--shared-gbps", type=_positive, metavar="G", help="of one link that all transfers cross (default: none)")
    how.add_argument("--stale", type=_not_negative, default=0.005, metavar="S", help="age of a heartbeat when it arrives")
    how.add_argument("--share-cores", action="store_true", help="prefill:i and decode:i run on the same cores (cost: contention)")
    how.add_argument("--threshold", type=_count, metavar="N", help="scheduler.disaggregation_threshold")
    how.add_argument("--seed", type=int, default=0)
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="OUT")
    out.add_argument("--plot", type=Path, metavar="OUT", help="an SVG")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError."""
    policies.check(args.policy)
    arrivals, setup = _from_scenario(args) if args.scenario else _from_arguments(args)
    if args.oracle_lengths:
        setup = setup._replace(oracle_lengths=True)
    setup = policies.setup_for(args.policy, setup)
    classes = {name: tenant.slo_class for name, tenant in setup.tenants.tenants.items()}
    default = classes.get("default", DEFAULT_CLASS)
    started, cpu = time.perf_counter(), time.process_time()
    simulation = Simulation(
        setup, scaled(arrivals, args.scale), policies.scheduler_for(args.policy), lambda tenant: classes.get(tenant, default)
    )
    simulation.run()
    took = time.perf_counter() - started
    simulation.check_integrity()
    found = simulation.summary()
    found = {
        "policy": args.policy, "trace": str(args.trace), "scale": args.scale, "seed": args.seed,
        "trace_rps": offered_rate(arrivals), "prefill": _pool(setup.prefill), "decode": _pool(setup.decode),
        "slo": {name: {"ttft_s": one.ttft_s, "tpot_s": one.tpot_s} for name, one in setup.tenants.classes.items()},
        **found, "wall_s": took, "cpu_s": time.process_time() - cpu,
    }  # fmt: skip
    print(sentence(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if args.plot:
        slo = next(iter(setup.tenants.classes.values()))
        args.plot.write_text(plot.of_run(simulation.results, slo.ttft_s, slo.tpot_s, args.policy), encoding="utf-8")
    return 0


def sentence(found: dict[str, Any]) -> str:
    """The figures that matter most, for people."""

    def number(value: float | None, unit: float = 1.0, how: str = ".3g") -> str:
        return "-" if value is None else format(value * unit, how)

    ttft, tpot, used = found["ttft_s"], found["tpot_s"], found["utilization"]
    return "; ".join(
        (
            f"{found['policy']}: {found['offered']} requests at {found['offered_rps']:.2f}/s, "
            f"kept {number(found['attainment'], 100)} %",
            f"goodput {found['goodput_rps']:.2f}/s, rejected {found['rejected']}",
            f"TTFT p50/p99 {number(ttft['p50'])}/{number(ttft['p99'])} s",
            f"TPOT p50/p99 {number(tpot['p50'], 1000)}/{number(tpot['p99'], 1000)} ms",
            f"wasted prefill {100 * found['wasted_prefill_fraction']:.1f} %",
            f"busy prefill/decode {number(used['prefill'], 100, '.0f')}/{number(used['decode'], 100, '.0f')} %",
            f"{found['simulated_s']:.0f} s in {found.get('wall_s', 0.0):.1f} s",
        )
    )


def _pool(costs: tuple[Cost, ...]) -> dict[str, Any]:
    return {"workers": len(costs), "cost": costs[0].name if costs else None, "gpus": sum(cost.gpus for cost in costs)}


def _from_scenario(args: argparse.Namespace) -> tuple[list[Any], Setup]:
    scenario = load(args.scenario)
    path = args.trace / scenario.trace if args.trace.is_dir() else args.trace
    arrivals = arrivals_of(path, args.half or scenario.judge, args.repeat or scenario.repeat, args.requests)
    setup = setup_of(scenario, args.scenario.parent, arrivals)
    return arrivals, setup._replace(retries=args.retries)


def _from_arguments(args: argparse.Namespace) -> tuple[list[Any], Setup]:
    for name in ("prefill", "decode", "cost"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing (or --scenario FILE, which says it)", param=f"--{name}")
    if args.decode < 1:
        raise ConfigError("--decode 0: somebody has to decode", param="--decode")
    prefill, decode = costs_of(args.cost)
    if args.link_gbps is not None:
        prefill, decode = (msgspec.structs.replace(cost, link_gbps=args.link_gbps) for cost in (prefill, decode))
    arrivals = arrivals_of(args.trace, args.half or "whole", args.repeat or 1, args.requests)
    slo = args.slo or Promise(2.0, 0.2)
    tenants = tenants_of(arrivals, SloClass(ttft_s=slo.ttft or 2.0, tpot_s=slo.tpot or 0.2))
    if args.tenants is not None:
        tenants = _tenants(args.tenants)
    more = {} if args.threshold is None else {"disaggregation_threshold": args.threshold}
    return arrivals, Setup(
        prefill=(prefill,) * args.prefill,
        decode=(decode,) * args.decode,
        tenants=tenants,
        config=config_of(tenants, **more),
        max_tokens=args.max_tokens,
        hash_len=arrivals[0].block,
        stale_s=args.stale,
        shared_gbps=args.shared_gbps,
        retries=args.retries,
        seed=args.seed,
        share_cores=args.share_cores,
    )


def costs_of(text: str) -> tuple[Cost, Cost]:
    """ "FILE" or "prefill=FILE,decode=FILE" -> (prefill, decode). Raises ConfigError."""
    if "=" not in text:
        cost = read_cost(Path(text))
        return cost, cost
    parts = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if parts.keys() != {"prefill", "decode"}:
        raise ConfigError(f"--cost {text}: wanted FILE, or prefill=FILE,decode=FILE", param="--cost")
    prefill, decode = read_cost(Path(parts["prefill"])), read_cost(Path(parts["decode"]))
    if prefill.kv != decode.kv:
        raise ConfigError(f"--cost: {prefill.name} and {decode.name} hold different KV; they cannot exchange it", param="--cost")
    return prefill, decode


def _tenants(path: Path) -> Tenants:
    try:
        return read_tenants(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"--tenants {path}: {error.strerror or error}", param="--tenants") from None


def _told(kind: Callable[[str], float], test: str) -> Callable[[str], Any]:
    """A parser of numbers whose complaint is a sentence."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if value < 0 or (value == 0 and test == "positive") or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: wanted a number that is {test}")
        return value

    return convert


_count, _positive, _not_negative = _told(int, "not negative"), _told(float, "positive"), _told(float, "not negative")


def _promise(text: str) -> Promise:
    try:
        return Promise.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
