"""Every series of /metrics: its name, what it means, its labels, its buckets, and where its number comes from. One table.

vLLM's names and boundaries where the meaning is vLLM's, so that its Grafana dashboards, the Kubernetes inference gateway and
aiperf work unchanged; `tandem_` for the rest. Read by `metrics.py`, which makes text of it, and by the tests of
configs/observability, which hold queries against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from protocol.messages import Outcome
from protocol.timeline import GAP_BUCKETS, Trace
from scheduler.sla import tpot_of


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split())


# vLLM's boundaries (its dashboards expect them), with finer ones below for models that are quicker than it thought.
TTFT_BUCKETS = _numbers("0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560")
TPOT_BUCKETS = GAP_BUCKETS
REQUEST_BUCKETS = _numbers("0.005 0.01 0.025 0.05 0.1 0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
TOKEN_BUCKETS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
CHOICE_BUCKETS = _numbers("1 2 5 10 20")
TRANSFER_BUCKETS = _numbers("0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30")
RATIO_BUCKETS = _numbers("0.1 0.25 0.5 0.7 0.8 0.9 1 1.1 1.25 1.5 2 4 10")

FINISH_REASONS = ("stop", "length", "abort", "error")
OUTCOMES = ("finished", "failed", "cancelled")
REJECTIONS = (
    "queue_requests",
    "queue_tokens",
    "queue_bytes",
    "tenant_share",
    "would_time_out",
    "queue_timeout",
    "no_worker",
    "too_long",
    "tenant_requests",
    "tenant_tokens",
    "slo_ttft",
    "slo_tpot",
    "retry_budget",
    "shed",
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


class Distribution(NamedTuple):
    """A histogram over finished requests. value: None where a request has no such number. by_tenant: labels tenant, class."""

    name: str
    text: str
    buckets: tuple[float, ...]
    value: Callable[[Outcome, Trace], float | None]
    by_tenant: bool = False


GAPS = "vllm:inter_token_latency_seconds"  # the one histogram that a request fills with more than one number
DISTRIBUTIONS = (
    Distribution("vllm:time_to_first_token_seconds", "Received to first token.", TTFT_BUCKETS, lambda o, _: o.ttft_s),
    Distribution(
        "vllm:request_time_per_output_token_seconds",
        "Mean time per token after the first, per request.",
        TPOT_BUCKETS,
        lambda o, _: tpot_of(o),
    ),
    Distribution(GAPS, "Time between two tokens of one choice.", GAP_BUCKETS, lambda o, _: None),
    Distribution("vllm:e2e_request_latency_seconds", "Received to the end.", REQUEST_BUCKETS, lambda o, _: o.e2e_s),
    Distribution("vllm:request_queue_time_seconds", "Received to first placed.", REQUEST_BUCKETS, lambda o, _: o.queue_s),
    Distribution(
        "vllm:request_inference_time_seconds", "First placed to the end.", REQUEST_BUCKETS, lambda o, _: o.e2e_s - o.queue_s
    ),
    Distribution(
        "vllm:request_prefill_time_seconds", "First placed to first token.", REQUEST_BUCKETS, lambda o, _: o.ttft_s - o.queue_s
    ),
    Distribution(
        "vllm:request_decode_time_seconds",
        "First token to the end, the KV transfer included.",
        REQUEST_BUCKETS,
        lambda o, _: o.e2e_s - o.ttft_s,
    ),
    Distribution("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS, lambda o, _: o.prompt_tokens),
    Distribution("vllm:request_generation_tokens", "Output tokens of a request.", TOKEN_BUCKETS, lambda o, _: o.output_tokens),
    Distribution(
        "vllm:request_prefill_kv_computed_tokens",
        "Prompt tokens that no cache held.",
        TOKEN_BUCKETS,
        lambda o, _: o.prompt_tokens - o.cached_tokens,
    ),
    Distribution(
        "vllm:request_max_num_generation_tokens",
        "Output tokens of a request's longest choice.",
        TOKEN_BUCKETS,
        lambda o, t: t.max_output or None,
    ),
    Distribution("vllm:request_params_max_tokens", "max_tokens.", TOKEN_BUCKETS, lambda o, t: t.max_tokens or None),
    Distribution("vllm:request_params_n", "Choices asked for.", CHOICE_BUCKETS, lambda o, t: t.num_choices),
    Distribution(
        "tandem_time_to_first_token_seconds", "Received to first token.", TTFT_BUCKETS, lambda o, _: o.ttft_s, by_tenant=True
    ),
    Distribution(
        "tandem_time_per_output_token_seconds",
        "Mean time per token after the first, per request.",
        TPOT_BUCKETS,
        lambda o, _: tpot_of(o),
        by_tenant=True,
    ),
    Distribution(
        "tandem_kv_transfer_duration_seconds",
        "First token until decode had verified the KV: what a transfer adds to a request.",
        TRANSFER_BUCKETS,
        lambda o, t: t.transfer_s if t.prefill_worker != t.decode_worker and t.transfer_s > 0 else None,
    ),
    Distribution(
        "tandem_ttft_prediction_ratio",
        "Time from placement to first token, by what the scheduler predicted for it; 1 is right.",
        RATIO_BUCKETS,
        lambda o, t: t.placed_ttft_s / t.predicted_ttft_s if t.predicted_ttft_s > 0 and t.placed_ttft_s > 0 else None,
    ),
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
    Series("vllm:spec_decode_num_drafts", "Drafts of speculation that were verified.", "num_drafts", "counter", "decode"),
    Series("vllm:spec_decode_num_draft_tokens", "Tokens of those drafts.", "draft_tokens", "counter", "decode"),
    Series("vllm:spec_decode_num_accepted_tokens", "Those that were right.", "accepted_tokens", "counter", "decode"),
    Series(
        "tandem_worker_decode_slots", "Decoding sequences of each step, summed over steps.", "decode_slots", "counter", "decode"
    ),
    Series(
        "tandem_worker_unused_kv_slots",
        "Room for tokens in the KV blocks of a decode worker's running sequences that holds none.",
        "num_unused_slots",
        "gauge",
    ),
    Series(
        "tandem_swapped_out_blocks", "KV blocks of preempted sequences copied to host memory.", "swapped_out", "counter", "decode"
    ),
    Series("tandem_swapped_in_blocks", "Those that came back.", "swapped_in", "counter", "decode"),
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
    Series(
        "tandem_kv_leases_expired", "Grants whose lease ran out before their KV was sealed.", "leases_expired", "counter", "decode"
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

# Per pair of workers and transport. key: of protocol.messages.PairStats; both ends count, the one of `role` is asked.
PAIR_SERIES = (
    Series("tandem_kv_link_transfers", "KV transfers between two workers over one transport.", "transfers", "counter", "prefill"),
    Series("tandem_kv_link_failures", "Those that failed.", "failed", "counter", "prefill"),
    Series("tandem_kv_link_bytes", "Bytes of KV that they carried.", "nbytes", "counter", "prefill"),
    Series("tandem_kv_link_seconds", "Seconds that they took, from the last push to the seal.", "seconds", "counter", "prefill"),
    Series("tandem_kv_link_digest_failures", "Those whose bytes had changed.", "digest_failures", "counter", "prefill"),
    Series("tandem_kv_link_stale", "Papers and frames of grants that were over.", "stale", "counter", "decode"),
)

# Of a worker's GPU, where it has one and nvidia-ml-py is installed: key of WorkerStats.gpu -> name, meaning.
GPU_SERIES = {
    "utilization": ("tandem_gpu_utilization_ratio", "Share of time in which a kernel ran."),
    "memory_used_bytes": ("tandem_gpu_memory_used_bytes", "Memory in use, of all processes."),
    "memory_total_bytes": ("tandem_gpu_memory_total_bytes", "Memory there is."),
    "power_watts": ("tandem_gpu_power_watts", "Power draw."),
    "temperature_celsius": ("tandem_gpu_temperature_celsius", "Temperature."),
}
