"""How much load each policy carries: the highest offered rate at which 90 % of all offered requests keep both promises, simulated.

    python -m bench capacity --traces ../shared/traces --doc docs/scheduling.md --plot docs/capacity.svg
    python -m bench capacity --traces ../shared/traces --scenario vtc --policy tandem,join-shortest-queue --quick

For each scenario of bench/scenarios and each policy: bisection over the speed of the trace (its judging half), then a run at that
rate and one at twice the rate of the policy's own capacity. Refused requests count as missed. Points already in the --state file
are not computed again, so an interrupted run goes on where it was; delete the file when the scheduler has changed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from protocol.errors import ConfigError
from simulation import plot, policies
from simulation.cluster import Simulation
from simulation.scenario import Scenario, arrivals_of, load, offered_rate, scaled, setup_of

HERE = Path(__file__).parent / "scenarios"
LEVEL = 0.9
RESOLUTION = 0.02  # of the rate, where bisection ends
OVERLOAD = 2.0
QUICK_REQUESTS = 1500
MAX_RATE_FACTOR = 64.0
DEFAULT = ("tandem", "tandem-oracle", *policies.BASELINES, *(f"{name}-edf" for name in policies.BASELINES))
BEGIN, END = "<!-- capacity: begin -->", "<!-- capacity: end -->"


class Job(NamedTuple):
    """One scenario under one policy."""

    scenario: str
    policy: str
    seed: int
    half: str
    traces: str
    quick: bool

    @property
    def key(self) -> str:
        return "/".join((self.scenario, self.policy, str(self.seed), self.half, "quick" if self.quick else "full"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=os.environ.get("TANDEM_TRACES"), help="folder (default: $TANDEM_TRACES)")
    parser.add_argument("--scenario", help="names, comma-separated (default: all of bench/scenarios)")
    parser.add_argument("--policy", default=",".join(DEFAULT), help="names, comma-separated (default: all)")
    parser.add_argument(
        "--half", choices=("judge", "tune"), default="judge", help="which half of each trace (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK_REQUESTS} requests, for tests and while tuning")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=Path("capacity-state.json"), help="finished points (default: %(default)s)")
    parser.add_argument("--doc", type=Path, help="write the tables between the marks in this page")
    parser.add_argument("--plot", type=Path, help="an SVG: goodput against offered load")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is not in the state file yet; the tables; -> what goes into --json."""
    if args.traces is None or not Path(args.traces).is_dir():
        raise SystemExit("bench capacity: --traces FOLDER (or TANDEM_TRACES) is needed: the traces are not part of the repository")
    names = args.scenario.split(",") if args.scenario else sorted(path.stem for path in HERE.glob("*.yaml"))
    try:
        chosen = [policies.check(name) for name in args.policy.split(",")]
        scenarios = {name: load(HERE / f"{name}.yaml") for name in names}
    except ConfigError as error:
        raise SystemExit(f"bench capacity: {error.message}") from None
    jobs = [
        Job(name, policy, seed, scenario.judge if args.half == "judge" else scenario.tune, str(args.traces), args.quick)
        for name, scenario in scenarios.items()
        for policy in chosen
        for seed in scenario.seeds
    ]
    state: dict[str, Any] = json.loads(args.state.read_text()) if args.state.exists() else {}
    started = time.perf_counter()
    todo = [job for job in jobs if job.key not in state]
    for job, found in _computed(todo, max(1, args.jobs)):
        state[job.key] = found
        args.state.write_text(json.dumps(state, indent=1))
        print(f"{job.key}: {found['capacity_rps']:.2f}/s ({found['wall_s']:.0f} s)", file=sys.stderr, flush=True)
    points = {job: state[job.key] for job in jobs}
    text = tables(points)
    print(text)
    print(f"\n{len(todo)} of {len(jobs)} points computed in {time.perf_counter() - started:.0f} s", flush=True)
    if args.doc:
        _into(args.doc, text)
    if args.plot:
        args.plot.write_text(picture(points), encoding="utf-8")
    return {"points": [{**job._asdict(), **found} for job, found in points.items()]}


