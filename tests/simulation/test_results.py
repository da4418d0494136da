"""Figures against numpy, readers and scenarios, the command line's complaints."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from bench import capacity
from bench.traces import Arrival
from protocol.errors import ConfigError
from simulation import policies
from simulation.__main__ import main
from simulation.costs import Cost, read, read_cost
from simulation.results import End, Results, percentiles
from simulation.scenario import Scenario, arrivals_of, halves, load, offered_rate, scaled

SCENARIOS = Path(capacity.__file__).parent / "scenarios"
COST = SCENARIOS / "costs" / "opt-13b-a100-tp1.yaml"


def test_percentiles_are_numpys_nearest_rank() -> None:
    rng = random.Random(1)
    for number in (1, 2, 9, 100, 1013):
        values = [rng.expovariate(1.0) for _ in range(number)]
        found = percentiles(values)
        for share in (0.5, 0.9, 0.95, 0.99):
            assert found[f"p{100 * share:g}"] == np.quantile(values, share, method="inverted_cdf")
        assert found["mean"] == pytest.approx(np.mean(values))
    assert percentiles([])["p99"] is None


def test_waste_is_what_was_computed_in_vain() -> None:
    results = Results()
    rows = (
        (End.FINISHED, True, 100, 0),
        (End.FINISHED, True, 150, 50),  # preempted once: 50 tokens twice
        (End.FINISHED, False, 200, 0),  # late
        (End.FAILED, False, 30, 0),
        (End.REFUSED, False, 0, 0),
    )
    for i, (end, good, computed, again) in enumerate(rows):
        results.add(i, end, f"t{i % 2}", "standard", float(i), 0.5, 0.01, 1.0, good, computed, again)
    found = results.summary(10.0)
    assert found["wasted_prefill_fraction"] == pytest.approx((200 + 30 + 50) / 480)
    assert (found["offered"], found["finished"], found["rejected"], found["failed"]) == (5, 3, 1, 1)
    assert found["goodput_rps"] == pytest.approx(0.2)
    assert found["attainment"] == pytest.approx(0.4)
    assert {name: part["offered"] for name, part in found["tenants"].items()} == {"t0": 3, "t1": 2}


def test_halves_begin_at_zero_and_repeat_without_a_gap() -> None:
    arrivals = [Arrival(float(i), "", 10, 10) for i in range(9)]
    assert [a.at_s for a in halves(arrivals, "first")] == [0, 1, 2, 3]
    assert [a.at_s for a in halves(arrivals, "second")] == [0, 1, 2, 3, 4]
    assert [a.at_s for a in halves(arrivals, "first", 2)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [a.at_s for a in scaled(arrivals[:3], 4.0)] == [0, 0.25, 0.5]
    assert offered_rate(arrivals) == pytest.approx(9 / 8)


def test_every_scenario_and_cost_file_reads() -> None:
    scenarios = [load(path) for path in sorted(SCENARIOS.glob("*.yaml"))]
    assert {s.name for s in scenarios} >= {"azure", "mooncake", "servegen", "vtc"}
    for scenario in scenarios:
        assert (scenario.tune, scenario.judge) == ("first", "second"), "what tunes does not judge"
        for pool in (scenario.prefill, scenario.decode):
            assert read_cost(SCENARIOS / pool.cost).num_blocks > 256


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"prefill": {"per_step_s": "soon", "per_token_s": 0.1}}, "prefill.per_step_s"),
        ({"surprise": 1}, "surprise"),
        ({"kv": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "dtype": "float12"}}, "dtype"),
    ],
)
def test_a_bad_cost_file_is_refused_by_name(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = tmp_path / "cost.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(COST.read_text()), **change}))
    with pytest.raises(ConfigError, match=named) as caught:
        read_cost(path)
    assert str(path) in caught.value.message


def test_files_that_are_not_there_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.yaml", Cost)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read(tmp_path / "bad.yaml", Scenario)
    with pytest.raises(ConfigError, match="--trace"):
        arrivals_of(tmp_path / "none.csv")
    (tmp_path / "lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n10,10\n")
    with pytest.raises(ConfigError, match="no arrivals"):
        arrivals_of(tmp_path / "lengths.csv")


def test_policies_have_their_names() -> None:
    assert policies.check("mooncake-fcfs") == "mooncake"
    assert policies.check("lmetric-edf") == "lmetric-edf"
    with pytest.raises(ConfigError, match="did you mean round-robin"):
        policies.check("round-robbin")
    wanted = {"round-robin", "random", "join-shortest-queue", "token-jsq", "cache-aware", "dynamo", "lmetric", "mooncake"}
    assert set(policies.NAMES) == {"tandem", "tandem-oracle"} | wanted | {f"{name}-edf" for name in wanted}


def a_trace(tmp_path: Path, number: int = 120) -> Path:
    rng, at, lines = random.Random(2), 0.0, ["arrival_s,tenant,input_tokens,output_tokens"]
    for i in range(number):
        at += rng.expovariate(4.0)
        lines.append(f"{at:.4f},tenant-{i % 3},{rng.randint(10, 900)},{rng.randint(1, 120)}")
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_simulate_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    words = ["simulate", "--trace", str(a_trace(tmp_path)), "--prefill", "1", "--decode", "2", "--policy", "tandem"]
    words += ["--cost", str(COST), "--slo", "ttft=1,tpot=100ms", "--json", str(out), "--plot", str(picture), "--scale", "2"]
    assert main(words) == 0
    assert "goodput" in capsys.readouterr().out
    found = json.loads(out.read_text())
    for key in ("goodput_rps", "attainment", "ttft_s", "tpot_s", "rejected", "wasted_prefill_fraction", "utilization"):
        assert key in found
    for key in ("goodput_rps", "attainment", "ttft_s", "tpot_s", "rejected", "wasted_prefill_fraction"):
        assert all(key in part for part in (*found["tenants"].values(), *found["classes"].values()))
    assert set(found["tenants"]) == {"tenant-0", "tenant-1", "tenant-2"}
    assert found["offered"] == 120
    assert 0 < found["utilization"]["decode"] <= 1
    assert picture.read_text().startswith("<svg")
    assert main([*words, "--oracle-lengths", "--retries", "--shared-gbps", "10", "--half", "second"]) == 0
    assert json.loads(out.read_text())["offered"] == 60


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prefill", "x"], "--prefill: x: wanted"),
        (["--decode", "0"], "somebody has to decode"),
        (["--policy", "jsq"], "no such policy"),
        (["--scale", "0"], "positive"),
        (["--slo", "ttft=never"], "--slo"),
        (["--cost", "prefill=a.yaml"], "wanted FILE, or prefill=FILE,decode=FILE"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--bogus", "1"], "--bogus"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    base = ["simulate", "--trace", str(a_trace(tmp_path, 5)), "--prefill", "1", "--decode", "1", "--cost", str(COST)]
    assert main([*base, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tandem: ")
    assert told in error
    assert error.count("\n") == 1
