"""`tandem plan`: how many workers of each role, of how many GPUs each, and which threshold, for a trace and a promise.

    tandem plan --trace azure2023_conv.csv.gz --slo slo.yaml --gpus 64 --cost 'bench/scenarios/costs/llama2-70b-h100-*.yaml'
    tandem plan --trace mooncake_conversation.jsonl.gz --slo ttft=30,tpot=0.1 --gpus 128 --cost 'costs/llama2-70b-h100-*.yaml' \\
        --scale 1.2 --price prefill=3.5,decode=2.1 --html plan.html

Every plan is simulated: pools of each pair of cost files (parallel sizes), every ratio of prefill to decode that the GPUs
allow, thresholds of disaggregation. Successive halving: all plans on a short piece of the trace, the better ones on longer
pieces, the last on all of it.
A plan is feasible when it keeps the promise for the wanted share of requests (`attainment` in the SLO file, 0.9 unless it says so);
among these the cheapest wins. --slo: a YAML file with `ttft_s`, `tpot_s` and, if wanted, `attainment`; or ttft=S,tpot=S.
--price: money an hour of a GPU in a pool; the cost files' prices where it is not given.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.summary import Promise
from bench.traces import Arrival
from configs.tenants import SloClass
from protocol.errors import ConfigError
from simulation import plan_page, policies
from simulation.cluster import Setup, Simulation
from simulation.costs import Cost, read, read_cost
from simulation.scenario import arrivals_of, config_of, offered_rate, scaled, tenants_of

FIRST_REQUESTS = 400  # of the first, shortest piece
GROWTH = 3.0  # each piece is so much longer than the one before
KEEP = 1 / 3  # of the plans after a piece
NUM_SHOWN = 5
NUM_REFINED = 6  # of the best after a piece: their neighbours are tried, too
MAX_PLANS = 2000
WARM_SHARE = 0.15  # of a piece's requests at each end that are not judged: pools fill and drain there


class Plan(NamedTuple):
    """prefill, decode: (index of a cost file, workers)."""

    prefill_cost: int
    prefill: int
    decode_cost: int
    decode: int
    threshold: int


class Judged(NamedTuple):
    plan: Plan
    attainment: float
    goodput_rps: float
    gpus: int
    price_per_hour: float
    ttft_p99_s: float
    tpot_p99_s: float
    requests: int

    @property
    def price_per_million(self) -> float:
        """Money for a million good requests."""
        return self.price_per_hour / 3600 / max(self.goodput_rps, 1e-9) * 1e6


class Question(NamedTuple):
    """What a process that simulates needs to know."""

    arrivals: tuple[Arrival, ...]
    costs: tuple[Cost, ...]
    slo: SloClass
    policy: str
    scale: float
    max_tokens: int
    prices: tuple[float | None, float | None]  # an hour of a GPU: prefill, decode
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--slo", required=True, metavar="FILE|ttft=S,tpot=S")
    parser.add_argument("--gpus", type=_gpus, required=True, metavar="N", help="at most so many")
    parser.add_argument("--cost", required=True, metavar="GLOB[,GLOB]", help="cost files of the kinds of workers to choose from")
    parser.add_argument("--price", metavar="P|prefill=P,decode=P", help="money an hour of a GPU")
    parser.add_argument("--scale", type=float, default=1.0, help="arrivals so many times as fast (default: %(default)s)")
    parser.add_argument("--thresholds", default="16,512", help="of disaggregation, tokens (default: %(default)s)")
    parser.add_argument("--half", choices=("first", "second", "whole"), default="whole")
    parser.add_argument("--requests", type=int, default=6000, help="of the last, longest piece (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="what clients allow themselves (default: %(default)s)")
    parser.add_argument("--policy", default="tandem")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path, help="a page in which one drags the ratio and sees attainment and money")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError."""
    policies.check(args.policy)
    costs = _costs(args.cost)
    slo = slo_of(args.slo)
    arrivals = arrivals_of(args.trace, args.half)[: max(args.requests, FIRST_REQUESTS)]
    question = Question(tuple(arrivals), costs, slo, args.policy, args.scale, args.max_tokens, _prices(args.price), args.seed)
    thresholds = _thresholds(args.thresholds)
    plans = every_plan(costs, args.gpus, thresholds[:1])
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(max(1, args.jobs), _begin, (question,)) as pool:
        ranked, seen = halving(plans, question, pool, args.gpus, thresholds[1:])
        curve = ratio_curve(ranked, question, args.gpus, pool) if args.html else []
    even = cheapest([j for j in seen if is_even(j.plan)], slo)
    best = cheapest(ranked, slo)
    rate = offered_rate(arrivals) * args.scale
    print(f"{len(plans)} plans, {len(arrivals)} requests at {rate:.2f}/s, {time.perf_counter() - started:.0f} s")
    print(_table(ranked[:NUM_SHOWN], costs))
    print(_verdict(best, even, costs, slo))
    found = {
        "rate_rps": rate, "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "attainment": slo.attainment},
        "plans": [_plain(j, costs) for j in ranked], "even": _plain(even, costs) if even else None,
        "saving": saving(best, even), "curve": curve,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if args.html:
        args.html.write_text(plan_page.page(found, str(args.trace.name)), encoding="utf-8")
        print(f"page: {args.html}")
    return 0


# ---- what was asked --------------------------------------------------------------------------------------------------


def _gpus(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text}: wanted a number of at least 2, one for each role")
    return number


def slo_of(text: str) -> SloClass:
    """A file, or ttft=S,tpot=S. Raises ConfigError."""
    if "=" not in text:
        slo = read(Path(text), SloClass)
        return slo if slo.attainment != SloClass(ttft_s=1, tpot_s=1).attainment else msgspec.structs.replace(slo, attainment=0.9)
    try:
        promise = Promise.parse(text)
    except ValueError as error:
        raise ConfigError(f"--slo: {error}", param="--slo") from None
    if promise.ttft is None or promise.tpot is None:
        raise ConfigError(f"--slo {text}: both ttft and tpot are needed", param="--slo")
    return SloClass(ttft_s=promise.ttft, tpot_s=promise.tpot, attainment=0.9)


def _costs(patterns: str) -> tuple[Cost, ...]:
    paths = sorted({path for pattern in patterns.split(",") for path in glob.glob(pattern)})
    if not paths:
        raise ConfigError(f"--cost {patterns}: no such file", param="--cost")
    costs = tuple(read_cost(Path(path)) for path in paths)
    for cost in costs[1:]:
        if cost.kv != costs[0].kv:
            raise ConfigError(
                f"--cost: {cost.name} and {costs[0].name} hold different KV; one plan needs one model", param="--cost"
            )
    return costs


def _prices(text: str | None) -> tuple[float | None, float | None]:
    if text is None:
        return None, None
    try:
        if "=" not in text:
            return float(text), float(text)
        parts = dict(part.split("=", 1) for part in text.split(","))
        if parts.keys() != {"prefill", "decode"}:
            raise ValueError
        return float(parts["prefill"]), float(parts["decode"])
    except ValueError:
        raise ConfigError(f"--price {text}: wanted a number, or prefill=P,decode=P", param="--price") from None


def _thresholds(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"--thresholds {text}: wanted whole numbers of tokens, comma-separated", param="--thresholds") from None


def every_plan(costs: Sequence[Cost], gpus: int, thresholds: Sequence[int]) -> list[Plan]:
    """All sizes of both pools that fit, for each pair of kinds a few totals: 1, 7/8, ... 1/4 of the GPUs, and every ratio
    in steps that leave about a dozen."""
    found = []
    for p, prefill in enumerate(costs):
        for d, decode in enumerate(costs):
            unit = max(prefill.gpus, decode.gpus)
            for eighths in range(8, 1, -1):
                total = gpus * eighths // 8
                step = max(unit, unit * (total // unit // 12))
                for share in range(unit, total - unit + 1, step):
                    num_prefill, num_decode = share // prefill.gpus, (total - share) // decode.gpus
                    if num_prefill and num_decode:
                        found += [Plan(p, num_prefill, d, num_decode, threshold) for threshold in thresholds]
    for c, cost in enumerate(costs):  # what plans are measured against, in every size
        most = gpus // (2 * cost.gpus)
        found += [Plan(c, n, c, n, threshold) for n in range(1, most + 1, max(1, most // 16)) for threshold in thresholds]
    found = list(dict.fromkeys(found))
    if len(found) > MAX_PLANS:
        raise ConfigError(
            f"{len(found)} plans are too many; fewer kinds of workers in --cost, or fewer --thresholds", param="--cost"
        )
    if not found:
        raise ConfigError(f"--gpus {gpus} is too few for one worker of each role", param="--gpus")
    return found


# ---- searching -------------------------------------------------------------------------------------------------------

_question: Question | None = None


def _begin(question: Question) -> None:
    global _question
    os.nice(5)
    _question = question


def _judge(asked: tuple[Plan, int]) -> Judged:
    assert _question is not None
    return judge(_question, *asked)


def judge(question: Question, plan: Plan, num_requests: int) -> Judged:
    """One plan on the first `num_requests` of the trace; its ends are simulated and not judged."""
    prefill, decode = question.costs[plan.prefill_cost], question.costs[plan.decode_cost]
    arrivals = question.arrivals[:num_requests]
    tenants = tenants_of(arrivals, question.slo)
    setup = Setup(
        prefill=(prefill,) * plan.prefill,
        decode=(decode,) * plan.decode,
        tenants=tenants,
        config=config_of(tenants, disaggregation_threshold=plan.threshold),
        max_tokens=question.max_tokens,
        hash_len=arrivals[0].block,
        seed=question.seed,
    )
    simulation = Simulation(
        policies.setup_for(question.policy, setup),
        scaled(arrivals, question.scale),
        policies.scheduler_for(question.policy),
        stop_below=question.slo.attainment - 0.25,
        num_expected=len(arrivals),
    )
    results = simulation.run()
    found = simulation.summary()
    first, last = int(WARM_SHARE * len(arrivals)), int((1 - WARM_SHARE) * len(arrivals))
    middle = [row for row, index in enumerate(results.index) if first <= index < last]
    attainment = sum(results.is_good[row] for row in middle) / max(1, last - first)
    prices = [
        cost.price_per_hour if price is None else price * cost.gpus
        for cost, price in zip((prefill, decode), question.prices, strict=True)
    ]
    return Judged(
        plan,
        attainment,
        attainment * offered_rate(arrivals) * question.scale,
        plan.prefill * prefill.gpus + plan.decode * decode.gpus,
        plan.prefill * prices[0] + plan.decode * prices[1],
        found["ttft_s"]["p99"] or math.inf,
        found["tpot_s"]["p99"] or math.inf,
        len(arrivals),
    )


def rank(judged: Judged, slo: SloClass, margin: float = 0.0) -> tuple[bool, float, float]:
    """The feasible first, the cheapest of them first; the others by how much they keep for their money."""
    feasible = judged.attainment >= slo.attainment - margin
    if feasible:
        return False, judged.price_per_hour or judged.gpus, -judged.attainment
    return True, -judged.attainment, judged.price_per_hour or judged.gpus


def halving(
    plans: Sequence[Plan], question: Question, pool: Any, max_gpus: int, thresholds: Sequence[int] = ()
) -> tuple[list[Judged], list[Judged]]:
    """-> (those judged on the whole, best first; the same in no order). 1:1 plans are compared to the end: what they cost is what a
    plan is measured against. thresholds: tried on what is left at the end, where they matter less than sizes do."""
    seen: dict[Plan, Judged] = {}
    left = list(plans)
    num_requests = min(FIRST_REQUESTS, len(question.arrivals))
    while True:
        judged = pool.map(_judge, [(plan, num_requests) for plan in left], chunksize=1)
        seen.update({j.plan: j for j in judged})
        # A short piece says less: what misses by a little on it stays in.
        is_last = num_requests >= len(question.arrivals)
        judged.sort(key=lambda j: rank(j, question.slo, 0.0 if is_last else 0.03))
        if is_last:
            finals = [j for j in seen.values() if j.requests == len(question.arrivals)]
            return judged, finals
        kept = judged[: max(8, int(len(judged) * KEEP))]
        even = [j for j in judged if is_even(j.plan) and j not in kept][: max(3, len(kept) // 4)]
        left = [j.plan for j in (*kept, *even)]
        near = (plan for j in kept[:NUM_REFINED] for plan in neighbours(j.plan, question.costs, max_gpus))
        left += [plan for plan in dict.fromkeys(near) if plan not in seen]
        num_requests = min(len(question.arrivals), int(num_requests * GROWTH))
        if num_requests == len(question.arrivals):
            left += [plan._replace(threshold=threshold) for plan in left[:NUM_SHOWN] for threshold in thresholds]


def neighbours(plan: Plan, costs: Sequence[Cost], max_gpus: int) -> list[Plan]:
    """A worker less or more of each role: the grid of `every_plan` is coarse."""
    found = []
    for p, d in ((-1, 0), (0, -1), (-1, -1), (-1, 1), (1, -1), (1, 0), (0, 1)):
        prefill, decode = plan.prefill + p, plan.decode + d
        gpus = prefill * costs[plan.prefill_cost].gpus + decode * costs[plan.decode_cost].gpus
        if prefill > 0 and decode > 0 and gpus <= max_gpus:
            found.append(plan._replace(prefill=prefill, decode=decode))
    return found


def is_even(plan: Plan) -> bool:
    """What one would build without asking: as many prefill as decode workers, of one kind."""
    return plan.prefill == plan.decode and plan.prefill_cost == plan.decode_cost


def cheapest(judged: Sequence[Judged], slo: SloClass) -> Judged | None:
    """Of those that keep the promise."""
    feasible = [j for j in judged if j.attainment >= slo.attainment]
    return min(feasible, key=lambda j: (j.price_per_hour or j.gpus, -j.attainment), default=None)


def saving(best: Judged | None, even: Judged | None) -> float | None:
    """Share of the 1:1 plan's money that the best one saves."""
    if best is None or even is None:
        return None
    return 1 - (best.price_per_hour or best.gpus) / (even.price_per_hour or even.gpus)


def ratio_curve(ranked: Sequence[Judged], question: Question, gpus: int, pool: Any) -> list[dict[str, Any]]:
    """For the page: every ratio of the best plan's kinds of workers, at its own total and at the whole of the GPUs."""
    best = ranked[0]
    prefill, decode = question.costs[best.plan.prefill_cost], question.costs[best.plan.decode_cost]
    unit = math.lcm(prefill.gpus, decode.gpus)
    plans = []
    for total in sorted({best.gpus, min(gpus, best.gpus * 5 // 4 // unit * unit), gpus // unit * unit}):
        step = max(unit, unit * (total // unit // 14))
        for share in range(unit, total - unit + 1, step):
            plan = best.plan._replace(prefill=share // prefill.gpus, decode=(total - share) // decode.gpus)
            if plan.prefill and plan.decode:
                plans.append(plan)
    number = min(len(question.arrivals), 2000)
    judged = pool.map(_judge, [(plan, number) for plan in dict.fromkeys([*plans, best.plan])], chunksize=1)
    return [_plain(j, question.costs) for j in judged]


# ---- for people ------------------------------------------------------------------------------------------------------


def _plain(judged: Judged, costs: Sequence[Cost]) -> dict[str, Any]:
    plan = judged.plan
    return {
        "prefill": plan.prefill, "decode": plan.decode, "prefill_kind": costs[plan.prefill_cost].name,
        "decode_kind": costs[plan.decode_cost].name, "threshold": plan.threshold, "attainment": judged.attainment,
        "goodput_rps": judged.goodput_rps, "gpus": judged.gpus, "goodput_per_gpu": judged.goodput_rps / judged.gpus,
        "price_per_hour": judged.price_per_hour, "price_per_million": judged.price_per_million,
        "ttft_p99_s": judged.ttft_p99_s if math.isfinite(judged.ttft_p99_s) else None,
        "tpot_p99_s": judged.tpot_p99_s if math.isfinite(judged.tpot_p99_s) else None, "requests": judged.requests,
    }  # fmt: skip


def _table(judged: Sequence[Judged], costs: Sequence[Cost]) -> str:
    head = (
        "prefill",
        "decode",
        "threshold",
        "GPUs",
        "kept",
        "good/s",
        "good/s/GPU",
        "money/h",
        "money/M good",
        "TTFT p99",
        "TPOT p99",
    )
    lines = [head]
    for j in judged:
        plan = j.plan
        lines.append(
            (
                f"{plan.prefill} x {costs[plan.prefill_cost].name}", f"{plan.decode} x {costs[plan.decode_cost].name}",
                str(plan.threshold), str(j.gpus), f"{j.attainment:.1%}", f"{j.goodput_rps:.2f}", f"{j.goodput_rps / j.gpus:.3f}",
                f"{j.price_per_hour:.1f}", f"{j.price_per_million:.0f}", f"{j.ttft_p99_s:.2f} s", f"{1e3 * j.tpot_p99_s:.0f} ms",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _verdict(best: Judged | None, even: Judged | None, costs: Sequence[Cost], slo: SloClass) -> str:
    if best is None:
        return f"no plan keeps the promise for {slo.attainment:.0%} of the requests; more --gpus, or a looser --slo"
    if even is None:
        return "no 1:1 plan of one kind of worker keeps the promise at all within these GPUs"
    share = saving(best, even) or 0.0
    name = costs[even.plan.prefill_cost].name
    against = f"1:1, {even.plan.prefill} + {even.plan.decode} x {name}, {even.price_per_hour:.1f} an hour at {even.attainment:.1%}"
    if share <= 0:
        return f"nothing is cheaper than the cheapest {against}"
    return f"{share:.0%} cheaper than the cheapest {against}"
