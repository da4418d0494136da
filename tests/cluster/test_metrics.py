"""/metrics is what happened: every number here is fed in by hand or stands in the status of a real scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.metric_table import EVENTS, REJECTIONS, WORKER_SERIES
from cluster.metrics import ClusterMetrics
from configs.schema import SchedulerConfig
from protocol.errors import Overloaded
from protocol.kv import KVLayout
from protocol.messages import Admit, Outcome, PairStats, WorkerBeat, WorkerInfo, WorkerStats
from protocol.parallel import Parallel
from protocol.timeline import Trace
from scheduler.scheduler import Scheduler
from scheduler.sla import Promise

HAVE_NO_VALUE_HERE = {"vllm:inter_token_latency_seconds"}  # it has eight of each request
HOSTILE = 'x"} 1\nevil_metric 7\n'  # what a client could send as a class, and a tenant could be called

FINISHED = Outcome(
    request_id="r",
    epoch=1,
    kind="finished",
    tenant="t",
    slo_class="standard",
    prompt_tokens=30,
    cached_tokens=16,
    output_tokens=9,
    queue_s=0.25,
    ttft_s=1.0,
    tpot_s=0.125,
    e2e_s=2.0,
    finish_reason="length",
    trace=Trace(
        prefill_worker="prefill:0",
        decode_worker="decode:0",
        transfer_s=0.0625,
        max_tokens=20,
        max_output=9,
        predicted_ttft_s=0.5,
        placed_ttft_s=0.75,
        gaps=((0, 3), (10, 5)),
        gap_s=1.0,
    ),  # fmt: skip
)


def changed(outcome: Outcome = FINISHED, **values: Any) -> Outcome:
    return msgspec.structs.replace(outcome, **values)


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    """The one sample of that name with all those labels."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{name}{labels}: {len(found)} samples"
    return found[0]


def worker(role: str, name: str | None = None, num_blocks: int = 200) -> WorkerInfo:
    return WorkerInfo(
        incarnation=f"{name or role}-life",
        role=role,
        name=name or f"{role}:0",
        address="h:1",
        model="m",
        layout=KVLayout(2, 2, 16, 16, "float32", "hash"),
        num_blocks=num_blocks,
        max_model_len=1000,
        max_num_seqs=8,
        pid=1,
        host="h",
        device="cpu",
    )


def admit(request_id: str, prompt_len: int = 20) -> Admit:
    return Admit(
        request_id=request_id,
        model="m",
        tenant=HOSTILE,
        slo_class=HOSTILE,
        priority=0,
        prompt_len=prompt_len,
        max_tokens=10,
    )


@pytest.fixture
def scheduler() -> Scheduler:
    made = Scheduler(SchedulerConfig(max_queue_requests=2), draw=lambda: 0.5)
    for role in ("prefill", "decode"):
        made.register(worker(role), 0.0)
    return made


def beat(scheduler: Scheduler, role: str, now: float, **stats: Any) -> None:
    assert scheduler.heartbeat(WorkerBeat(f"{role}-life", "ready", WorkerStats(**stats)), now)


# ---- outcomes --------------------------------------------------------------------------------------------------------


