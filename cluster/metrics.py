"""The whole cluster in Prometheus text: histograms from outcomes, gauges and counters from the scheduler's status.

Lives in the scheduler's process, because that is where every outcome and every heartbeat arrives; any gateway's /metrics asks
for it. The names are `metric_table.py`'s. Labels come from tables of ours, never from a client's string. Text format 0.0.4
only: the OpenMetrics writer of prometheus-client rewrites the colons of vLLM-compatible names.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from cluster.metric_table import (
    DISTRIBUTIONS,
    EVENTS,
    FINISH_REASONS,
    GAPS,
    GPU_SERIES,
    OUTCOMES,
    PAIR_SERIES,
    REJECTIONS,
    WORKER_SERIES,
    Distribution,
)
from cluster.tenant_metrics import tenant_series
from configs.tenants import Tenants
from protocol.messages import Outcome, PairStats
from protocol.timeline import Trace, count_gaps, worker_name
from scheduler.sla import MAX_TENANTS, OTHER, Names, Promise, is_kept, keeps_ttft

Labels = tuple[str, ...]
Rows = Iterable[tuple[Labels, float]]


class Counts:
    """One histogram with one set of labels."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def add_counts(self, counts: Sequence[int], total: float) -> None:
        """Many at once. counts: one per bucket and one for what is above; total: their sum."""
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._sum += total

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        seen, out = 0, []
        for bound, count in zip((*self._buckets, math.inf), self._counts, strict=True):
            seen += count
            out.append((floatToGoString(bound), float(seen)))
        return out, self._sum


