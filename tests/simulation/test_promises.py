"""Fairness, floods and clients that come back, in small; `python -m bench promises` measures the same for longer."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, deque
from pathlib import Path

import pytest

from bench import capacity, promises
from bench.traces import Arrival
from configs.tenants import SloClass
from simulation.cluster import Simulation
from simulation.fairness import Watch
from simulation.probes import Probes

CAPACITY = 24.0
SHORT = argparse.Namespace(seconds=25.0, seed=3)


def test_the_bound_holds_after_every_message() -> None:
    found = promises.bound(CAPACITY, SHORT)
    assert found["compared"] > 500, "tenants wait together, or nothing was shown"
    assert 0 < found["largest_difference"] <= found["bound"]


def test_the_watch_notices_an_unfair_order() -> None:
    """First come, first served lets whoever asks more have more."""
    weights = {"meek": 1.0, "greedy": 1.0}
    patient = SloClass(ttft_s=60.0, tpot_s=0.1, when_late="queue")
    rng = random.Random(1)
    arrivals = [Arrival(a.at_s, "greedy" if rng.random() < 0.9 else "meek", *a[2:]) for a in
                promises.some(lambda _: 3 * CAPACITY, 3 * CAPACITY, 15.0, ("x",), rng)]  # fmt: skip
    setup = promises.setup_for(promises.of(weights, patient), 1)
    watch = Watch()
    promises.simulated(setup, arrivals, watch)
    assert watch.worst <= 1
    unfair = setup._replace(config=promises.config_of(setup.tenants, policy="fcfs"))
    blind = Watch()
    with pytest.raises(AssertionError, match="differ by"):
        promises.simulated(unfair, arrivals, _as_if_waiting(blind))


def _as_if_waiting(watch: Watch) -> Watch:
    """fcfs keeps no line of those that wait; who has requests in the queue is told here."""

    class Told(Watch):
        def __call__(self, simulation: Simulation) -> None:
            fairness = simulation.scheduler.fairness
            tenants = {item.admit.tenant for item in simulation.scheduler.queue}
            fairness._waiting.clear()
            if len(tenants) > 1:
                fairness._waiting[1] = dict.fromkeys(sorted(tenants))
            super().__call__(simulation)

    return Told()


def test_a_flood_costs_the_quiet_tenant_no_refusal() -> None:
    found = promises.flood(CAPACITY, SHORT)
    assert found["flooder_offered"] > 20 * found["victim_offered"]
    assert found["victim_refused"] == 0
    assert found["victim_attainment"] > 0.99


def test_clients_that_come_back_have_one_end_each() -> None:
    rng = random.Random(2)
    arrivals = promises.some(lambda at: CAPACITY * (3 if at < 8 else 0.5), 3 * CAPACITY, 25.0, ("a", "b"), rng)
    setup = promises.setup_for(promises.of({"a": 1.0, "b": 1.0}), 1, retries=True)
    simulation = promises.simulated(setup, arrivals, Probes(CAPACITY * 450, 1.0))
    results = simulation.results
    assert Counter(results.index) == Counter(range(len(arrivals)))
    assert results.retries, "somebody was refused and came back"
    assert all(wait >= 1.0 for _, wait, _ in results.retries)
    found = simulation.summary()["retries"]
    assert found["came_back"] == len(results.retries)


def test_first_feasible_is_a_line_served_by_what_is_left() -> None:
    class Told:
        newly_refused: deque[object] = deque()
        now = 0.0
        fresh_tokens = 0

    class Req:
        def __init__(self, index: int) -> None:
            self.index, self.waited, self.prompt = index, 4.0, 100

    probes, told = Probes(capacity=100.0, patience_s=0.0), Told()
    told.newly_refused.extend(Req(i) for i in range(4))
    for step in range(1, 60):
        told.now = 0.25 * step
        told.fresh_tokens += 25 if told.now <= 2 else 0  # for two seconds newcomers take all of it
        probes(told)  # type: ignore[arg-type]
    feasible = [wait for _, wait in probes.waits]
    assert feasible == sorted(feasible)
    assert feasible[0] == pytest.approx(2.0, abs=0.3)
    assert feasible[3] == pytest.approx(5.0, abs=0.6)
    assert probes.figures()["ratio"] == pytest.approx(4.0 / feasible[2])


def test_capacity_is_resumed_and_written_into_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, at, lines = random.Random(4), 0.0, ["arrival_s,client,prompt_tokens,output_tokens"]
    for i in range(240):
        at += rng.expovariate(2.5)
        lines.append(f"{at:.3f},c{i % 4},{rng.randint(20, 300)},{rng.randint(10, 60)}")
    (tmp_path / "vtc_arena_multi_client.csv").write_text("\n".join(lines) + "\n")
    page, picture, state = tmp_path / "page.md", tmp_path / "plot.svg", tmp_path / "state.json"
    page.write_text(f"before\n{capacity.BEGIN}\nold\n{capacity.END}\nafter\n")
    args = argparse.Namespace(
        traces=tmp_path, scenario="vtc", policy="tandem,join-shortest-queue", half="judge", quick=True, jobs=1, state=state,
        doc=page, plot=picture,
    )  # fmt: skip
    found = capacity.run(args)
    assert "2 of 2 points computed" in capsys.readouterr().out
    assert {point["policy"] for point in found["points"]} == {"tandem", "join-shortest-queue"}
    for point in found["points"]:
        assert point["capacity_rps"] > point["base_rps"]
        assert 0 < point["overload_share_of_peak"] <= 1
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| join-shortest-queue |" in text
    assert picture.read_text().startswith("<svg")
    assert len(json.loads(state.read_text())) == 2
    capacity.run(args)
    assert "0 of 2 points computed" in capsys.readouterr().out


def test_capacity_says_what_is_missing(tmp_path: Path) -> None:
    args = argparse.Namespace(
        traces=None, scenario=None, policy="tandem", half="judge", quick=True, jobs=1, state=tmp_path / "s", doc=None, plot=None
    )
    with pytest.raises(SystemExit, match="TANDEM_TRACES"):
        capacity.run(args)
    args.traces, args.policy = tmp_path, "tandemm"
    with pytest.raises(SystemExit, match="did you mean tandem"):
        capacity.run(args)