def test_a_finished_request_is_in_every_histogram_once() -> None:
    metrics = ClusterMetrics("m")
    metrics.observe(FINISHED)
    text = metrics.text({})
    expected = {
        "vllm:time_to_first_token_seconds": 1.0,
        "vllm:request_time_per_output_token_seconds": 0.125,
        "vllm:e2e_request_latency_seconds": 2.0,
        "vllm:request_queue_time_seconds": 0.25,
        "vllm:request_prefill_time_seconds": 0.75,  # placed to first token
        "vllm:request_decode_time_seconds": 1.0,  # first token to the end
        "vllm:request_inference_time_seconds": 1.75,  # placed to the end
        "vllm:request_prompt_tokens": 30.0,
        "vllm:request_generation_tokens": 9.0,
        "vllm:request_prefill_kv_computed_tokens": 14.0,
        "vllm:request_params_n": 1.0,
        "vllm:request_params_max_tokens": 20.0,
        "vllm:request_max_num_generation_tokens": 9.0,
        "tandem_kv_transfer_duration_seconds": 0.0625,
        "tandem_ttft_prediction_ratio": 1.5,
    }
    for name, total in expected.items():
        assert value(text, f"{name}_count", model_name="m") == 1, name
        assert value(text, f"{name}_sum", model_name="m") == total, name
    labels = {"tenant": "t", "class": "standard"}
    assert value(text, "tandem_time_to_first_token_seconds_sum", **labels) == 1.0
    assert value(text, "tandem_time_per_output_token_seconds_sum", **labels) == 0.125
    gaps = "vllm:inter_token_latency_seconds"
    assert (value(text, f"{gaps}_count"), value(text, f"{gaps}_sum")) == (8, 1.0)
    assert value(text, f"{gaps}_bucket", le="0.001") == 3
    assert {name for name, family in families(text).items() if family.type == "histogram"} == {
        *expected, gaps, "tandem_time_to_first_token_seconds", "tandem_time_per_output_token_seconds",
    }  # fmt: skip
    assert value(text, "vllm:prompt_tokens_total") == 30
    assert value(text, "vllm:prompt_tokens_cached_total") == 16
    assert value(text, "vllm:generation_tokens_total") == 9
    assert value(text, "vllm:request_success_total", finished_reason="length") == 1


def test_histograms_are_complete_and_grow_to_infinity() -> None:
    metrics = ClusterMetrics("m")
    for ttft in (0.0005, 0.03, 0.03, 1e6):
        metrics.observe(changed(ttft_s=ttft, e2e_s=ttft + 1))
    for name, family in families(metrics.text({})).items():
        if family.type != "histogram" or name in HAVE_NO_VALUE_HERE:
            continue
        family.samples = [s for s in family.samples if s.labels.get("tenant", "t") == "t"]
        buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets), name
        assert buckets[-1] == (float("inf"), 4), name
        assert {s.name.removeprefix(name) for s in family.samples} == {"_bucket", "_count", "_sum"}, name
    ttfts = families(metrics.text({}))["vllm:time_to_first_token_seconds"].samples
    at = {s.labels["le"]: s.value for s in ttfts if s.name.endswith("_bucket")}
    assert (at["0.001"], at["0.02"], at["0.04"], at["2560.0"]) == (1, 1, 3, 3)


def test_everything_is_there_at_zero_before_the_first_request() -> None:
    """rate() of a counter that appears with its first increment misses that increment."""
    text = ClusterMetrics("m").text({})
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count"):
        assert value(text, name, model_name="m") == 0
    for reason in ("stop", "length", "abort", "error"):
        assert value(text, "vllm:request_success_total", finished_reason=reason) == 0
    for reason in REJECTIONS:
        assert value(text, "vllm:admission_rejections_total", reason=reason) == 0
    for event in EVENTS:
        assert value(text, "tandem_scheduler_events_total", event=event) == 0


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (changed(finish_reason="stop"), "stop"),
        (changed(finish_reason="length"), "length"),
        (changed(finish_reason=""), "stop"),
        (changed(finish_reason=HOSTILE), "stop"),
        (changed(kind="cancelled"), "abort"),
        (changed(kind="failed", failure_kind="WorkerLost"), "error"),
        (changed(kind=HOSTILE), "error"),
    ],
)
def test_how_it_ended_is_one_of_four_words(outcome: Outcome, reason: str) -> None:
    metrics = ClusterMetrics("m")
    metrics.observe(outcome)
    text = metrics.text({})
    ended = {
        s.labels["finished_reason"]: s.value for s in families(text)["vllm:request_success"].samples if s.name.endswith("_total")
    }
    assert ended == {"stop": 0, "length": 0, "abort": 0, "error": 0} | {reason: 1}
    finished = float(outcome.kind == "finished")
    assert value(text, "vllm:e2e_request_latency_seconds_count") == finished, "only finished requests have a latency"


def test_one_token_has_no_time_per_token_and_no_token_computed_no_prompt() -> None:
    metrics = ClusterMetrics("m")
    metrics.observe(changed(output_tokens=1, tpot_s=0.0))
    assert value(metrics.text({}), "vllm:request_time_per_output_token_seconds_count") == 0
    assert value(metrics.text({}), "vllm:prompt_tokens_total") == 30
    metrics.observe(changed(kind="failed", output_tokens=0, ttft_s=0.0))
    assert value(metrics.text({}), "vllm:prompt_tokens_total") == 30
    assert value(metrics.text({}), "vllm:request_success_total", finished_reason="error") == 1


