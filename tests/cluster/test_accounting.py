"""Promises and prices of a tenants file, where they are counted: SLA report, metrics, events; and decisions in words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from api.sla_report import as_csv, as_markdown
from cluster.explain import explained, lines
from cluster.history import History, promises_in
from cluster.loopback import Hub
from cluster.metrics import ClusterMetrics
from cluster.scheduler_service import SchedulerService
from cluster.tenant_metrics import about_tenants
from cluster.terminal import Paint
from cluster.trace_view import lines as trace_lines
from configs.schema import SchedulerConfig
from configs.tenants import Tenants, read_tenants
from protocol.errors import NotFound, TandemError, TenantOverLimit
from protocol.kv import KVLayout
from protocol.messages import Admit, AskHistory, Outcome, Progress, WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import Ticket
from protocol.timeline import Trace
from scheduler.scheduler import Scheduler
from scheduler.sla import Prices, Promise, Sla, is_kept

FILE = """
classes:
  fast: {ttft_s: 0.5, tpot_s: 0.05, attainment: 0.9, band: 0}
  slow: {ttft_s: 5, tpot_s: 1, attainment: 0.5, band: 2, when_late: queue}
tenants:
  acme: {class: fast, classes: [slow], price: {input: 10, cached: 1, output: 30}, weight: 3, requests_per_min: 2}
  globex: {class: slow}
