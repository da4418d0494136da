"""The whole cluster in Prometheus text: histograms from outcomes, gauges and counters from the scheduler's status.

Lives in the scheduler's process, because that is where every outcome and every heartbeat arrives; any gateway's /metrics asks
for it. One table of names: vLLM's where the meaning is vLLM's, `tandem_` for the rest. Labels come from tables of ours, never
from a client's string. Text format 0.0.4 only: the OpenMetrics writer of prometheus-client rewrites the colons of
vLLM-compatible names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from protocol.messages import Outcome


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split())


# vLLM's boundaries (its dashboards expect them), with finer ones below for models that are quicker than it thought.
TTFT_BUCKETS = _numbers("0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560")
TPOT_BUCKETS = _numbers("0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
REQUEST_BUCKETS = _numbers("0.005 0.01 0.025 0.05 0.1 0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
TOKEN_BUCKETS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))

FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = (
    "queue_requests",
    "queue_tokens",
    "queue_bytes",
    "tenant_share",
    "would_time_out",
    "queue_timeout",
    "no_worker",
    "too_long",
)
EVENTS = (
    "submitted",
    "resumed",
    "placed_disaggregated",
    "placed_local",
    "reservations_refused",
    "withdrawn",
    "abandoned",
    "adopted",
    "workers_lost",
    "gateways_lost",
)


class Series(NamedTuple):
    """One series per worker. key: of the worker's stats. role: only workers of it measure this; empty: both do."""

    name: str
    text: str
    key: str
    kind: str  # "gauge" | "counter"
    role: str = ""


WORKER_SERIES = (
    Series("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries", "counter"),
    Series("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits", "counter"),
    Series("vllm:num_preemptions", "Sequences that gave up their blocks.", "num_preemptions", "counter"),
    Series("vllm:num_requests_running", "Sequences in the running batch.", "num_running", "gauge"),
    Series("tandem_worker_free_blocks", "KV blocks that can be allocated.", "num_free_blocks", "gauge"),
    Series("tandem_worker_used_blocks", "KV blocks held by sequences, grants or quarantine.", "num_used_blocks", "gauge"),
    Series("tandem_worker_cached_blocks", "Free KV blocks that keep a prefix.", "num_cached_blocks", "gauge"),
    Series("tandem_worker_quarantined_blocks", "KV blocks that wait for their writer's word.", "num_quarantined_blocks", "gauge"),
    Series("tandem_worker_resident_bytes", "Resident memory.", "rss_bytes", "gauge"),
    Series("tandem_worker_steps", "Engine steps.", "num_steps", "counter"),
    Series("tandem_worker_step_seconds", "Seconds spent in engine steps.", "step_s", "counter"),
    Series("tandem_worker_prompt_tokens", "Prompt tokens computed.", "prompt_tokens", "counter"),
    Series("tandem_worker_generation_tokens", "Tokens sampled.", "generation_tokens", "counter"),
    Series("tandem_kv_transfers", "KV transfers: by prefill handed over, by decode verified.", "transfers", "counter"),
    Series("tandem_kv_transfer_bytes", "Bytes of KV in those transfers.", "transfer_bytes", "counter"),
    Series(
        "tandem_kv_transfer_seconds",
        "Seconds from the end of a prefill until decode had verified its KV: what a transfer adds to it.",
        "transfer_s",
        "counter",
        "prefill",
    ),
    Series(
        "tandem_kv_transfers_failed",
        "KV transfers that failed, as this worker saw it; both ends may count the same one.",
        "transfers_failed",
        "counter",
    ),
    Series(
        "tandem_kv_digest_failures",
        "KV transfers whose bytes differed from their digests; none of them was read.",
        "digest_failures",
        "counter",
        "decode",
    ),
    Series("tandem_host_tier_bytes", "Evicted prefix KV that is kept in host memory.", "host_tier_bytes", "gauge"),
    Series("tandem_host_tier_stored_blocks", "KV blocks copied to host memory when evicted.", "host_tier_stored", "counter"),
    Series("tandem_host_tier_restored_blocks", "KV blocks that came back from host memory.", "host_tier_restored", "counter"),
    Series("tandem_host_tier_evicted_blocks", "KV blocks that host memory had no more room for.", "host_tier_evicted", "counter"),
    Series(
        "tandem_host_tier_digest_failures",
        "KV blocks that came back from host memory changed; none of them was read.",
        "host_tier_digest_failures",
        "counter",
    ),
)