def test_a_refused_request_is_a_rejection_and_not_a_failure(scheduler: Scheduler) -> None:
    metrics = ClusterMetrics("m")
    scheduler.worker_lost("decode-life", 0.0)
    for i in range(2):
        scheduler.submit(admit(f"waits-{i}"), 1.0)
    with pytest.raises(Overloaded):
        scheduler.submit(admit("too-many"), 1.0)
    refused = changed(request_id="too-many", epoch=0, kind="failed", failure_kind="Overloaded", output_tokens=0)
    scheduler.outcome(refused, 1.0)  # as the gateway tells it
    metrics.observe(refused)
    text = metrics.text(scheduler.status(1.0))
    assert value(text, "vllm:admission_rejections_total", reason="queue_requests") == 1
    assert value(text, "vllm:request_success_total", finished_reason="error") == 0
    assert scheduler.status(1.0)["counters"].get("failed", 0) == 0
    assert scheduler.status(1.0)["counters"]["rejected"] == 1
    nobody_to_ask = changed(refused, failure_kind="WorkerLost")
    metrics.observe(nobody_to_ask)
    assert value(metrics.text({}), "vllm:request_success_total", finished_reason="error") == 1


# ---- tenants and their promises --------------------------------------------------------------------------------------


def test_promised_and_kept_by_tenant_and_class() -> None:
    metrics = ClusterMetrics("m", {"standard": Promise(1.0, 0.2)}, ("t",))
    labels = {"tenant": "t", "class": "standard"}
    assert value(metrics.text({}), "tandem_slo_kept_total", **labels) == 0, "there before the first request"
    for outcome in (FINISHED, changed(ttft_s=1.5), changed(tpot_s=0.3), changed(kind="failed"), changed(kind="cancelled")):
        metrics.observe(outcome)
    metrics.refused("t", "standard", "tenant_share")
    metrics.refused("t", "standard", HOSTILE)
    text = metrics.text({}, [{**dict(labels), "attainment": 0.25, "budget_left": None, "goodput_per_s": 2.0}])
    assert value(text, "tandem_slo_requests_total", **labels) == 4
    assert value(text, "tandem_slo_kept_total", **labels) == 1
    assert value(text, "tandem_slo_ttft_kept_total", **labels) == 2, "also the one whose later tokens came late"
    outcomes = [value(text, "tandem_requests_total", outcome=kind, **labels) for kind in ("finished", "failed", "cancelled")]
    assert outcomes == [3, 1, 1]
    assert value(text, "tandem_tokens_total", kind="cached", **labels) == 80
    assert value(text, "tandem_refusals_total", reason="tenant_share", **labels) == 1
    assert value(text, "tandem_refusals_total", reason="other", **labels) == 1
    assert value(text, "tandem_slo_attainment_ratio", **labels) == 0.25
    assert families(text)["tandem_slo_error_budget_left_ratio"].samples == []
    assert value(text, "tandem_slo_target_ratio", **{"class": "standard"}) == 0.99


def test_the_table_of_tenants_is_bounded() -> None:
    metrics = ClusterMetrics("m")
    for i in range(500):
        metrics.observe(changed(tenant=f"tenant-{i}"))
    samples = families(metrics.text({}))["tandem_slo_requests"].samples
    counted = {s.labels["tenant"]: s.value for s in samples if s.name.endswith("_total")}
    assert len(counted) == 65
    assert sum(counted.values()) == 500
    assert counted["other"] == 500 - 63


# ---- the status of a real scheduler ----------------------------------------------------------------------------------