"""


def tenants(text: str = FILE) -> Tenants:
    return read_tenants(text, "t")


def outcome(request_id: str, tenant: str = "acme", slo_class: str = "fast", **more: Any) -> Outcome:
    given = {
        "epoch": 1, "kind": "finished", "prompt_tokens": 100, "cached_tokens": 40, "output_tokens": 10, "queue_s": 0.1,
        "ttft_s": 0.4, "tpot_s": 0.04, "e2e_s": 1.0, "trace": Trace(client_id=f"mine-{request_id}", placed_ttft_s=0.2),
    }  # fmt: skip
    return Outcome(request_id=request_id, tenant=tenant, slo_class=slo_class, **{**given, **more})


def sla(text: str = FILE, prices: Prices | None = None) -> Sla:
    made = Sla({"standard": Promise(1.0, 0.1)}, prices, ("default",))
    found = tenants(text)
    own = {name: Prices(one.price.input, one.price.cached, one.price.output) for name, one in found.tenants.items()}
    made.set_table(promises_in(found), {name: p for name, p in own.items() if p != Prices()}, found.tenants)
    return made


def rows(made: Sla, now: float = 10.0) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["tenant"], row["class"]): row for row in made.rows(300.0, now)}


def test_each_class_is_held_against_its_own_promise() -> None:
    made = sla()
    for i, ttft_s in enumerate((0.4, 0.6, 4.0)):
        made.outcome(outcome(f"a{i}", ttft_s=ttft_s), 5.0)
        made.outcome(outcome(f"b{i}", "globex", "slow", ttft_s=ttft_s), 5.0)
    found = rows(made)
    assert found["acme", "fast"]["attainment"] == pytest.approx(1 / 3)
    assert found["globex", "slow"]["attainment"] == 1.0
    assert found["acme", "fast"]["promise"] == {"ttft_s": 0.5, "tpot_s": 0.05, "attainment": 0.9}
    assert (found["acme", "fast"]["budget_left"], found["globex", "slow"]["budget_left"]) == (0.0, 1.0)


def test_a_tighter_promise_of_its_own_is_the_one_that_counts() -> None:
    promise = Promise(0.5, 0.05)
    assert is_kept(outcome("r"), promise)
    assert not is_kept(outcome("r", ttft_slo_s=0.3), promise)
    assert not is_kept(outcome("r", tpot_slo_s=0.03), promise)
    assert is_kept(outcome("r", ttft_slo_s=9.0), promise), "a looser one changes nothing"
    assert not is_kept(outcome("r", ttft_slo_s=9.0, ttft_s=0.6), promise)


def test_degraded_requests_are_judged_where_they_were_served_and_counted_where_they_came_from() -> None:
    made = sla()
    made.outcome(outcome("a", slo_class="slow", ttft_s=3.0, asked_class="fast", degraded="class=slow"), 5.0)
    made.outcome(outcome("b", degraded="max_tokens=4"), 5.0)
    found = rows(made)
    assert (found["acme", "slow"]["finished"], found["acme", "slow"]["attainment"], found["acme", "slow"]["degraded"]) == (
        1,
        1.0,
        0,
    )
    assert (found["acme", "fast"]["finished"], found["acme", "fast"]["degraded"]) == (1, 2)
    report = {"window_s": 300.0, "rows": made.rows(300.0, 10.0)}
    assert "2 degraded" in as_markdown(report)
    assert as_csv(report).splitlines()[0].split(",")[6] == "degraded"


def test_money_is_counted_by_the_tenants_prices_of_the_day() -> None:
    made = sla(prices=Prices(1.0, None, 1.0))
    made.outcome(outcome("a"), 5.0)
    made.outcome(outcome("b", "globex", "slow"), 5.0)
    before = (60 * 10 + 40 * 1 + 10 * 30) / 1e6
    assert rows(made)["acme", "fast"]["cost"] == pytest.approx(before)
    assert rows(made)["globex", "slow"]["cost"] == pytest.approx(110 / 1e6), "the cluster's, without any of its own"
    made.set_table(made.promises, {"acme": Prices(100.0, None, 100.0)}, ["acme"])
    assert rows(made)["acme", "fast"]["cost"] == pytest.approx(before), "what was is not made dearer"
    made.outcome(outcome("c"), 6.0)
    assert rows(made)["acme", "fast"]["cost"] == pytest.approx(before + 110 * 100 / 1e6)
    assert rows(sla()) == {}
    free = sla()
    free.outcome(outcome("d", "globex", "slow"), 5.0)
    assert rows(free)["globex", "slow"]["cost"] is None


def test_a_reload_keeps_what_was_counted_and_knows_every_tenant_by_name() -> None:
    many = FILE + "".join(f"  t{i}: {{class: slow}}\n" for i in range(200))
    made = sla(many)
    for i in range(200):
        made.outcome(outcome(f"r{i}", f"t{i}", "slow"), 5.0)
    assert len(rows(made)) == 200, "a bill has no line called other"
    made.set_table({"new": Promise(1.0, 1.0)}, {}, ["acme"])
    found = rows(made)
    assert len(found) == 200
    assert found["t7", "slow"]["promise"]["ttft_s"] == 5.0, "as it was promised then"
    for n in range(100):  # reloads without end do not add up
        made.set_table({f"class{n}": Promise(1.0, 1.0)}, {}, ["acme"])
    assert len(made.promises) <= 3


# ---- metrics ---------------------------------------------------------------------------------------------------------


def value(text: str, name: str, **labels: str) -> float:
    for line in text.splitlines():
        if line.startswith(f"{name}{{") and all(f'{key}="{one}"' in line for key, one in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no {name} {labels}")


def test_series_of_the_file_are_there_at_nought_and_survive_a_reload() -> None:
    metrics = ClusterMetrics("m")
    metrics.set_tenants(tenants())
    text = metrics.text({})
    for slo_class in ("fast", "slow"):
        assert value(text, "tandem_slo_requests_total", tenant="acme", **{"class": slo_class}) == 0
        assert value(text, "tandem_refusals_total", tenant="acme", reason="slo_ttft", **{"class": slo_class}) == 0
    with pytest.raises(AssertionError):
        value(text, "tandem_slo_requests_total", tenant="globex", **{"class": "fast"})
    metrics.observe(outcome("a", ttft_s=0.6))
    metrics.observe(outcome("b", slo_class="slow", ttft_s=0.6, asked_class="fast", degraded="class=slow"))
    metrics.set_tenants(tenants(FILE.replace("globex", "initech")))
    text = metrics.text({})
    assert value(text, "tandem_slo_requests_total", tenant="acme", **{"class": "fast"}) == 1
    assert value(text, "tandem_slo_kept_total", tenant="acme", **{"class": "fast"}) == 0
    assert value(text, "tandem_slo_kept_total", tenant="acme", **{"class": "slow"}) == 1
    assert value(text, "tandem_degraded_total", tenant="acme", **{"class": "fast"}) == 1
    assert value(text, "tandem_slo_requests_total", tenant="globex", **{"class": "slow"}) == 0, "a counter does not disappear"
    assert value(text, "tandem_slo_requests_total", tenant="initech", **{"class": "slow"}) == 0


# ---- through the service ---------------------------------------------------------------------------------------------


class Staged:
    def __init__(self) -> None:
        self.now = 10.0
        self.scheduler = Scheduler(SchedulerConfig(), draw=lambda: 0.5)
        self.metrics = ClusterMetrics("m")
        self.service = SchedulerService(self.scheduler, Hub().network("scheduler"), lambda: self.now, self.metrics)
        self.service.history = History(self.scheduler, lambda: 1e9, self.metrics.refused)
        self.service._take_tenants(tenants())
        for role in ("prefill", "decode"):
            info = WorkerInfo(
                incarnation=f"{role}-0-a", role=role, name=f"{role}:0", address=f"{role}:1", model="m", num_blocks=100,
                pid=1, host="h", layout=KVLayout(2, 2, 16, 16, "float32", "hash"), max_model_len=4096, max_num_seqs=4, device="cpu",
            )  # fmt: skip
            self.service._register(object(), info, self.now)  # type: ignore[arg-type]
            self.service._worker_beat(object(), WorkerBeat(info.incarnation, "ready", WorkerStats(num_free_blocks=100)), self.now)  # type: ignore[arg-type]

    async def admit(self, request_id: str, tenant: str = "acme", slo_class: str = "fast", **more: Any) -> Ticket:
        given = {"model": "m", "priority": 0, "prompt_len": 64, "max_tokens": 10, "client_id": f"mine-{request_id}"}
        return await self.service._admit(Admit(request_id=request_id, tenant=tenant, slo_class=slo_class, **{**given, **more}))

    def document(self, request_id: str, what: str = "decision") -> dict[str, Any]:
        return self.service.history.answer(AskHistory(what=what, request_id=request_id), self.now)

    def text(self) -> str:
        return self.service._metrics_text(None, None, self.now).text  # type: ignore[arg-type]


@pytest.fixture
def staged() -> Staged:
    return Staged()


async def test_a_decision_from_its_request_to_what_came_true(staged: Staged) -> None:
    await staged.admit("r", ttft_slo_s=0.45)
    staged.now += 0.3
    staged.service._progress(object(), Progress("r", 1, 0.3), staged.now)  # type: ignore[arg-type]
    staged.service._outcome(object(), outcome("r", ttft_s=0.47), staged.now)  # type: ignore[arg-type]
    for name in ("r", "mine-r"):
        found = staged.document(name)
        assert found["id"] == "r"
        assert found["request"]["tenant"] == "acme"
        assert found["promise"] == {"ttft_s": 0.45, "tpot_s": 0.05}, "its own, and its class's where it has none"
        assert next(step for step in found["steps"] if step["what"] == "placed")["decode"] == "decode:0"
        assert found["came_true"]["ttft_s"] == 0.47
        assert found["result"]["state"] == "finished"
    said = "\n".join(lines(found, Paint(False)))
    for words in (
        "tenant acme, class fast",
        "first token within 450.0 ms",
        "decode decode:0",
        "TTFT was 470.0 ms instead of 450.0 ms",
    ):
        assert words in said, said
    with pytest.raises(NotFound, match="max_decisions"):
        staged.document("nobody")
    shown = staged.document("r", "request")
    assert shown["why"]["promise"]["ttft_s"] == 0.45
    assert any(one["worker"] == "decode:0" and one["chosen"] for one in shown["why"]["seen"])
    assert any("why there" in line for line in trace_lines(shown, Paint(False)))


async def test_a_refusal_is_explained_and_counted_with_its_reason(staged: Staged) -> None:
    refused: TandemError | None = None
    for i in range(4):
        try:
            await staged.admit(f"r{i}")
        except TenantOverLimit as error:
            refused = error
            break
    assert refused is not None
    assert refused.reason == "tenant_requests"
    assert refused.retry_after is not None
    assert math.isfinite(refused.retry_after)
    found = staged.document(f"mine-r{i}")
    assert any(step["what"] == "refused" and step["reason"] == "tenant_requests" for step in found["steps"])
    assert found["result"]["state"] == "refused"
    assert any("refused" in line and "retry after" in line for line in found["words"])
    assert any("refused" in line for line in trace_lines(staged.document(f"r{i}", "request"), Paint(False)))
    text = staged.text()
    assert value(text, "tandem_refusals_total", tenant="acme", reason="tenant_requests", **{"class": "fast"}) == 1
    assert value(text, "vllm:admission_rejections_total", reason="tenant_requests") == 1
    assert value(text, "tandem_tenant_weight", tenant="acme") == 3.0
    assert value(text, "tandem_tenant_bucket_level", tenant="acme", bucket="requests") < 1.0


async def test_how_tenants_stand_and_how_wrong_predictions_were(staged: Staged) -> None:
    await staged.admit("r")
    staged.now += 0.3
    staged.service._progress(object(), Progress("r", 1, 0.3), staged.now)  # type: ignore[arg-type]
    found = {**staged.scheduler.status(staged.now), **about_tenants(staged.scheduler, staged.now)}
    assert {row["tenant"]: row["band"] for row in found["services"]} == {"acme": 0}
    assert found["tenants"]["acme"]["weight"] == 3.0
    assert found["tenants"]["globex"] == {"class": "slow", "weight": 1.0, "buckets": {}}
    measured = {of: row for model in found["cost_models"] for of, row in model["errors"].items() if row["count"]}
    assert measured["ttft"]["p90"] > 0
    text = staged.text()
    assert value(text, "tandem_prediction_error_ratio", of="ttft", role="prefill") == pytest.approx(measured["ttft"]["mape"])
    assert value(text, "tandem_tenant_service", tenant="acme", band="0") > 0


def test_words_for_what_little_is_known() -> None:
    for decision in (
        {"request_id": "r", "request": {}, "promise": {}, "steps": [], "candidates": [], "came_true": None},
        {"request_id": "r", "request": {"tenant": "t"}, "promise": {"ttft_s": 1.0, "tpot_s": None},
         "steps": [{"at_s": 0, "what": "x"}], "candidates": [{"worker": "w", "why_not": "full"}],
         "came_true": {"kind": "failed", "ttft_s": None}},
    ):  # fmt: skip
        found = explained("r", decision, None)
        assert found["words"][0] == "request r"
        assert lines(found, Paint(False))
