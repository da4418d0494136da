"""What the scheduler remembers for people: counters, totals of dead workers, phases of start-up, known gateways."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import msgspec

from protocol.messages import Outcome, WorkerInfo, WorkerPhase, WorkerStats
from scheduler.admission import START_UP_PRIOR_S
from scheduler.ledger import WorkerState

MAX_STARTING = 256
MAX_REASONS = 4096  # refused requests whose reason is remembered
MAX_PHASES = 32  # of one worker
GAUGES = frozenset(name for name in WorkerStats.__struct_fields__ if name.endswith(("_blocks", "_age_s", "rss_bytes"))) | {
    "num_running",
    "num_waiting",
    "host_tier_bytes",
    "pairs",  # per pair, not to be summed here
    "gpu",
}
CUMULATIVE = tuple(name for name in WorkerStats.__struct_fields__ if name not in GAUGES)


class Gateway:
    """One gateway that beats, and the requests it named last."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.last_beat_at = 0.0
        self.held: set[str] = set()


class Records:
    """Counters only grow; so do the totals, because what a worker did stays counted when it dies."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.last_rejection = ""
        self._reasons: OrderedDict[str, str] = OrderedDict()  # request_id -> why it was refused
        self.tokens: Counter[str] = Counter()
        self.retired: dict[str, Counter[str]] = {}  # role -> counters of workers that are gone
        self.phases: OrderedDict[str, list[WorkerPhase]] = OrderedDict()  # incarnation -> its start-up
        self.start_up_s = START_UP_PRIOR_S  # how long a worker's start-up takes

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] += by

    def reject(self, reason: str, request_id: str) -> None:
        self.counters["rejected"] += 1
        self.rejections[reason] += 1
        self.last_rejection = reason
        self._reasons[request_id] = reason
        while len(self._reasons) > MAX_REASONS:
            self._reasons.popitem(last=False)

    def reason(self, request_id: str) -> str:
        """Why this request was refused, at the door or after a wait; "" when it was not, or long ago."""
        return self._reasons.get(request_id, "")

    def count_tokens(self, outcome: Outcome) -> None:
        if outcome.output_tokens < 1:
            return  # its prompt may never have been computed
        self.tokens["prompt"] += max(0, outcome.prompt_tokens)
        self.tokens["cached"] += max(0, outcome.cached_tokens)
        self.tokens["output"] += max(0, outcome.output_tokens)

    def retire(self, worker: WorkerState) -> None:
        if worker.stats is not None:
            kept = self.retired.setdefault(worker.info.role, Counter())
            for name in CUMULATIVE:
                kept[name] += getattr(worker.stats, name)

    def totals(self, workers: list[WorkerState]) -> dict[str, dict[str, Any]]:
        """role -> cumulative counters over all workers there ever were."""
        out: dict[str, dict[str, Any]] = {}
        for role in ("prefill", "decode"):
            total = Counter(self.retired.get(role, Counter()))
            for worker in workers:
                if worker.info.role == role and worker.stats is not None:
                    stats = msgspec.structs.asdict(worker.stats)
                    for name in CUMULATIVE:
                        total[name] += stats[name]
            out[role] = {name: total[name] for name in CUMULATIVE}
        return out

    def phase(self, message: WorkerPhase) -> None:
        told = self.phases.setdefault(message.incarnation, [])
        if len(told) >= MAX_PHASES:
            del told[0]
        told.append(message)
        while len(self.phases) > MAX_STARTING:
            self.phases.popitem(last=False)

    def registered(self, info: WorkerInfo) -> None:
        """Its start-up is over: its length is what the next one's is expected to be."""
        told = self.phases.get(info.incarnation)
        if told and 0 < told[-1].elapsed_s < 3600:
            self.start_up_s += 0.5 * (told[-1].elapsed_s - self.start_up_s)
