"""The SLA report as CSV and as Markdown, from the rows of `scheduler.sla.Sla.rows`. Called by `observe.py`."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

COLUMNS = (
    "tenant", "class", "requests", "finished", "failed", "cancelled", "degraded", "refused", "attainment", "target", "budget_left",
    "goodput_per_s", "ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "ttft_promise_ms", "tpot_p50_ms", "tpot_p95_ms", "tpot_p99_ms",
    "tpot_promise_ms", "input_tokens", "cached_tokens", "output_tokens", "cost", "refusal_reasons", "window_s",
)  # fmt: skip


def as_csv(report: dict[str, Any]) -> str:
    """One line per tenant and class. Empty where there is nothing to measure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in report["rows"]:
        flat = _flat(row, report["window_s"])
        writer.writerow(["" if flat[name] is None else flat[name] for name in COLUMNS])
    return out.getvalue()


def as_markdown(report: dict[str, Any]) -> str:
    """A table for people."""
    head = ("tenant", "class", "requests", "refused", "kept", "budget left", "TTFT p50 / p95 / p99", "TPOT p50 / p95 / p99",
            "goodput", "tokens in (cached) / out", "cost")  # fmt: skip
    lines = [f"# SLA of the last {report['window_s']:g} s", "", _line(head), _line("---" for _ in head)]
    for row in report["rows"]:
        promise, tokens, refused = row["promise"], row["tokens"], row["refused"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
        cells = (
            row["tenant"],
            row["class"],
            str(row["requests"]),
            (reasons or "0") + (f"; {row['degraded']} degraded" if row.get("degraded") else ""),
            f"{_percent(row['attainment'])} of {_percent(promise['attainment'])}",
            _percent(row["budget_left"]),
            f"{_times(row['ttft'])} of {1e3 * promise['ttft_s']:.0f} ms",
            f"{_times(row['tpot'])} of {1e3 * promise['tpot_s']:.0f} ms",
            f"{row['goodput_per_s']:.3g} /s",
            f"{tokens['input']} ({tokens['cached']}) / {tokens['output']}",
            "-" if row["cost"] is None else f"{row['cost']:.4f}",
        )
        lines.append(_line(cells))
    if not report["rows"]:
        lines += ["", "No request in this window."]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _times(summary: dict[str, float | None]) -> str:
    return " / ".join("-" if summary[q] is None else f"{1e3 * (summary[q] or 0.0):.1f}" for q in ("p50", "p95", "p99"))


def _percent(share: float | None) -> str:
    """Never rounded up: 99.96 % is not 100 %."""
    return "-" if share is None else f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"


def _flat(row: dict[str, Any], window_s: float) -> dict[str, Any]:
    flat: dict[str, Any] = {name: row[name] for name in ("tenant", "class", "requests", "finished", "failed", "cancelled", "cost")}
    flat["degraded"] = row.get("degraded", 0)
    flat["refused"] = sum(row["refused"].values())
    flat["refusal_reasons"] = " ".join(f"{reason}={count}" for reason, count in sorted(row["refused"].items()))
    flat["attainment"] = _round(row["attainment"], 6)
    flat["target"] = row["promise"]["attainment"]
    flat["budget_left"] = _round(row["budget_left"], 6)
    flat["goodput_per_s"] = _round(row["goodput_per_s"], 6)
    for of in ("ttft", "tpot"):
        for q in ("p50", "p95", "p99"):
            value = row[of][q]
            flat[f"{of}_{q}_ms"] = None if value is None else round(1e3 * value, 3)
        flat[f"{of}_promise_ms"] = 1e3 * row["promise"][f"{of}_s"]
    for name in ("input", "cached", "output"):
        flat[f"{name}_tokens"] = row["tokens"][name]
    flat["window_s"] = window_s
    return flat


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
