"""The whole cluster in Prometheus text: histograms from outcomes, gauges and counters from the scheduler's status.

Lives in the scheduler's process, because that is where every outcome and every heartbeat arrives; any gateway's /metrics asks
for it. One table of names. Labels come from tables of ours, never from a client's string. Text format 0.0.4 only: the
OpenMetrics writer of prometheus-client rewrites the colons of vLLM-compatible names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from protocol.messages import Outcome

TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TPOT_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
E2E_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

# (name, help, key of a worker's stats, kind); summed over nothing: one series per worker
WORKER_SERIES = (
    ("vllm:num_requests_running", "Sequences in the running batch.", "num_running", "gauge"),
    ("vllm:num_requests_waiting", "Requests that wait on a worker.", "num_waiting", "gauge"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries", "counter"),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits", "counter"),
    ("vllm:num_preemptions", "Sequences that gave up their blocks.", "num_preemptions", "counter"),
    ("tandem_worker_free_blocks", "KV blocks that can be allocated.", "num_free_blocks", "gauge"),
    ("tandem_worker_used_blocks", "KV blocks held by sequences, grants or quarantine.", "num_used_blocks", "gauge"),
    (
        "tandem_worker_quarantined_blocks",
        "KV blocks that wait for their writer's word.",
        "num_quarantined_blocks",
        "gauge",
    ),
    ("tandem_worker_steps", "Engine steps.", "num_steps", "counter"),
    ("tandem_worker_step_seconds", "Seconds spent in engine steps.", "step_s", "counter"),
    ("tandem_worker_generation_tokens", "Tokens sampled.", "generation_tokens", "counter"),
    ("tandem_kv_transfers", "KV transfers that were verified or handed over.", "transfers", "counter"),
    ("tandem_kv_transfer_bytes", "Bytes of KV moved.", "transfer_bytes", "counter"),
    ("tandem_kv_transfers_failed", "KV transfers that failed.", "transfers_failed", "counter"),
    (
        "tandem_kv_digest_failures",
        "KV transfers whose bytes differed from their digests.",
        "digest_failures",
        "counter",
    ),
    ("tandem_worker_resident_bytes", "Resident memory.", "rss_bytes", "gauge"),
)


class ClusterMetrics:
    """Feed it every Outcome; ask it for `text` with the scheduler's status of now."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self._registry = CollectorRegistry(auto_describe=False)
        self._status: dict[str, Any] = {}

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, text, ("model_name",), registry=self._registry, buckets=tuple(buckets)).labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=self._registry)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Time to first token.", TTFT_BUCKETS)
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean time per output token.", TPOT_BUCKETS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Whole request.", E2E_BUCKETS)
        self._queue = histogram("vllm:request_queue_time_seconds", "Received to placed.", E2E_BUCKETS)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of ended requests.")
        self._cached = counter("vllm:prompt_tokens_cached", "Prompt tokens that a prefix cache held.")
        self._generation = counter("vllm:generation_tokens", "Output tokens of ended requests.")
        self._success = counter("vllm:request_success", "Requests that ended.", "finished_reason")
        self._registry.register(_StatusCollector(self))

    def observe(self, outcome: Outcome) -> None:
        reason = {"finished": "stop", "cancelled": "abort"}.get(outcome.kind, "error")
        self._success.labels(self.model_name, reason).inc()
        self._prompt.labels(self.model_name).inc(outcome.prompt_tokens)
        self._cached.labels(self.model_name).inc(outcome.cached_tokens)
        self._generation.labels(self.model_name).inc(outcome.output_tokens)
        if outcome.kind != "finished":
            return
        self._ttft.observe(outcome.ttft_s)
        self._queue.observe(outcome.queue_s)
        self._e2e.observe(outcome.e2e_s)
        if outcome.output_tokens > 1:
            self._tpot.observe(outcome.tpot_s)

    def text(self, status: dict[str, Any]) -> str:
        self._status = status
        return generate_latest(self._registry).decode()


class _StatusCollector:
    """Turns the scheduler's status into series at scrape time."""

    def __init__(self, metrics: ClusterMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        status, model = self._metrics._status, self._metrics.model_name
        workers = [w for w in status.get("workers", ()) if w.get("stats")]
        for name, text, key, kind in WORKER_SERIES:
            family = (GaugeMetricFamily if kind == "gauge" else CounterMetricFamily)(
                name, text, labels=("model_name", "engine", "role")
            )
            for worker in workers:
                family.add_metric((model, worker["name"], worker["role"]), worker["stats"][key])
            yield family
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use.", labels=("model_name", "engine", "role"))
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "KV pool.", labels=("model_name", "engine", "block_size", "num_gpu_blocks")
        )
        up = GaugeMetricFamily("tandem_worker_up", "1 while heartbeats arrive.", labels=("model_name", "engine", "role"))
        for worker in status.get("workers", ()):
            up.add_metric((model, worker["name"], worker["role"]), float(bool(worker.get("alive"))))
            if worker.get("stats"):
                share = worker["stats"]["num_used_blocks"] / max(1, worker["num_blocks"])
                usage.add_metric((model, worker["name"], worker["role"]), share)
            info.add_metric((model, worker["name"], str(worker.get("block_size", 0)), str(worker["num_blocks"])), 1.0)
        yield from (usage, info, up)
        queue = status.get("queue", {})
        waiting = GaugeMetricFamily("tandem_queue_requests", "Requests in the admission queue.", labels=("model_name",))
        waiting.add_metric((model,), queue.get("requests", 0))
        tokens = GaugeMetricFamily("tandem_queue_tokens", "Tokens in the admission queue.", labels=("model_name",))
        tokens.add_metric((model,), queue.get("tokens", 0))
        rejected = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused at admission.", labels=("model_name", "reason")
        )
        for reason, count in status.get("rejections", {}).items():
            rejected.add_metric((model, reason), count)
        yield from (waiting, tokens, rejected)