class ClusterMetrics:
    """Feed it every Outcome and every refusal; ask it for `text` with the scheduler's status of now.

    promises: by class, for the series that tell promised from kept. tenants, classes: those that are there from the start, at 0;
    others are added as they come, up to a bound. `set_tenants` brings those of a tenants file, as far as the bound goes.
    """

    def __init__(self, model_name: str, promises: dict[str, Promise] | None = None, tenants: Sequence[str] = ("default",)) -> None:
        self.model_name = model_name
        self._promises = promises or {"standard": Promise(math.inf, math.inf)}
        self._tenants, self._classes = Names(tenants), Names(self._promises, 8)
        self._histograms: dict[tuple[str, Labels], Counts] = {}
        self._counters: Counter[tuple[str, Labels]] = Counter()
        self._status: dict[str, Any] = {}
        self._rows: Sequence[dict[str, Any]] = ()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._seed([(tenant, slo_class) for tenant in tenants for slo_class in self._promises])

    def set_tenants(self, tenants: Tenants) -> None:
        """The tenants file that is in force from now on."""
        self._promises = {name: Promise(one.ttft_s, one.tpot_s, one.attainment) for name, one in tenants.classes.items()}
        old = {key[:2] for (name, key) in self._counters if name == "tandem_slo_requests"}
        # What was counted stays a series: a counter that disappears looks like one that was reset.
        names = dict.fromkeys([*(tenant for tenant, _ in old), *list(tenants.tenants)[:MAX_TENANTS]])
        self._tenants = Names(names, max(MAX_TENANTS, len(names)))
        classes = dict.fromkeys([*tenants.classes, *(slo_class for _, slo_class in old)])
        self._classes = Names(classes, max(8, len(classes)))
        for tenant, one in tenants.tenants.items():
            if tenant in names:
                for slo_class in one.allowed_classes:
                    self._seed_key((tenant, slo_class))

    def _seed_key(self, key: tuple[str, str]) -> None:
        """One tenant and class, at 0 unless it is there."""
        for one in DISTRIBUTIONS:
            if one.by_tenant:
                self._histograms.setdefault((one.name, key), Counts(one.buckets))
        self._seed_tenant(key)

    def _seed(self, known: list[tuple[str, str]]) -> None:
        """rate() of a counter that appears with its first increment misses that increment: so all are there at 0."""
        for one in DISTRIBUTIONS:
            for labels in known if one.by_tenant else [()]:
                self._histograms[one.name, labels] = Counts(one.buckets)
        for name in ("vllm:prompt_tokens", "vllm:prompt_tokens_cached", "vllm:generation_tokens", "tandem_resumptions"):
            self._counters[name, ()] = 0
        for reason in FINISH_REASONS:
            self._counters["vllm:request_success", (reason,)] = 0
        for key in known:
            self._seed_tenant(key)

    def _seed_tenant(self, key: tuple[str, str]) -> None:
        for name in ("tandem_slo_requests", "tandem_slo_kept", "tandem_slo_ttft_kept", "tandem_degraded"):
            self._counters[name, key] += 0
        for name, words in (
            ("tandem_requests", OUTCOMES),
            ("tandem_tokens", ("input", "cached", "output")),
            ("tandem_refusals", REJECTIONS),
        ):
            for word in words:
                self._counters[name, (*key, word)] += 0

    def observe(self, outcome: Outcome) -> None:
        """Count one ended request. Histograms are of finished ones only: an aborted request has no latency to promise."""
        if outcome.was_refused:
            return  # never admitted: the scheduler counts it among its rejections
        trace = outcome.trace or Trace()
        count = self._counters
        key = self._key(outcome.tenant, outcome.slo_class)
        kind = outcome.kind if outcome.kind in OUTCOMES else "failed"
        count["vllm:request_success", (_finished_reason(outcome),)] += 1
        count["tandem_requests", (*key, kind)] += 1
        count["tandem_resumptions", ()] += max(0, trace.num_resumptions)
        if outcome.output_tokens > 0:
            for name, word, number in (
                ("vllm:prompt_tokens", "input", outcome.prompt_tokens),
                ("vllm:prompt_tokens_cached", "cached", outcome.cached_tokens),
                ("vllm:generation_tokens", "output", outcome.output_tokens),
            ):
                count[name, ()] += number
                count["tandem_tokens", (*key, word)] += number
        if kind != "cancelled":
            promise = self._promises.get(key[1]) or next(iter(self._promises.values()))
            count["tandem_slo_requests", key] += 1
            count["tandem_slo_kept", key] += is_kept(outcome, promise)
            count["tandem_slo_ttft_kept", key] += keeps_ttft(outcome, promise)
        if outcome.degraded:
            count["tandem_degraded", self._key(outcome.tenant, outcome.asked_class or outcome.slo_class)] += 1
        if kind == "finished":
            for one in DISTRIBUTIONS:
                value = one.value(outcome, trace)
                if value is not None and math.isfinite(value):
                    self._of(one, key).add(max(0.0, value))
            self._histograms[GAPS, ()].add_counts(count_gaps(trace.gaps), max(0.0, trace.gap_s))

    def refused(self, tenant: str, slo_class: str, reason: str) -> None:
        """Never admitted. reason: of REJECTIONS."""
        self._counters["tandem_refusals", (*self._key(tenant, slo_class), reason if reason in REJECTIONS else OTHER)] += 1

    def text(self, status: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> str:
        """Prometheus text 0.0.4. status: `scheduler.status.status_of`, or {} when there is none; rows: `Sla.rows`."""
        self._status, self._rows = status, rows
        return generate_latest(self._registry).decode()

    def _key(self, tenant: str, slo_class: str) -> tuple[str, str]:
        key = self._tenants.of(tenant), self._classes.of(slo_class)
        if ("tandem_slo_requests", key) not in self._counters:
            self._seed_tenant(key)
        return key

    def _of(self, one: Distribution, key: tuple[str, str]) -> Counts:
        labels: Labels = key if one.by_tenant else ()
        found = self._histograms.get((one.name, labels))
        if found is None:
            found = self._histograms[one.name, labels] = Counts(one.buckets)
        return found

    # ---- what prometheus-client asks for -----------------------------------------------------------------------------

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._distributions()
        yield from self._counted()
        yield from self._promised()
        workers = list(self._status.get("workers", ()))
        alive = [worker for worker in workers if worker["alive"]]
        for series in WORKER_SERIES:
            # What a dead worker did stays counted; what it had, it has no more.
            of = workers if series.kind == "counter" else alive
            rows = [(_who(w), w["stats"].get(series.key, 0)) for w in of if series.role in ("", w["role"])]
            yield self._family(series.kind, series.name, series.text, ("engine", "role"), rows)
        yield from self._pools(workers, alive)
        yield from self._scheduler(alive)
        yield from tenant_series(self._status, self._family, self._tenants.of)

    def _distributions(self) -> Iterator[Metric]:
        for one in DISTRIBUTIONS:
            labels = ("tenant", "class") if one.by_tenant else ()
            family = HistogramMetricFamily(one.name, one.text, labels=("model_name", *labels))
            for (name, values), counts in self._histograms.items():
                if name == one.name:
                    family.add_metric((self.model_name, *values), *counts.cumulative())
            yield family

    def _counted(self) -> Iterator[Metric]:
        of_tenant = ("tenant", "class")
        for name, text, labels in (
            ("vllm:prompt_tokens", "Prompt tokens of requests that ended after their first token.", ()),
            ("vllm:prompt_tokens_cached", "Those of them that a prefix cache held.", ()),
            ("vllm:generation_tokens", "Output tokens of requests that ended.", ()),
            (
                "vllm:request_success",
                "Requests that ended after they were admitted; for the others see vllm:admission_rejections.",
                ("finished_reason",),
            ),
            ("tandem_resumptions", "How often another worker took over a request that had delivered tokens.", ()),
            ("tandem_requests", "Requests that ended after they were admitted.", (*of_tenant, "outcome")),
            ("tandem_refusals", "Requests that were not admitted, by reason.", (*of_tenant, "reason")),
            ("tandem_tokens", "Tokens of requests that ended after their first one; cached are among input.", (*of_tenant, "kind")),
            ("tandem_slo_requests", "Requests that count for the promise: finished or failed.", of_tenant),
            ("tandem_slo_kept", "Those of them that kept it.", of_tenant),
            ("tandem_slo_ttft_kept", "Those of them whose first token came in time, whatever became of the others.", of_tenant),
            ("tandem_degraded", "Requests of this class that were served with less than they asked for.", of_tenant),
        ):
            rows = [(values, number) for (of, values), number in self._counters.items() if of == name]
            yield self._family("counter", name, text, labels, rows)

    def _promised(self) -> Iterator[Metric]:
        """Gauges over the report's window, for those who do not want to compute them from the counters."""
        keys = [((row["tenant"], row["class"]), row) for row in self._rows]
        for name, text, field in (
            ("tandem_slo_attainment_ratio", "Share of requests that kept the promise in the last 5 minutes.", "attainment"),
            ("tandem_slo_error_budget_left_ratio", "Share of the error budget of those minutes that is left.", "budget_left"),
            ("tandem_slo_goodput_per_second", "Requests a second that kept the promise.", "goodput_per_s"),
        ):
            yield self._family(
                "gauge", name, text, ("tenant", "class"), [(key, row[field]) for key, row in keys if row[field] is not None]
            )
        targets = [((name,), promise.attainment) for name, promise in self._promises.items()]
        yield self._family(
            "gauge", "tandem_slo_target_ratio", "Share of requests that is to keep the promise.", ("class",), targets
        )

    def _pools(self, workers: list[dict[str, Any]], alive: list[dict[str, Any]]) -> Iterator[Metric]:
        labels = ("engine", "role")
        up = [(_who(w), float(w["alive"])) for w in workers]
        yield self._family("gauge", "tandem_worker_up", "1 while heartbeats arrive.", labels, up)
        states = Counter((w["role"], w["state"]) for w in workers)
        rows = [((r, s), states[r, s]) for r in ("prefill", "decode") for s in ("ready", "loading", "draining", "lost")]
        yield self._family("gauge", "tandem_workers", "Workers by role and state.", ("role", "state"), rows)
        usage = [(_who(w), w["stats"]["num_used_blocks"] / max(1, w["num_blocks"])) for w in alive]
        yield self._family("gauge", "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels, usage)
        info = [((*_who(w), str(w["block_size"]), str(w["num_blocks"])), 1.0) for w in alive]
        yield self._family("gauge", "vllm:cache_config_info", "KV pool.", (*labels, "block_size", "num_gpu_blocks"), info)
        ranks = [
            ((*_who(w), str(rank), str(w["tp"]), str(w["pp"]), str(pid)), 1.0)
            for w in alive
            for rank, pid in enumerate(w["rank_pids"])
        ]
        sizes = ("rank", "tensor_parallel_size", "pipeline_parallel_size", "pid")
        yield self._family("gauge", "tandem_worker_rank_info", "One row per process of a worker.", (*labels, *sizes), ranks)
        ages = [(_who(w), w["stats"]["last_token_age_s"]) for w in alive if w["stats"]["last_token_age_s"] >= 0]
        yield self._family("gauge", "tandem_worker_last_token_age_seconds", "Since it last produced a token.", labels, ages)
        for key, (name, text) in GPU_SERIES.items():
            found = [(_who(w), w["stats"]["gpu"][key]) for w in alive if key in w["stats"].get("gpu", {})]
            yield self._family("gauge", name, text, labels, found)
        yield from self._pairs(alive)

    def _pairs(self, alive: list[dict[str, Any]]) -> Iterator[Metric]:
        """KV between two workers over one transport. A worker that came back is its peer's peer still: its lives are one series."""
        found = [(w["role"], w["name"], pair) for w in alive for pair in map(_pair, w["stats"]["pairs"])]
        for series in PAIR_SERIES:
            sums: Counter[Labels] = Counter()
            for role, name, pair in found:
                if role == series.role:
                    sums[name, worker_name(pair.peer), pair.transport] += getattr(pair, series.key)
            yield self._family(series.kind, series.name, series.text, ("engine", "peer", "transport"), sums.items())
        # Every transport of a pair tells the same number.
        fallbacks = {(name, pair.peer): pair.fallbacks for role, name, pair in found if role == "prefill"}
        left: Counter[Labels] = Counter()
        for (name, peer), number in fallbacks.items():
            left[name, worker_name(peer)] += number
        text = "How often a pair left a transport that did not work for it."
        yield self._family("counter", "tandem_kv_link_fallbacks", text, ("engine", "peer"), left.items())

    def _scheduler(self, alive: list[dict[str, Any]]) -> Iterator[Metric]:
        status = self._status
        queue, flight, promise = status.get("queue", {}), status.get("in_flight", {}), status.get("promise", {})
        queued = queue.get("requests", 0)
        waiting = [(_who(w), w["stats"]["num_waiting"]) for w in alive]
        yield self._family(
            "gauge",
            "vllm:num_requests_waiting",
            'Requests that wait: on a worker, or (engine="scheduler") to be placed.',
            ("engine", "role"),
            [*waiting, (("scheduler", "scheduler"), queued)],
        )
        by_role = Counter[str]()
        for (_, role), number in waiting:
            by_role[role] += number
        reasons = [(("capacity",), queued + by_role["prefill"]), (("deferred",), by_role["decode"])]
        text = "The same by reason: for a turn (capacity), or for KV that is under way or a block (deferred)."
        yield self._family("gauge", "vllm:num_requests_waiting_by_reason", text, ("reason",), reasons)
        yield self._family("gauge", "tandem_queue_requests", "Requests in the admission queue.", (), [((), queued)])
        yield self._family("gauge", "tandem_queue_tokens", "Tokens in the admission queue.", (), [((), queue.get("tokens", 0))])
        yield self._family(
            "gauge",
            "tandem_requests_in_flight",
            "Placed requests, before and after their first token.",
            ("phase",),
            [((phase,), flight.get(phase, 0)) for phase in ("prefilling", "decoding")],
        )
        yield self._family(
            "gauge",
            "tandem_promise_seconds",
            "What the cluster is told to keep, to be compared with the histograms.",
            ("of",),
            [((of,), promise[f"{of}_s"]) for of in ("ttft", "tpot") if f"{of}_s" in promise],
        )
        rejections, counters = status.get("rejections", {}), status.get("counters", {})
        yield self._family(
            "counter",
            "vllm:admission_rejections",
            "Requests refused at admission, or not placed in time.",
            ("reason",),
            [((reason,), rejections.get(reason, 0)) for reason in REJECTIONS],
        )
        yield self._family(
            "counter",
            "tandem_scheduler_events",
            "What the scheduler did and saw.",
            ("event",),
            [((event,), counters.get(event, 0)) for event in EVENTS],
        )

    def _family(self, kind: str, name: str, text: str, labels: Labels, rows: Rows) -> Metric:
        make = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
        family: GaugeMetricFamily | CounterMetricFamily = make(name, text, labels=("model_name", *labels))
        for values, number in rows:
            family.add_metric((self.model_name, *values), number)
        return family


def _finished_reason(outcome: Outcome) -> str:
    if outcome.kind == "cancelled":
        return "abort"
    if outcome.kind != "finished":
        return "error"
    return outcome.finish_reason if outcome.finish_reason in FINISH_REASONS else "stop"


def _who(worker: dict[str, Any]) -> tuple[str, str]:
    return worker["name"], worker["role"]


def _pair(pair: Any) -> PairStats:
    """As it is, or of what JSON makes of one."""
    return pair if isinstance(pair, PairStats) else msgspec.convert(pair, PairStats)
