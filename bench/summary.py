"""Figures of a run: quantiles, throughput, goodput and attainment against a promise; as JSON names and as a table.

The JSON names are those of vLLM's `bench serve`, where it has one. Pure; `serve.py` calls it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.client import Sample


class Promise(NamedTuple):
    """Seconds; None: nothing is promised. A request is good when it keeps all of it."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Promise:
        """ "ttft=1.5,tpot=100ms". Raises ValueError."""
        found: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.strip().partition("=")
            if name not in cls._fields or not equals:
                raise ValueError(f"{part}: wanted {', '.join(f'{one}=SECONDS' for one in cls._fields)}, or 100ms")
            number = float(value.removesuffix("ms")) / 1000 if value.endswith("ms") else float(value.removesuffix("s"))
            if not number > 0:
                raise ValueError(f"{part}: a promise is above zero")
            found[name] = number
        return cls(**found)

    def is_kept(self, sample: Sample) -> bool:
        """A refused or failed request keeps nothing; one of a single token has no TPOT to miss."""
        if sample.outcome != "ok" or sample.ttft is None:
            return False
        return (
            (self.ttft is None or sample.ttft <= self.ttft)
            and (self.tpot is None or sample.tpot is None or sample.tpot <= self.tpot)
            and (self.e2e is None or sample.end - sample.planned <= self.e2e)
        )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarize(samples: Sequence[Sample], promise: Promise, duration_s: float) -> dict[str, Any]:
    """One run, or one tenant's part of it. Times in ms, as the names say; None where there is nothing to say."""
    ended = [sample for sample in samples if sample.outcome == "ok"]
    good = sum(promise.is_kept(sample) for sample in samples)
    duration = max(duration_s, 1e-9)
    row: dict[str, Any] = {
        "num_prompts": len(samples),
        "completed": len(ended),
        "refused": sum(sample.outcome == "refused" for sample in samples),
        "failed": sum(sample.outcome == "failed" for sample in samples),
        "reasons": dict(Counter(sample.reason for sample in samples if sample.outcome != "ok").most_common(16)),
        "duration": duration_s,
        "request_throughput": len(ended) / duration,
        "output_throughput": sum(sample.output_tokens for sample in ended) / duration,
        "total_token_throughput": sum(sample.prompt_tokens + sample.output_tokens for sample in ended) / duration,
        "request_goodput": good / duration,
        "attainment": good / len(samples) if samples else None,
        "total_input_tokens": sum(sample.prompt_tokens for sample in ended),
        "total_cached_tokens": sum(sample.cached_tokens for sample in ended),
        "total_output_tokens": sum(sample.output_tokens for sample in ended),
        "resumed": sum(bool(sample.metrics.get("resumptions")) for sample in ended),
        "client_late_p99_ms": _ms(quantile([sample.sent - sample.planned for sample in samples], 0.99)),
    }
    for name, values in (
        ("ttft", [sample.ttft for sample in ended if sample.ttft is not None]),
        ("tpot", [sample.tpot for sample in ended if sample.tpot is not None]),
        ("itl", [gap for sample in ended for gap in sample.gaps]),
        ("e2el", [sample.end - sample.planned for sample in ended]),
    ):
        row[f"mean_{name}_ms"] = _ms(sum(values) / len(values)) if values else None
        row[f"median_{name}_ms"] = _ms(quantile(values, 0.5))
        row[f"p95_{name}_ms"] = _ms(quantile(values, 0.95))
        row[f"p99_{name}_ms"] = _ms(quantile(values, 0.99))
    return row


def by_tenant(samples: Sequence[Sample], promise: Promise, duration_s: float) -> dict[str, dict[str, Any]]:
    """Only where there is more than one."""
    names = sorted({sample.tenant for sample in samples})
    if len(names) < 2:
        return {}
    return {name: summarize([s for s in samples if s.tenant == name], promise, duration_s) for name in names}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


COLUMNS = (
    ("req", "num_prompts", "d"), ("ok", "completed", "d"), ("refused", "refused", "d"), ("failed", "failed", "d"),
    ("req/s", "request_throughput", ".2f"), ("good/s", "request_goodput", ".2f"), ("kept", "attainment", ".1%"),
    ("out tok/s", "output_throughput", ".1f"), ("TTFT p50", "median_ttft_ms", ".0f"), ("p95", "p95_ttft_ms", ".0f"),
    ("p99", "p99_ttft_ms", ".0f"), ("TPOT p50", "median_tpot_ms", ".1f"), ("p95", "p95_tpot_ms", ".1f"),
    ("p99", "p99_tpot_ms", ".1f"), ("ITL p99", "p99_itl_ms", ".0f"),
)  # fmt: skip


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """One line per (label, figures); times in ms."""
    cells = [["", *(head for head, _, _ in COLUMNS)]]
    for label, row in rows:
        cells.append([label, *("-" if row[name] is None else format(row[name], how) for _, name, how in COLUMNS)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
             for line in cells]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