def test_gauges_and_counters_are_those_of_the_status(scheduler: Scheduler) -> None:
    beat(
        scheduler,
        "prefill",
        1.0,
        num_running=2,
        num_waiting=3,
        num_free_blocks=150,
        num_used_blocks=50,
        transfers=7,
        transfer_bytes=900,
        transfer_s=0.5,
        pairs=(
            PairStats(peer="decode-0-aa", transport="tcp", transfers=7, failed=1, nbytes=900, fallbacks=2),
            PairStats(peer="decode-0-bb", transport="tcp", transfers=2, nbytes=100, seconds=0.5, fallbacks=1),
            PairStats(peer="decode-0-bb", transport="shm", transfers=1, nbytes=50, fallbacks=1),
        ),
    )
    beat(
        scheduler,
        "decode",
        1.0,
        num_running=5,
        num_waiting=1,
        num_used_blocks=20,
        num_free_blocks=180,
        num_cached_blocks=30,
        transfers=6,
        digest_failures=1,
        pairs=(PairStats(peer="prefill-0-aa", transport="tcp", transfers=7, nbytes=900, stale=4),),
        gpu={"utilization": 0.5},
    )
    scheduler.submit(admit("a"), 1.0)
    assert scheduler.decisions(1.0)
    status = msgspec.json.decode(msgspec.json.encode(scheduler.status(1.0)))
    text = ClusterMetrics("m").text(status)
    assert ClusterMetrics("m").text(scheduler.status(1.0)) == text, "the very structs are as good as their JSON"
    link = {"engine": "prefill:0", "peer": "decode:0", "transport": "tcp"}
    assert value(text, "tandem_kv_link_bytes_total", **link) == 1000, "two lives of one worker are one series"
    assert value(text, "tandem_kv_link_bytes_total", **{**link, "transport": "shm"}) == 50
    assert value(text, "tandem_kv_link_seconds_total", **link) == 0.5
    assert value(text, "tandem_kv_link_fallbacks_total", engine="prefill:0", peer="decode:0") == 3
    assert value(text, "tandem_kv_link_stale_total", engine="decode:0", peer="prefill:0", transport="tcp") == 4
    assert value(text, "tandem_kv_link_failures_total", **link) == 1
    assert value(text, "tandem_gpu_utilization_ratio", engine="decode:0") == 0.5
    assert value(text, "tandem_workers", role="decode", state="ready") == 1
    assert value(text, "vllm:num_requests_waiting_by_reason", reason="deferred") == 1
    decode, prefill = {"engine": "decode:0", "role": "decode"}, {"engine": "prefill:0", "role": "prefill"}
    assert value(text, "vllm:num_requests_running", **decode) == 5
    assert value(text, "vllm:num_requests_waiting", **prefill) == 3
    assert value(text, "vllm:num_requests_waiting", engine="scheduler") == status["queue"]["requests"]
    assert value(text, "vllm:kv_cache_usage_perc", **prefill) == 0.25
    assert value(text, "vllm:cache_config_info", block_size="16", num_gpu_blocks="200", **decode) == 1
    assert value(text, "tandem_worker_cached_blocks", **decode) == 30
    assert value(text, "tandem_kv_transfers_total", **prefill) == 7
    assert value(text, "tandem_kv_transfer_bytes_total", **prefill) == 900
    assert value(text, "tandem_kv_transfer_seconds_total") == 0.5, "only the sender measures it"
    assert value(text, "tandem_kv_digest_failures_total") == 1, "only the receiver can see it"
    in_flight = [value(text, "tandem_requests_in_flight", phase=phase) for phase in ("prefilling", "decoding")]
    assert in_flight == [status["in_flight"]["prefilling"], status["in_flight"]["decoding"]] == [1, 0]
    assert value(text, "tandem_scheduler_events_total", event="submitted") == 1
    assert value(text, "tandem_promise_seconds", of="ttft") == status["promise"]["ttft_s"]


def test_the_queue_is_told(scheduler: Scheduler) -> None:
    scheduler.worker_lost("decode-life", 0.0)
    scheduler.submit(admit("waits", prompt_len=33), 1.0)
    text = ClusterMetrics("m").text(scheduler.status(1.0))
    assert value(text, "tandem_queue_requests") == 1
    assert value(text, "tandem_queue_tokens") >= 33
    assert value(text, "vllm:num_requests_waiting", engine="scheduler") == 1


