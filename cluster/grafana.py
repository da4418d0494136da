"""The two Grafana dashboards of configs/observability, written from one table of panels: `python -m cluster.grafana`.

Not used at run time. tests/observability checks that the files are what this writes, and runs every query below against a real
Prometheus that scrapes a real cluster. Plain panels and classic histograms only: Grafana 9 and later, Prometheus 2.40 and later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "observability"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24


class Panel(NamedTuple):
    """queries: (expression, legend). unit: Grafana's. needs: an event without which there is nothing to show."""

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"  # "timeseries" | "stat" | "heatmap"
    width: int = 8
    needs: str = ""


OF_MODEL = 'model_name=~"$model_name"'
OF_TENANT = f'{OF_MODEL}, tenant=~"$tenant", class=~"$class"'
RATE = "[$__rate_interval]"


def _rate(name: str, by: str, labels: str = OF_MODEL, more: str = "") -> str:
    return f"sum by ({by}) (rate({name}{{{labels}{more}}}{RATE}))"


def _quantile(q: float, name: str, by: str, labels: str = OF_MODEL) -> str:
    inside = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({inside}) (rate({name}_bucket{{{labels}}}{RATE})))"


def _quantiles(name: str, by: str = "", labels: str = OF_MODEL, legend: str = "") -> tuple[tuple[str, str], ...]:
    prefix = f"{legend} " if legend else ""
    return tuple((_quantile(q, name, by, labels), f"{prefix}p{round(100 * q)}") for q in (0.5, 0.95, 0.99))


_WHO = "{{tenant}} {{class}}"
SLA: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Promises",
        (
            Panel("Kept", "Share of requests that kept both times, last 5 minutes.", "percentunit",
                  ((f"tandem_slo_attainment_ratio{{{OF_TENANT}}}", _WHO),), "stat", 6),
            Panel("Error budget left", "Of the last 5 minutes' budget; 0 when it is used up.", "percentunit",
                  ((f"tandem_slo_error_budget_left_ratio{{{OF_TENANT}}}", _WHO),), "stat", 6),
            Panel("Goodput", "Requests a second that kept the promise.", "reqps",
                  ((_rate("tandem_slo_kept_total", "tenant, class", OF_TENANT), _WHO),), "stat", 6),
            Panel("Burn rate", "1: the budget lasts exactly its period. Above 14.4 somebody is paged.", "none",
                  ((f"(1 - {_rate('tandem_slo_kept_total', 'tenant, class', OF_TENANT)} "
                    f"/ ({_rate('tandem_slo_requests_total', 'tenant, class', OF_TENANT)} > 0)) "
                    "/ on (class) group_left () (1 - max by (class) (tandem_slo_target_ratio))", _WHO),), "stat", 6),
        ),
    ),
    (
        "Latency",
        (
            Panel("Time to first token", "The dashed line is the promise.", "s",
                  (*_quantiles("tandem_time_to_first_token_seconds", "tenant, class", OF_TENANT, _WHO),
                   (f'max(tandem_promise_seconds{{{OF_MODEL}, of="ttft"}})', "promise")), width=12),
            Panel("Time per output token", "The dashed line is the promise.", "s",
                  (*_quantiles("tandem_time_per_output_token_seconds", "tenant, class", OF_TENANT, _WHO),
                   (f'max(tandem_promise_seconds{{{OF_MODEL}, of="tpot"}})', "promise")), width=12),
            Panel("Gaps between tokens", "Each gap of each choice.", "s", _quantiles("vllm:inter_token_latency_seconds")),
            Panel("End to end", "Received to the end.", "s", _quantiles("vllm:e2e_request_latency_seconds")),
            Panel("Predicted time to first token", "What came, by what the scheduler predicted at placement; 1 is right.", "none",
                  _quantiles("tandem_ttft_prediction_ratio")),
        ),
    ),
    (
        "Demand",
        (
            Panel("Requests", "By how they ended.", "reqps",
                  ((_rate("tandem_requests_total", "tenant, class, outcome", OF_TENANT), f"{_WHO} {{{{outcome}}}}"),)),
            Panel("Refusals", "By reason; none is good.", "reqps",
                  ((_rate("tandem_refusals_total", "tenant, class, reason", OF_TENANT), f"{_WHO} {{{{reason}}}}"),)),
            Panel("Tokens", "Of requests that ended; cached are among input.", "none",
                  ((_rate("tandem_tokens_total", "tenant, class, kind", OF_TENANT), f"{_WHO} {{{{kind}}}}"),)),
        ),
    ),
    (
        "Tenants",
        (
            Panel("First token in time", "Share of each tenant's requests whose first token kept the promise.", "percentunit",
                  ((f"{_rate('tandem_slo_ttft_kept_total', 'tenant', OF_TENANT)} "
                    f"/ ({_rate('tandem_slo_requests_total', 'tenant', OF_TENANT)} > 0)", "{{tenant}}"),)),
            Panel("Refused by tenant and reason", "Of what the tenant sent; the reason is x-tandem-refusal's.", "reqps",
                  ((f"{_rate('tandem_refusals_total', 'tenant, reason', OF_TENANT)} > 0", "{{tenant}} {{reason}}"),),
                  needs="refusals"),
            Panel("Tokens by tenant", "Input, what of it was cached, and output.", "none",
                  ((_rate("tandem_tokens_total", "tenant, kind", OF_TENANT), "{{tenant}} {{kind}}"),)),
            Panel("Buckets", "What is left of each tenant's limits; below 0 its requests wait.", "none",
                  ((f'tandem_tenant_bucket_level{{{OF_MODEL}, tenant=~"$tenant"}}', "{{tenant}} {{bucket}}"),),
                  needs="a tenants file with limits"),
            Panel("Served, by weight", "(Tokens in + 2 x tokens out) / weight, a second: equal where all wait.", "none",
                  ((f'sum by (tenant) (deriv(tandem_tenant_service{{{OF_MODEL}, tenant=~"$tenant"}}{RATE}))', "{{tenant}}"),)),
            Panel("Served with less", "Requests that were degraded instead of refused.", "reqps",
                  ((_rate("tandem_degraded_total", "tenant, class", OF_TENANT), _WHO),)),
        ),
    ),
)  # fmt: skip