class ClusterMetrics:
    """Feed it every Outcome; ask it for `text` with the scheduler's status of now."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self._registry = CollectorRegistry(auto_describe=False)
        self._collector = _StatusCollector(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("model_name",), registry=self._registry, buckets=buckets).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ("model_name",), registry=self._registry).labels(model_name)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Received to first token.", TTFT_BUCKETS)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first, per request.", TPOT_BUCKETS
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Received to the end.", REQUEST_BUCKETS)
        self._queue = histogram("vllm:request_queue_time_seconds", "Received to first placed.", REQUEST_BUCKETS)
        self._inference = histogram("vllm:request_inference_time_seconds", "First placed to the end.", REQUEST_BUCKETS)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "First placed to first token.", REQUEST_BUCKETS)
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "First token to the end, the KV transfer included.", REQUEST_BUCKETS
        )
        self._prompt_len = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self._output_len = histogram("vllm:request_generation_tokens", "Output tokens of a request.", TOKEN_BUCKETS)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of requests that ended after their first token.")
        self._cached = counter("vllm:prompt_tokens_cached", "Those of them that a prefix cache held.")
        self._generation = counter("vllm:generation_tokens", "Output tokens of requests that ended.")
        ended = Counter(
            "vllm:request_success",
            "Requests that ended after they were admitted; for the others see vllm:admission_rejections.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._ended = {reason: ended.labels(model_name, reason) for reason in FINISH_REASONS}  # all there from the start, at 0
        self._registry.register(self._collector)

    def observe(self, outcome: Outcome) -> None:
        """Count one ended request. Histograms are of finished ones only: an aborted request has no latency to promise."""
        if outcome.was_refused:
            return  # never admitted: the scheduler counts it among its rejections
        self._ended[_finished_reason(outcome)].inc()
        if outcome.output_tokens > 0:
            self._prompt.inc(outcome.prompt_tokens)
            self._cached.inc(outcome.cached_tokens)
            self._generation.inc(outcome.output_tokens)
        if outcome.kind != "finished":
            return
        self._ttft.observe(outcome.ttft_s)
        self._e2e.observe(outcome.e2e_s)
        self._queue.observe(outcome.queue_s)
        self._inference.observe(max(0.0, outcome.e2e_s - outcome.queue_s))
        self._prefill.observe(max(0.0, outcome.ttft_s - outcome.queue_s))
        self._decode.observe(max(0.0, outcome.e2e_s - outcome.ttft_s))
        self._prompt_len.observe(outcome.prompt_tokens)
        self._output_len.observe(outcome.output_tokens)
        if outcome.tpot_s > 0:
            self._tpot.observe(outcome.tpot_s)

    def text(self, status: dict[str, Any]) -> str:
        """Prometheus text 0.0.4. status: `scheduler.status.status_of`, or {} when there is none."""
        self._collector.status = status
        return generate_latest(self._registry).decode()


def _finished_reason(outcome: Outcome) -> str:
    if outcome.kind == "cancelled":
        return "abort"
    if outcome.kind != "finished":
        return "error"
    return outcome.finish_reason if outcome.finish_reason in FINISH_REASONS else "stop"


class _StatusCollector:
    """Turns the scheduler's status into series at scrape time."""

    def __init__(self, model_name: str) -> None:
        self.status: dict[str, Any] = {}
        self._model = model_name

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        workers = list(self.status.get("workers", ()))
        alive = [worker for worker in workers if worker["alive"]]
        for series in WORKER_SERIES:
            # What a dead worker did stays counted; what it had, it has no more.
            of = workers if series.kind == "counter" else alive
            rows = [(_who(w), w["stats"][series.key]) for w in of if series.role in ("", w["role"])]
            yield self._family(series.kind, series.name, series.text, ("engine", "role"), rows)
        yield from self._pools(workers, alive)
        yield from self._scheduler(alive)

    def _pools(self, workers: list[dict[str, Any]], alive: list[dict[str, Any]]) -> Iterator[Metric]:
        labels = ("engine", "role")
        up = [(_who(w), float(w["alive"])) for w in workers]
        yield self._family("gauge", "tandem_worker_up", "1 while heartbeats arrive.", labels, up)
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

    def _scheduler(self, alive: list[dict[str, Any]]) -> Iterator[Metric]:
        status = self.status
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

    def _family(
        self, kind: str, name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]
    ) -> Metric:
        make = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
        family: GaugeMetricFamily | CounterMetricFamily = make(name, text, labels=("model_name", *labels))
        for values, number in rows:
            family.add_metric((self._model, *values), number)
        return family


def _who(worker: dict[str, Any]) -> tuple[str, str]:
    return worker["name"], worker["role"]
