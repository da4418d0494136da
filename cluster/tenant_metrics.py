"""Series of /metrics about tenants and about the scheduler's own predictions: what `metrics.py` has no number of, from the status.

Read-only; every part of the status is optional, and a tenant beyond the bound of labels is summed into "other".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import Metric

Family = Callable[..., Metric]
BUCKETS = ("requests", "tokens")
PREDICTED = ("prefill", "decode", "transfer")


def tenant_series(status: dict[str, Any], family: Family, label: Callable[[str], str]) -> Iterator[Metric]:
    """family: makes one metric (kind, name, text, labels, rows). label: the tenant's label, or "other"."""
    yield from _file(status.get("tenants_file"), family)
    yield from _shares(status, family, label)
    yield from _errors(status.get("cost_models") or (), family)


def _file(file: dict[str, Any] | None, family: Family) -> Iterator[Metric]:
    if file is None:
        return
    valid = float(file["problem"] is None and bool(file["version"]))
    yield family("gauge", "tandem_tenants_file_valid", "1 while the tenants file on disk is the one in force.", (), [((), valid)])
    reads = [((result,), file[result]) for result in ("taken", "refused")]
    yield family("counter", "tandem_tenants_file_reads", "Versions of the tenants file that were read.", ("result",), reads)
    loaded = [((), file["loaded"])] if file["loaded"] is not None else []
    yield family("gauge", "tandem_tenants_file_loaded_timestamp_seconds", "When the version in force was read.", (), loaded)
    info = [((file["version"],), 1.0)] if file["version"] else []
    yield family("gauge", "tandem_tenants_file_info", "The version in force.", ("version",), info)


def _shares(status: dict[str, Any], family: Family, label: Callable[[str], str]) -> Iterator[Metric]:
    service: Counter[tuple[str, str]] = Counter()
    for row in status.get("fairness") or ():
        service[label(row["tenant"]), str(row["band"])] += row["service"]
    text = "What a tenant was served in a band: tokens in + 2 x tokens out, over its weight."
    yield family("gauge", "tandem_tenant_service", text, ("tenant", "band"), service.items())
    tenants = status.get("tenants") or {}
    weights = [((name,), row["weight"]) for name, row in tenants.items() if label(name) == name and "weight" in row]
    yield family("gauge", "tandem_tenant_weight", "Its share of service among tenants that wait.", ("tenant",), weights)
    levels = [
        ((name, bucket), row["buckets"][bucket])
        for name, row in tenants.items()
        for bucket in BUCKETS
        if label(name) == name and (row.get("buckets") or {}).get(bucket) is not None
    ]
    text = "What is left in a tenant's bucket; below 0 it has to wait."
    yield family("gauge", "tandem_tenant_bucket_level", text, ("tenant", "bucket"), levels)


def _errors(models: Any, family: Family) -> Iterator[Metric]:
    """Mean relative error of the fitted cost models, lately; 0.1 is 10 %."""
    rows = [
        ((of, row["model"], row["device"], row["role"], f"{row['tp']}x{row['pp']}"), row["error"][of])
        for row in models
        for of in PREDICTED
        if (row.get("error") or {}).get(of) is not None
    ]
    labels = ("of", "served_model", "device", "role", "parallel")
    text = "Mean relative error of what the scheduler predicts, by its cost models."
    yield family("gauge", "tandem_prediction_error_ratio", text, labels, rows)
