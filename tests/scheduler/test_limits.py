"""Limits of tenants and classes through the whole scheduler: who was told a time is let in at that time; classes share workers."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import SchedulerConfig
from configs.tenants import Tenants, read_tenants
from protocol.errors import TenantOverLimit
from protocol.kv import KVLayout
from protocol.messages import Admit, WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import Ticket
from scheduler.scheduler import Scheduler

LAYOUT = KVLayout(2, 2, 16, 16, "float32", "hash")
FILE = """
classes:
  fast: {ttft_s: 5, tpot_s: 1, band: 0, when_late: queue}
  slow: {ttft_s: 20, tpot_s: 5, band: 1, when_late: queue}
tenants:
  limited: {class: slow, requests_per_min: 60}
  wordy: {class: slow, tokens_per_min: 6000}
  free: {class: slow, classes: [fast]}
"""


def scheduler(tenants: Tenants | None = None, **worker: Any) -> Scheduler:
    made = Scheduler(SchedulerConfig(), tenants=tenants or read_tenants(FILE, "t"), draw=lambda: 0.5)
    for role in ("decode", "prefill"):
        info = WorkerInfo(
            incarnation=f"{role}-0-a", role=role, name=f"{role}:0", address=f"{role}:1", model="m", layout=LAYOUT,
            num_blocks=10_000, max_model_len=4096, max_num_seqs=256, pid=1, host="h", device="cpu", **worker,
        )  # fmt: skip
        made.register(info, 0.0)
        made.heartbeat(WorkerBeat(info.incarnation, "ready", WorkerStats(num_free_blocks=10_000)), 0.0)
    return made


def admit(request_id: str, tenant: str, **more: Any) -> Admit:
    given = {"model": "m", "slo_class": "slow", "priority": 0, "prompt_len": 100, "max_tokens": 20}
    return Admit(request_id=request_id, tenant=tenant, **{**given, **more})


@pytest.mark.parametrize(("tenant", "reason"), [("limited", "tenant_requests"), ("wordy", "tenant_tokens")])
def test_who_comes_when_told_is_let_in_however_many_were_told_a_later_time(tenant: str, reason: str) -> None:
    made = scheduler()
    told = [1.0 + wait for i in range(90) if (wait := refused(made, admit(f"r{i}", tenant), 1.0))]
    assert made.records.rejections == {reason: len(told)}
    assert len(told) >= 25
    kept = [refused(made, admit(f"again{i}", tenant, is_retry=True), at) is None for i, at in enumerate(sorted(told))]
    assert sum(kept) >= 0.9 * len(told)
    others = [refused(made, admit(f"more{i}", tenant), max(told)) for i in range(90)]
    assert any(others), "those who were told nothing have the bucket before them"


def refused(made: Scheduler, message: Admit, now: float) -> float | None:
    """Seconds after which it may come back; None when it was let in."""
    try:
        made.submit(message, now)
    except TenantOverLimit as error:
        return error.retry_after
    return None


def test_classes_of_different_paces_share_a_worker() -> None:
    """The looser class goes where most runs already: also when one worker is all there is."""
    made = scheduler()
    tickets = 0
    for i in range(40):
        made.submit(admit(f"r{i}", "free", slo_class="fast" if i % 3 == 0 else "slow", prompt_len=4, max_tokens=2), 1.0 + 0.1 * i)
        found = made.decisions(1.0 + 0.1 * i)
        assert all(isinstance(decision, Ticket) for decision in found), found
        tickets += len(found)
    assert tickets >= 2
    assert made.records.counters["failed"] == 0