_ENGINE = "{{engine}}"
CLUSTER: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            Panel("Workers", "By role and state.", "none",
                  ((f"sum by (role, state) (tandem_workers{{{OF_MODEL}}}) > 0", "{{role}} {{state}}"),), "stat", 6),
            Panel("In flight", "Before and after their first token.", "none",
                  ((f"sum by (phase) (tandem_requests_in_flight{{{OF_MODEL}}})", "{{phase}}"),), "stat", 6),
            Panel("Queued", "Requests that wait to be placed.", "none",
                  ((f"tandem_queue_requests{{{OF_MODEL}}}", "requests"),), "stat", 6),
            Panel("Output", "Tokens a second, all workers.", "none",
                  ((f"sum(rate(tandem_worker_generation_tokens_total{{{OF_MODEL}}}{RATE}))", "tokens/s"),), "stat", 6),
        ),
    ),
    (
        "The path of a request",
        (
            Panel("Queue", "Received to first placed.", "s", _quantiles("vllm:request_queue_time_seconds"), width=6),
            Panel("Prefill", "Placed to first token.", "s", _quantiles("vllm:request_prefill_time_seconds"), width=6),
            Panel("KV transfer", "First token until decode had verified the KV.", "s",
                  _quantiles("tandem_kv_transfer_duration_seconds"), width=6),
            Panel("Decode", "First token to the end.", "s", _quantiles("vllm:request_decode_time_seconds"), width=6),
            Panel("Running and waiting", "On workers, and in the queue.", "none",
                  ((f"sum by (role) (vllm:num_requests_running{{{OF_MODEL}}})", "{{role}} running"),
                   (f"sum by (role) (vllm:num_requests_waiting{{{OF_MODEL}}})", "{{role}} waiting")), width=12),
            Panel("Prompt lengths", "Requests by prompt tokens.", "none",
                  ((f"sum by (le) (increase(vllm:request_prompt_tokens_bucket{{{OF_MODEL}}}{RATE}))", "{{le}}"),), "heatmap", 12),
        ),
    ),
    (
        "Pools",
        (
            Panel("Busy", "Share of time in engine steps. Prefill high and KV of decode low: more prefill workers.",
                  "percentunit", ((f"avg by (role) (rate(tandem_worker_step_seconds_total{{{OF_MODEL}}}{RATE}))", "{{role}}"),)),
            Panel("KV in use", "Share of blocks held by sequences, grants or quarantine.", "percentunit",
                  ((f"vllm:kv_cache_usage_perc{{{OF_MODEL}}}", _ENGINE),)),
            Panel("Tokens by worker", "Prompt tokens computed, tokens sampled.", "none",
                  ((_rate("tandem_worker_prompt_tokens_total", "engine"), "{{engine}} prompt"),
                   (_rate("tandem_worker_generation_tokens_total", "engine"), "{{engine}} output"))),
            Panel("Prefix cache", "Share of looked-up prompt tokens that were there.", "percentunit",
                  ((f"{_rate('vllm:prefix_cache_hits_total', 'role')} "
                    f"/ ({_rate('vllm:prefix_cache_queries_total', 'role')} > 0)", "{{role}}"),)),
            Panel("Last token", "Age of each worker's last token.", "s",
                  ((f"tandem_worker_last_token_age_seconds{{{OF_MODEL}}}", _ENGINE),)),
            Panel("Resident memory", "Of each worker.", "bytes", ((f"tandem_worker_resident_bytes{{{OF_MODEL}}}", _ENGINE),)),
        ),
    ),
    (
        "KV between them",
        (
            Panel("Bytes", "By link.", "Bps",
                  ((_rate("tandem_kv_link_bytes_total", "engine, peer, transport"), "{{engine}} → {{peer}} {{transport}}"),)),
            Panel("Transfers", "Verified, by decode worker.", "ops",
                  ((_rate("tandem_kv_transfers_total", "engine", OF_MODEL, ', role="decode"'), _ENGINE),)),
            Panel("Faults", "Failed transfers, wrong digests (never read), expired leases, blocks in quarantine.", "none",
                  ((f"sum by (engine) (increase(tandem_kv_transfers_failed_total{{{OF_MODEL}}}{RATE}))", "{{engine}} failed"),
                   (f"sum by (engine) (increase(tandem_kv_digest_failures_total{{{OF_MODEL}}}{RATE}))", "{{engine}} digest"),
                   (f"sum by (engine) (increase(tandem_kv_leases_expired_total{{{OF_MODEL}}}{RATE}))", "{{engine}} lease"),
                   (f"sum by (engine) (tandem_worker_quarantined_blocks{{{OF_MODEL}}})", "{{engine}} quarantine"))),
        ),
    ),
    (
        "What happened",
        (
            Panel("Scheduler", "What it did and saw.", "none",
                  ((f"sum by (event) (increase(tandem_scheduler_events_total{{{OF_MODEL}}}{RATE})) > 0", "{{event}}"),)),
            Panel("Recovery", "Requests that another worker took over; sequences that gave up their blocks.", "none",
                  ((f"sum(increase(tandem_resumptions_total{{{OF_MODEL}}}{RATE}))", "resumed"),
                   (f"sum(increase(vllm:num_preemptions_total{{{OF_MODEL}}}{RATE}))", "preempted"))),
            Panel("GPU", "Utilization and power, where there is one.", "percentunit",
                  ((f"tandem_gpu_utilization_ratio{{{OF_MODEL}}}", _ENGINE),), needs="a GPU"),
        ),
    ),
)  # fmt: skip