def test_of_a_dead_worker_what_it_did_stays_and_what_it_had_goes(scheduler: Scheduler) -> None:
    beat(scheduler, "decode", 1.0, num_running=5, num_used_blocks=20, generation_tokens=77)
    scheduler.worker_lost("decode-life", 2.0)
    text = ClusterMetrics("m").text(scheduler.status(3.0))
    assert value(text, "tandem_worker_up", engine="decode:0") == 0
    assert value(text, "tandem_worker_up", engine="prefill:0") == 1
    assert value(text, "tandem_worker_generation_tokens_total", engine="decode:0") == 77
    assert value(text, "tandem_scheduler_events_total", event="workers_lost") == 1
    for gauge in [series.name for series in WORKER_SERIES if series.kind == "gauge"] + ["vllm:kv_cache_usage_perc"]:
        assert {s.labels["engine"] for s in families(text)[gauge].samples} == {"prefill:0"}, gauge


def test_every_rejection_and_event_of_a_scheduler_has_a_name_here(scheduler: Scheduler) -> None:
    """A counter added to the scheduler and forgotten here would be invisible to whoever watches."""
    from pathlib import Path

    import scheduler.status as module

    documented = Path(module.__file__).read_text(encoding="utf-8")
    listed = documented.split("rejections         reason -> count:")[1].split("tokens  ")[0].split()
    assert set(listed) == set(REJECTIONS)
    assert all(event in documented for event in EVENTS)


# ---- the text --------------------------------------------------------------------------------------------------------


def test_nothing_a_client_sends_becomes_a_label(scheduler: Scheduler) -> None:
    metrics = ClusterMetrics("m")
    for outcome in (changed(tenant=HOSTILE, slo_class=HOSTILE, request_id=HOSTILE), changed(kind="failed", failure_kind=HOSTILE)):
        metrics.observe(outcome)
        scheduler.outcome(outcome, 1.0)
    scheduler.submit(admit(HOSTILE), 1.0)
    text = metrics.text(msgspec.json.decode(msgspec.json.encode(scheduler.status(1.0))))
    assert "evil" not in text
    allowed = {
        "model_name",
        "engine",
        "role",
        "reason",
        "finished_reason",
        "event",
        "phase",
        "of",
        "le",
        "block_size",
        "num_gpu_blocks",
        "rank",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "pid",
        "tenant",
        "class",
        "outcome",
        "kind",
        "state",
        "band",
        "bucket",
        "result",
        "version",
        "served_model",
        "device",
        "parallel",
    }
    assert {label for family in families(text).values() for s in family.samples for label in s.labels} <= allowed


def test_a_group_is_one_worker_with_a_row_for_each_process(scheduler: Scheduler) -> None:
    group = msgspec.structs.replace(worker("decode", "decode:7"), parallel=Parallel(2, 2), rank_pids=(11, 12, 13, 14))
    scheduler.register(group, 0.0)
    text = ClusterMetrics("m").text(scheduler.status(1.0))
    rows = [s.labels for s in families(text)["tandem_worker_rank_info"].samples]
    found = [
        (r["rank"], r["pid"], r["tensor_parallel_size"], r["pipeline_parallel_size"]) for r in rows if r["engine"] == "decode:7"
    ]
    assert found == [("0", "11", "2", "2"), ("1", "12", "2", "2"), ("2", "13", "2", "2"), ("3", "14", "2", "2")]
    assert [(r["pid"], r["tensor_parallel_size"]) for r in rows if r["engine"] == "prefill:0"] == [("1", "1")]
    assert value(text, "tandem_worker_up", engine="decode:7") == 1


def test_names_are_well_formed(scheduler: Scheduler) -> None:
    text = ClusterMetrics("m").text(scheduler.status(1.0))
    found: Iterable[Metric] = families(text).values()
    for family in found:
        assert family.name.startswith(("vllm:", "tandem_")), family.name
        assert family.documentation, family.name
        if family.type == "counter":
            assert {s.name for s in family.samples} <= {f"{family.name}_total", f"{family.name}_created"}
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types)), "a family is told once"
    seen = [(s.name, tuple(sorted(s.labels.items()))) for family in families(text).values() for s in family.samples]
    assert len(seen) == len(set(seen)), "a series is told once"


def test_a_model_name_with_quotes_is_escaped() -> None:
    text = ClusterMetrics('a"b\\c\nd').text({})
    assert value(text, "vllm:prompt_tokens_total", model_name='a"b\\c\nd') == 0
