"""The scheduler's view as one JSON-able dict: what /dashboard, /metrics and `tandem status` show.

Read-only; called by `Scheduler.status`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from protocol.messages import WorkerStats
from scheduler.ledger import WorkerState

if TYPE_CHECKING:
    from scheduler.scheduler import Scheduler


def status_of(scheduler: Scheduler, now: float) -> dict[str, Any]:
    """All times are seconds; ages count back from now.

    ready              bool: a decode worker takes work
    workers            one per worker that is alive, and per name the last that died if none of that name is alive:
        name role incarnation address host device model
        tp pp          sizes of its group; rank_pids: the processes, in rank order; pid: the first of them
        alive          bool; state "ready" | "loading" | "draining" | "lost"
        beat_age_s     since its last heartbeat; up_s since it registered
        num_blocks block_size max_num_seqs price_per_hour is_spot is_overflow
        stats          protocol.messages.WorkerStats as a dict; zeros and an empty pool before the first heartbeat
        ledger         what is booked on it: prefilling, decoding (sequences), context_tokens, blocks_at_end,
                       prefill_queue_s (predicted)
    queue              requests tokens bytes max_requests max_tokens max_bytes, oldest_s (0.0 when empty), drain_s
    in_flight          total, prefilling, decoding (requests)
    latencies          class -> ttft_s tpot_s e2e_s queue_s (count mean p50 p95 p99; None without any), and kept: shares
                       of requests that kept ttft, tpot (of those with a second token), both; over the last window_s seconds
    window_s           of latencies
    promise            ttft_s tpot_s
    counters           cumulative: submitted resumed placed placed_disaggregated placed_local finished failed cancelled
                       withdrawn abandoned rejected reservations_refused adopted workers_lost gateways_lost;
                       a refused request counts as rejected alone, not as failed
    rejections         reason -> count: queue_requests queue_tokens queue_bytes tenant_share would_time_out
                       queue_timeout no_worker too_long tenant_requests tenant_tokens slo_ttft slo_tpot retry_budget shed
    tokens             of requests that ended after their first token: prompt cached output
    totals             role -> cumulative WorkerStats counters over all workers, the dead included
    gateways           [gateway_id, beat_age_s, in_flight]
    starting           start-ups under way or just over: [name role incarnation phase detail elapsed_s], oldest first
    cost_models        [model device role tp pp prefill decode transfer (coefficients, see scheduler.cost) observations
                       errors: of actual / predicted, by ttft (placed -> first token), prefill, decode_step, tpot: count, mape
                       (mean absolute relative error), p10, p50, p90; tpot_margin: by which a pace is overestimated]
    services           [band tenant service (tokens over weight, see scheduler.fairness) waits]
    admission          wait (errors of the forecast wait, as above), appointments, show_rate, prices (model -> share let in)
    prefix_index       hashes max_hashes
    """
    config, records, queue = scheduler.config, scheduler.records, scheduler.queue
    workers = list(scheduler.workers.values())
    entries = list(scheduler.ledger.entries.values())
    prefilling = sum(entry.first_token_at is None for entry in entries)
    oldest_at = queue.oldest_at
    from_latency = scheduler.latencies.status(now, config.ttft_target_s, config.tpot_target_s)
    return {
        "ready": any(w.takes_work and w.info.role == "decode" for w in workers),
        "workers": [_worker(w, now) for w in _listed(scheduler)],
        "queue": {
            "requests": len(queue),
            "tokens": queue.num_tokens,
            "bytes": queue.num_bytes,
            "max_requests": queue.max_requests,
            "max_tokens": queue.max_tokens,
            "max_bytes": queue.max_bytes,
            "oldest_s": now - oldest_at if oldest_at is not None else 0.0,
            "drain_s": max((scheduler.refusing.predicted_drain_s(model, now) for model in queue.orders), default=0.0),
        },
        "in_flight": {"total": len(entries), "prefilling": prefilling, "decoding": len(entries) - prefilling},
        "latencies": from_latency,
        "window_s": scheduler.latencies.window_s,
        "promise": {"ttft_s": config.ttft_target_s, "tpot_s": config.tpot_target_s},
        "counters": dict(records.counters),
        "rejections": dict(records.rejections),
        "tokens": {name: records.tokens[name] for name in ("prompt", "cached", "output")},
        "totals": records.totals(workers),
        "gateways": [
            {"gateway_id": g.gateway_id, "beat_age_s": now - g.last_beat_at, "in_flight": len(g.held)}
            for g in scheduler.gateways.values()
        ],
        "starting": [msgspec.structs.asdict(phase) for told in records.phases.values() for phase in told],
        "cost_models": _cost_models(scheduler),
        "services": scheduler.fairness.status(),
        "admission": scheduler.gate.status(now),
        "prefix_index": {"hashes": len(scheduler.index), "max_hashes": scheduler.index.max_hashes},
    }


def _cost_models(scheduler: Scheduler) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "device": device,
            "role": role,
            "tp": parallel.tp_size,
            "pp": parallel.pp_size,
            "prefill": list(cost.prefill.theta),
            "decode": list(cost.decode.theta),
            "transfer": list(cost.transfer.theta),
            "observations": {
                "prefill": cost.prefill.num_observations,
                "decode": cost.decode.num_observations,
                "transfer": cost.transfer.num_observations,
            },
            "errors": {
                "ttft": cost.ttft_error.status(),
                "prefill": cost.prefill_error.status(),
                "decode_step": cost.decode_error.status(),
                "tpot": cost.tpot_error.status(),
            },
            "tpot_margin": cost.tpot_margin.factor,
        }
        for (model, device, role, parallel), cost in scheduler.costs.models.items()
    ]


def _listed(scheduler: Scheduler) -> list[WorkerState]:
    """Everyone alive, and the last that died of each name that nobody alive bears; by role and name."""
    listed = list(scheduler.workers.values())
    names = {w.info.name for w in listed}
    for worker in reversed(scheduler.dead.values()):
        if worker.info.name not in names:
            names.add(worker.info.name)
            listed.append(worker)
    return sorted(listed, key=lambda w: (w.info.role != "prefill", w.info.name, w.registered_at))


def _worker(worker: WorkerState, now: float) -> dict[str, Any]:
    info = worker.info
    return {
        "name": info.name,
        "role": info.role,
        "incarnation": info.incarnation,
        "address": info.address,
        "host": info.host,
        "device": info.device,
        "pid": info.pid,
        "tp": info.parallel.tp_size,
        "pp": info.parallel.pp_size,
        "rank_pids": list(info.rank_pids or (info.pid,)),
        "model": info.model,
        "alive": worker.is_alive,
        "state": worker.state if worker.is_alive else "lost",
        "beat_age_s": now - worker.last_beat_at,
        "up_s": now - worker.registered_at,
        "num_blocks": info.num_blocks,
        "block_size": info.layout.block_size,
        "max_num_seqs": info.max_num_seqs,
        "price_per_hour": info.price_per_hour,
        "is_spot": info.is_spot,
        "is_overflow": info.is_overflow,
        "stats": msgspec.structs.asdict(worker.stats or WorkerStats(num_free_blocks=info.num_blocks)),
        "ledger": {
            "prefilling": len(worker.prefills),
            "decoding": worker.num_decoding,
            "context_tokens": round(worker.num_context_tokens),
            "blocks_at_end": worker.blocks_at_end,
            "prefill_queue_s": worker.prefill_queue_s(now),
        },
    }