def _computed(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, measure(job)
        return
    # Spawned: a worker begins with nothing of ours in memory, and a killed one takes nobody with it.
    with multiprocessing.get_context("spawn").Pool(processes, initializer=os.nice, initargs=(5,)) as pool:
        yield from pool.imap_unordered(_keyed, jobs)


def _keyed(job: Job) -> tuple[Job, dict[str, Any]]:
    return job, measure(job)


def measure(job: Job) -> dict[str, Any]:
    """Capacity of one policy on one scenario, and what happens at it and above."""
    started = time.perf_counter()
    scenario = load(HERE / f"{job.scenario}.yaml")
    limit = QUICK_REQUESTS if job.quick else None
    repeat = 1 if job.quick else scenario.repeat
    arrivals = arrivals_of(Path(job.traces) / scenario.trace, job.half, repeat)[:limit]  # type: ignore[arg-type]
    base = offered_rate(arrivals)

    def point(scale: float, may_stop: bool) -> dict[str, Any]:
        return _simulated(job, scenario, arrivals, scale, LEVEL if may_stop else None)

    curve: list[dict[str, Any]] = []

    def keeps(scale: float) -> bool:
        found = point(scale, True)
        if found["attainment"] >= LEVEL:
            curve.append(found)
        return bool(found["attainment"] >= LEVEL)

    low, high = 0.0, 1.0
    while keeps(high):
        low, high = high, high * 2
        if high > MAX_RATE_FACTOR:
            break
    if low == 0.0:
        low = high / 2
        while low > 1 / MAX_RATE_FACTOR and not keeps(low):
            low, high = low / 2, low
    while high / low > 1 + RESOLUTION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    at, between, above = (point(low * factor, False) for factor in (1.0, 1.4, OVERLOAD))
    curve = sorted([*curve, between, above], key=lambda p: float(p["offered_rps"]))
    peak = max(p["goodput_rps"] for p in curve)
    return {
        "capacity_rps": low * base,
        "base_rps": base,
        "goodput_at_capacity_rps": at["goodput_rps"],
        "goodput_at_overload_rps": above["goodput_rps"],
        "overload_share_of_peak": above["goodput_rps"] / peak if peak else 0.0,
        "wasted_at_capacity": at["wasted_prefill_fraction"],
        "wasted_at_overload": above["wasted_prefill_fraction"],
        "curve": curve,
        "requests": len(arrivals),
        "wall_s": time.perf_counter() - started,
    }


def _simulated(job: Job, scenario: Scenario, arrivals: Sequence[Any], scale: float, stop_below: float | None) -> dict[str, Any]:
    setup = setup_of(scenario, HERE, arrivals)._replace(seed=job.seed)
    setup = policies.setup_for(job.policy, setup)
    simulation = Simulation(
        setup,
        scaled(arrivals, scale),
        policies.scheduler_for(job.policy),
        stop_below=stop_below,
        num_expected=len(arrivals),
    )
    simulation.run()
    if stop_below is None:
        simulation.check_integrity()
    found = simulation.summary()
    kept = {
        name: found[name] for name in ("goodput_rps", "rejected", "timed_out", "wasted_prefill_fraction", "wasted", "utilization")
    }
    offered = offered_rate(arrivals) * scale
    # Of all that the trace offers, also when the run was stopped because it cannot reach the level any more.
    attainment = found["good"] / len(arrivals)
    return {
        "offered_rps": offered, "attainment": attainment, **kept, "goodput_rps": attainment * offered,
        "ttft_p99_s": found["ttft_s"]["p99"], "tpot_p99_s": found["tpot_s"]["p99"],
    }  # fmt: skip


# ---- for people ------------------------------------------------------------------------------------------------------


def best_baseline(points: dict[Job, dict[str, Any]], scenario: str) -> tuple[str, float]:
    """The best of those that are not ours."""
    theirs = {
        job.policy: p["capacity_rps"] for job, p in points.items() if job.scenario == scenario and job.policy not in policies.OURS
    }
    name = max(theirs, key=lambda policy: theirs[policy], default="")
    return name, theirs.get(name, 0.0)


def tables(points: dict[Job, dict[str, Any]]) -> str:
    """Markdown: one row per policy, one column per scenario; then what happens at twice the rate, then the goals."""
    scenarios = sorted({job.scenario for job in points})
    chosen = list(dict.fromkeys(job.policy for job in points))
    at = {(job.policy, job.scenario): p for job, p in points.items()}

    def table(title: str, cell: Any) -> list[str]:
        head = [f"| {title} | " + " | ".join(scenarios) + " |", "|---|" + "--:|" * len(scenarios)]
        rows = [
            f"| {policy} | " + " | ".join(cell(at[policy, s]) if (policy, s) in at else "-" for s in scenarios) + " |"
            for policy in chosen
        ]
        return [*head, *rows, ""]

    lines = table("capacity, requests/s", lambda p: f"{p['capacity_rps']:.2f}")
    lines += table("goodput at 2x, of its peak", lambda p: f"{p['overload_share_of_peak']:.0%}")
    lines += table(
        "wasted prefill at 1x / 2x", lambda p: f"{100 * p['wasted_at_capacity']:.1f} % / {100 * p['wasted_at_overload']:.1f} %"
    )
    if "tandem" in chosen:
        lines += _goals(points, scenarios, at)
    return "\n".join(lines)


def _goals(points: dict[Job, dict[str, Any]], scenarios: Sequence[str], at: dict[tuple[str, str], Any]) -> list[str]:
    lines = ["| tandem against | " + " | ".join(scenarios) + " |", "|---|" + "--:|" * len(scenarios)]

    def row(title: str, other: Any) -> str:
        cells = []
        for s in scenarios:
            mine, theirs = at.get(("tandem", s)), other(s)
            cells.append(f"{mine['capacity_rps'] / theirs[1]:.2f}x{theirs[0]}" if mine and theirs and theirs[1] else "-")
        return f"| {title} | " + " | ".join(cells) + " |"

    def named(policy: str) -> Any:
        return lambda s: ("", at[policy, s]["capacity_rps"]) if (policy, s) in at else None

    def best(s: str) -> tuple[str, float]:
        name, rate = best_baseline(points, s)
        return f" ({name})", rate

    lines.append(row("best baseline (goal 1.25x, never below 1)", best))
    for policy, goal in (("join-shortest-queue", ">= 1.25x"), ("round-robin", ">= 1.25x"), ("tandem-oracle", ">= 0.90x")):
        lines.append(row(f"{policy} ({goal})", named(policy)))
    return [*lines, ""]


def picture(points: dict[Job, dict[str, Any]]) -> str:
    """Per scenario goodput against what was offered: ours, the oracle, the best baseline, join-shortest-queue, round-robin."""
    panels, labels = [], ["tandem", "tandem-oracle", "best baseline", "join-shortest-queue", "round-robin"]
    at = {(job.policy, job.scenario): p for job, p in points.items()}
    for scenario in sorted({job.scenario for job in points}):
        best = best_baseline(points, scenario)[0]
        curves = []
        for label in labels:
            found = at.get((best if label == "best baseline" else label, scenario))
            shown = [(p["offered_rps"], p["goodput_rps"]) for p in found["curve"]] if found else []
            curves.append(plot.Curve(label, shown))
        panels.append((f"{scenario} (best baseline: {best})", plot.panel(curves, "offered, requests/s", "good requests/s")))
    return plot.page(panels, labels)


def _into(page: Path, text: str) -> None:
    """Between the marks, which are put at the page's end where they are missing."""
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in before or END not in before:
        before = f"{before}\n{BEGIN}\n{END}\n"
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
