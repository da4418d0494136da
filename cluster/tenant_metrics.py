"""Tenants' standing with the scheduler and how wrong its predictions were: into the status, and from there into /metrics.

Read-only. Every part of the status is optional to `tenant_series`; a tenant beyond the bound of labels is summed into "other".
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import Metric

from scheduler.scheduler import Scheduler

Family = Callable[..., Metric]
BUCKETS = ("requests", "tokens")
MAX_TENANTS = 256  # in a status


def about_tenants(scheduler: Scheduler, now: float) -> dict[str, Any]:
    """tenants: name -> class weight buckets (requests, tokens: what is left; none without a limit), of those that were asked for
    lately by a bucket and the first of the file."""
    levels = dict(itertools.islice(scheduler.gate.buckets.levels(now).items(), MAX_TENANTS))
    tenants = {}
    for name in dict.fromkeys([*levels, *itertools.islice(scheduler.tenants.tenants, MAX_TENANTS)]):
        spec = scheduler.tenants.tenant(name)
        tenants[name] = {"class": spec.slo_class, "weight": spec.weight, "buckets": levels.get(name, {})}
    return {"tenants": tenants}


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
    for row in status.get("services") or ():
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
    labels = ("of", "served_model", "device", "role", "parallel")
    rows = [
        ((of, row["model"], row["device"], row["role"], f"{row['tp']}x{row['pp']}"), error)
        for row in models
        for of, error in (row.get("errors") or {}).items()
    ]
    for name, text, field in (
        ("tandem_prediction_error_ratio", "Mean absolute relative error of what the scheduler predicted, lately.", "mape"),
        ("tandem_prediction_ratio_p90", "9 of 10 times what came true was at most so many times what was predicted.", "p90"),
    ):
        yield family("gauge", name, text, labels, [(key, error[field]) for key, error in rows if error[field] is not None])
