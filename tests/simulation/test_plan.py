"""The planner: what it searches, how it ranks, what it writes. On a small trace and a made-up model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest
import yaml

from protocol.errors import ConfigError
from simulation import plan, plan_page
from simulation.__main__ import main
from simulation.plan import Judged, Plan
from tests.simulation.small import small_cost


def a_trace(path: Path, number: int = 500) -> Path:
    """Long answers to short prompts: decode needs more than prefill."""
    rng, at, lines = random.Random(3), 0.0, ["arrival_s,client,prompt_tokens,output_tokens"]
    for _ in range(number):
        at += rng.expovariate(12.0)
        lines.append(f"{at:.4f},c,{rng.randint(10, 60)},{rng.randint(60, 140)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def cost_files(folder: Path) -> str:
    for gpus, factor in ((1, 1.0), (2, 0.6)):
        cost = small_cost(name=f"small-tp{gpus}", gpus=gpus, num_blocks=900 * gpus, price_per_hour=2.0 * gpus)
        plain = msgspec.to_builtins(cost)
        plain["decode"]["per_step_s"] *= factor
        plain["prefill"]["per_token_s"] *= factor
        del plain["decode_large"]
        (folder / f"small-tp{gpus}.yaml").write_text(yaml.safe_dump(plain))
    return str(folder / "small-tp*.yaml")


def test_plan_finds_what_is_cheaper_than_one_to_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    slo = tmp_path / "slo.yaml"
    slo.write_text("ttft_s: 0.5\ntpot_s: 0.02\nattainment: 0.9\n")
    words = [
        "plan",
        "--trace",
        str(a_trace(tmp_path / "t.csv")),
        "--slo",
        str(slo),
        "--gpus",
        "6",
        "--cost",
        str(tmp_path / "small-tp1.yaml"),
    ]
    cost_files(tmp_path)
    words += ["--price", "prefill=2,decode=2", "--thresholds", "16", "--jobs", "2", "--requests", "400"]
    words += ["--policy", "join-shortest-queue", "--json", str(out), "--html", str(page)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "cheaper than the cheapest 1:1" in said
    found = json.loads(out.read_text())
    best, even = found["plans"][0], found["even"]
    assert best["attainment"] >= 0.9
    assert even["prefill"] == even["decode"]
    assert best["price_per_hour"] < even["price_per_hour"]
    assert found["saving"] == pytest.approx(1 - best["price_per_hour"] / even["price_per_hour"])
    assert best["price_per_hour"] == 2.0 * best["gpus"]
    text = page.read_text()
    assert "/*DATA*/" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "loads nothing from elsewhere"
    assert len({(p["prefill"], p["decode"]) for p in found["curve"]}) > 3


def judged(attainment: float, price: float) -> Judged:
    return Judged(Plan(0, 1, 0, 1, 16), attainment, 1.0, 2, price, 0.1, 0.01, 100)


def test_the_feasible_come_first_and_the_cheapest_of_them() -> None:
    slo = plan.slo_of("ttft=1,tpot=0.1")
    rows = [judged(0.95, 9.0), judged(0.91, 5.0), judged(0.5, 1.0), judged(0.89, 2.0)]
    ranked = sorted(rows, key=lambda one: plan.rank(one, slo))
    assert [(j.attainment, j.price_per_hour) for j in ranked] == [(0.91, 5.0), (0.95, 9.0), (0.89, 2.0), (0.5, 1.0)]
    assert plan.cheapest(rows, slo) == rows[1]
    assert plan.cheapest(rows[2:], slo) is None
    assert plan.saving(rows[1], rows[0]) == pytest.approx(4 / 9)
    assert plan.saving(None, rows[0]) is None


def test_every_plan_fits_and_has_both_roles() -> None:
    costs = (small_cost(gpus=1), small_cost(gpus=4))
    plans = plan.every_plan(costs, 16, (16,))
    assert len(plans) == len(set(plans)) > 20
    for one in plans:
        used = one.prefill * costs[one.prefill_cost].gpus + one.decode * costs[one.decode_cost].gpus
        assert 2 <= used <= 16
        assert one.prefill > 0
        assert one.decode > 0
    assert any(plan.is_even(one) for one in plans)
    with pytest.raises(ConfigError, match="too few"):
        plan.every_plan((small_cost(gpus=4),), 6, (16,))


def test_a_page_cannot_be_broken_out_of() -> None:
    text = plan_page.page({"plans": [], "curve": []}, "</script><b>")
    assert "</script><b>" not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "1"], "at least 2"),
        (["--slo", "ttft=1"], "both ttft and tpot"),
        (["--cost", "/nowhere/*.yaml"], "no such file"),
        (["--price", "cheap"], "--price"),
        (["--thresholds", "few"], "--thresholds"),
        (["--policy", "magic"], "no such policy"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    base = ["plan", "--trace", str(a_trace(tmp_path / "t.csv", 20)), "--slo", "ttft=1,tpot=0.1", "--gpus", "4"]
    assert main([*base, "--cost", cost_files(tmp_path), *words]) == 2
    assert told in capsys.readouterr().err