VARIABLES = (
    ("model_name", "label_values(tandem_queue_requests, model_name)"),
    ("tenant", "label_values(tandem_slo_requests_total, tenant)"),
    ("class", "label_values(tandem_slo_requests_total, class)"),
)
DASHBOARDS = {
    "grafana-sla.json": ("tandem-sla", "Tandem: SLA", SLA, ("model_name", "tenant", "class")),
    "grafana-cluster.json": ("tandem-cluster", "Tandem: cluster and request path", CLUSTER, ("model_name",)),
}


def dashboard(name: str) -> dict[str, Any]:
    """One of DASHBOARDS as Grafana's JSON model."""
    uid, title, rows, variables = DASHBOARDS[name]
    panels: list[dict[str, Any]] = []
    y = 0
    for row_title, row in rows:
        panels.append(_row(len(panels) + 1, row_title, y))
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            height = 5 if panel.kind == "stat" else 8
            panels.append(_panel(len(panels) + 1, panel, {"x": x, "y": y, "w": panel.width, "h": height}))
            x += panel.width
        y += height
    return {
        "uid": uid,
        "title": title,
        "tags": ["tandem"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source(), *(_variable(n, q) for n, q in VARIABLES if n in variables)]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "color": {"mode": "palette-classic"}}
    overrides: list[dict[str, Any]] = []
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {"lineWidth": 2, "fillOpacity": 5, "showPoints": "never", "spanNulls": False}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
        dashed = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}}
        overrides = [{"matcher": {"id": "byName", "options": "promise"}, "properties": [dashed]}]
    elif panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto", "colorMode": "value", "graphMode": "area"}
    else:
        options = {"calculate": False, "yAxis": {"unit": "short"}, "color": {"scheme": "Viridis"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text + (f" Needs {panel.needs}." if panel.needs else ""),
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": True,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            }
            for i, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


def main() -> None:
    for name in DASHBOARDS:
        (FOLDER / name).write_text(json.dumps(dashboard(name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
