"""An hour of what the cluster did, for people: requests with their timelines, events, promises kept, curves. Bounded memory.

Lives at the scheduler service, which tells it of everything that passes there; gateways report with their Outcomes. It decides
nothing, and a fault of it never reaches a request. With a new life of the scheduler it begins anew, and says so as an event.
Its documents are described in `api/backend.py`; `AskHistory` asks for one.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import msgspec

from cluster.explain import explained, why_of
from configs.schema import SchedulerConfig
from configs.tenants import DEFAULT_TENANT, Tenants
from protocol.errors import NotFound, TandemError
from protocol.messages import Admit, AskHistory, Outcome, PairStats, Progress, WorkerStats
from protocol.ticket import Ticket
from protocol.timeline import Mark, Trace, worker_name
from scheduler.ledger import WorkerState
from scheduler.scheduler import Scheduler
from scheduler.series import Series
from scheduler.sla import Prices, Promise, Sla, tpot_of

MAX_REQUESTS = 2048  # remembered, the newest; those that run are among them
MAX_EVENTS = 200
MERGE_S = 10.0  # an event that repeats within it is one, with a count
MAX_CANDIDATES = 8  # of a decision, in the answer to why
RATE_S = 5.0  # what "a second" of a worker is averaged over
STATES = ("queued", "prefill", "transfer", "decode", "finished", "failed", "cancelled", "refused")
_marks = msgspec.msgpack.Decoder(tuple[Mark, ...])


class Row:
    """One request. Times: the scheduler's clock, seconds; `received` unix."""

    def __init__(self, request_id: str, received_at: float, received: float) -> None:
        self.request_id = request_id
        self.received_at = received_at
        self.received = received
        self.client_id: str | None = None
        self.tenant = self.slo_class = self.model = ""
        self.state = "queued"
        self.prompt_tokens = 0
        self.prefill: str | None = None
        self.decode: str | None = None
        self.resumptions = 0
        self.last_epoch = 0  # the attempt that its gateway last said is over
        self.failure: str | None = None
        self.outcome: Outcome | None = None  # without its marks
        self.marks = b""  # packed: most are never looked at
        self.why: dict[str, Any] | None = None
        self.seen: list[Mark] = [Mark(0.0, "received")]  # by the scheduler, while it runs

    def mark(self, now: float, name: str, worker: str | None = None, detail: str | None = None) -> None:
        if len(self.seen) < 64:
            self.seen.append(Mark(round(max(0.0, now - self.received_at), 6), name, worker, detail))

    def timeline(self) -> tuple[Mark, ...]:
        return _marks.decode(self.marks) if self.marks else tuple(self.seen)

    def document(self) -> dict[str, Any]:
        outcome = self.outcome
        trace = (outcome.trace if outcome is not None else None) or Trace()
        has_ttft = outcome is not None and outcome.output_tokens > 0
        return {
            "id": self.request_id,
            "client_id": self.client_id,
            "tenant": self.tenant,
            "class": self.slo_class,
            "model": self.model,
            "state": self.state,
            "received": self.received,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": outcome.cached_tokens if outcome is not None else 0,
            "output_tokens": outcome.output_tokens if outcome is not None else 0,
            "queue_ms": _ms(outcome.queue_s if outcome is not None else None),
            "prefill_ms": _ms(trace.prefill_s if has_ttft else None),
            "transfer_ms": _ms(trace.transfer_s if has_ttft else None),
            "decode_ms": _ms(trace.decode_s if has_ttft else None),
            "ttft_ms": _ms(outcome.ttft_s if outcome is not None and has_ttft else None),
            "tpot_ms": _ms(tpot_of(outcome) if outcome is not None else None),
            "e2e_ms": _ms(outcome.e2e_s if outcome is not None else None),
            "resumptions": self.resumptions,
            "prefill_worker": self.prefill,
            "decode_worker": self.decode,
            "failure": self.failure,
        }


class History:
    """Told by `SchedulerService` of what happens; `answer` gives the documents. wall: unix seconds, for people only.

    on_refused(tenant, class, reason): for the metrics.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        wall: Callable[[], float] = time.time,
        on_refused: Callable[[str, str, str], None] = lambda *_: None,
    ) -> None:
        config = scheduler.config
        self._prices = Prices(config.input_price, config.cached_price, config.output_price)
        self.sla = Sla(promises_of(config), self._prices, ("default",))
        self._on_refused = on_refused
        self.series = Series()
        self._scheduler = scheduler
        self._wall = wall
        self._rows: OrderedDict[str, Row] = OrderedDict()  # oldest first
        self._by_client: dict[str, str] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._workers: dict[str, tuple[str, str]] = {}  # incarnation -> name, state, as last told of
        self._beats: dict[str, deque[tuple[float, WorkerStats]]] = {}
        self._knew_another: set[str] = set()  # incarnations that were registered with a scheduler before this one

    def set_tenants(self, tenants: Tenants) -> None:
        """The tenants file that is in force from now on: promises by class, prices by tenant (the cluster's where it has none)."""
        own = {name: Prices(one.price.input, one.price.cached, one.price.output) for name, one in tenants.tenants.items()}
        prices_of = {name: prices for name, prices in own.items() if prices != Prices()}
        self.sla.set_table(promises_in(tenants), prices_of, tenants.tenants)

    # ---- what happens ------------------------------------------------------------------------------------------------

    def admitted(self, message: Admit, now: float) -> None:
        """A request came, or came again."""
        row = self._rows.get(message.request_id)
        if row is None:
            row = self._add(message.request_id, now)
            row.client_id = message.client_id or None
            row.tenant, row.slo_class = self.sla.key(message.tenant, message.slo_class)
            row.model, row.prompt_tokens = message.model, message.prompt_len
            if row.client_id is not None:
                self._by_client[row.client_id] = message.request_id
            self.series.count("requests")
        row.state = "queued"
        if message.resumption and message.last_epoch > row.last_epoch:  # else it is asked again, because an answer was lost
            row.last_epoch = message.last_epoch
            row.resumptions += 1
            left = row.decode or "its worker"
            row.mark(now, "resumed", None, f"{left} did not go on with it")
            text = f"request {message.request_id} goes on elsewhere: {left} did not"
            self.event("resumed", text, worker=row.decode, request_id=message.request_id)

    def refused(self, request_id: str, error: TandemError, reason: str, now: float) -> None:
        """It was never placed; its Outcome will say the same and changes nothing."""
        row = self._rows.get(request_id)
        if row is None or row.state == "refused" or row.resumptions:
            return  # one that ran before and cannot go on has failed
        row.state, row.failure = "refused", error.message
        row.mark(now, "end", None, f"refused: {reason}")
        self.sla.refused(row.tenant, row.slo_class, reason, now)
        self.series.count("refused")
        self._on_refused(row.tenant, row.slo_class, reason)
        text = f"tenant {row.tenant} was refused ({error.http_status} {reason}): {error.message}"
        self.event("refused", text, request_id=request_id, key=f"{row.tenant} {reason}")

    def placed(self, ticket: Ticket, now: float) -> None:
        row = self._rows.get(ticket.request_id)
        if row is None:
            return
        row.state = "prefill"
        row.decode = worker_name(ticket.decode.incarnation)
        row.prefill = worker_name(ticket.prefill.incarnation) if ticket.prefill is not None else row.decode
        row.mark(now, "admitted", None, f"predicted TTFT {1e3 * ticket.predicted_ttft_s:.0f} ms")
        row.why = self._why(ticket, row, now)

    def progress(self, message: Progress, now: float) -> None:
        row = self._rows.get(message.request_id)
        if row is not None and row.state == "prefill":
            row.state = "decode"
            row.mark(now, "first_token", row.prefill)

    def ended(self, outcome: Outcome, now: float) -> None:
        row = self._rows.get(outcome.request_id) or self._add(outcome.request_id, now - outcome.e2e_s)
        if row.outcome is not None or row.state == "refused":
            return
        if outcome.was_refused:  # by a scheduler before this one
            row.state = "refused"
            return
        trace = outcome.trace or Trace()
        row.state = outcome.kind if outcome.kind in ("finished", "cancelled") else "failed"
        row.received = self._wall() - outcome.e2e_s
        row.client_id = trace.client_id or row.client_id
        row.tenant, row.slo_class = self.sla.key(outcome.tenant, outcome.slo_class)
        row.model, row.prompt_tokens = trace.model or row.model, outcome.prompt_tokens
        row.prefill, row.decode = trace.prefill_worker or row.prefill, trace.decode_worker or row.decode
        row.resumptions, row.failure = max(row.resumptions, trace.num_resumptions), trace.failure
        row.marks = msgspec.msgpack.encode(trace.marks) if trace.marks else b""
        row.seen.clear()
        row.outcome = msgspec.structs.replace(outcome, trace=msgspec.structs.replace(trace, marks=()))
        if row.why is not None and trace.placed_ttft_s > 0 and not row.resumptions:  # else it was predicted for another attempt
            row.why["actual_ttft_ms"] = _ms(trace.placed_ttft_s)
        self.sla.outcome(outcome, now)
        if row.state != "cancelled":
            self.series.judged(self.sla.is_kept(outcome))
        if row.state == "failed":
            self.series.count("failed")
        elif row.state == "finished":
            self.series.finished(outcome.ttft_s, tpot_of(outcome))

    def beat(self, worker: WorkerState, now: float) -> None:
        """A heartbeat was taken; worker.stats are its numbers."""
        if worker.stats is None:
            return
        known = self._beats.setdefault(worker.incarnation, deque(maxlen=32))
        before = known[-1][1] if known else None
        known.append((now, worker.stats))
        while len(known) > 2 and known[1][0] < now - RATE_S:
            known.popleft()
        wrong = worker.stats.digest_failures - (before.digest_failures if before is not None else 0)
        if wrong > 0:
            text = f"{worker.info.name} refused KV whose bytes differed from their digests; none of it was read"
            self.event("digest_failure", text, worker=worker.info.name, count=wrong)

    def unknown_beat(self, incarnation: str) -> None:
        """A worker speaks to us as if we knew it: it was registered with a scheduler before this one."""
        if incarnation in self._scheduler.dead or len(self._knew_another) >= MAX_REQUESTS:
            return
        if not self._knew_another:
            self.event("scheduler_restarted", "the scheduler was restarted; its history and its curves begin here")
        self._knew_another.add(incarnation)

    def tick(self, now: float) -> None:
        """Often: notices workers that came, went or drain, and closes the slot of the curves that is over."""
        self._watch_workers()
        if self.series.is_due(now):
            self.series.tick(self._levels(), self._flows(), now, round(self._wall(), 3))

    def event(
        self,
        kind: str,
        text: str,
        *,
        worker: str | None = None,
        request_id: str | None = None,
        count: int = 1,
        key: str = "",
    ) -> None:
        """key: what makes two of a kind the same, beside the worker."""
        at, same = round(self._wall(), 3), (kind, worker, key)
        for event in list(self._events)[-8:]:
            if event["_same"] == same and at - event["t"] < MERGE_S:
                event.update(t=at, text=text, request_id=request_id, count=event["count"] + count)
                return
        self._events.append(
            {"t": at, "kind": kind, "text": text, "worker": worker, "request_id": request_id, "count": count, "_same": same}
        )

    # ---- documents -----------------------------------------------------------------------------------------------------

    def answer(self, message: AskHistory, now: float) -> dict[str, Any]:
        """Raises NotFound for a request that is not remembered."""
        if message.what == "requests":
            return {"requests": self.requests(message.tenant, message.state, message.limit)}
        if message.what == "request":
            return self.request(message.request_id)
        if message.what == "decision":
            return self.decision(message.request_id)
        if message.what == "sla":
            return {"window_s": message.window_s, "rows": self.sla.rows(message.window_s, now)}
        return self.snapshot(message.window_s, message.what == "snapshot", now)

    def snapshot(self, window_s: float, with_history: bool, now: float) -> dict[str, Any]:
        promise = self.sla.promise(self._scheduler.tenants.tenant(DEFAULT_TENANT).slo_class)
        series: dict[str, Any] = {"step_s": 5, "point": self.series.point()}
        if with_history:
            series["history"] = self.series.history()
        return {
            "now": round(self._wall(), 3),
            "promise": {"ttft_s": promise.ttft_s, "tpot_s": promise.tpot_s},
            "status": self._scheduler.status(now),
            "sla": {"window_s": window_s, "rows": self.sla.rows(window_s, now)},
            "pools": self._pools(now),
            "series": series,
            "events": [{k: v for k, v in event.items() if k != "_same"} for event in self._events],
        }

    def requests(self, tenant: str, state: str, limit: int) -> list[dict[str, Any]]:
        found = []
        for row in reversed(self._rows.values()):
            if len(found) >= max(0, limit):
                break
            if (not tenant or row.tenant == tenant) and (not state or row.state == state):
                found.append(row.document())
        return found

    def request(self, request_id: str) -> dict[str, Any]:
        row = self._rows.get(request_id) or self._rows.get(self._by_client.get(request_id, ""))
        if row is None:
            raise NotFound(f"no request {request_id[:128]!r} is remembered here; the last {MAX_REQUESTS} are", param="request_id")
        timeline = [msgspec.to_builtins(mark_document(mark)) for mark in row.timeline()]
        return {"request": row.document(), "timeline": timeline, "why": self._whole_why(row)}

    def decision(self, request_id: str) -> dict[str, Any]:
        """What the scheduler decided about it and what came true; by the client's own id too. See `cluster/explain.py`."""
        row = self._rows.get(request_id) or self._rows.get(self._by_client.get(request_id, ""))
        known = row.request_id if row is not None else request_id
        decision = self._decided(known)
        if decision is None:
            most = self._scheduler.config.max_decisions
            raise NotFound(
                f"no decision about {request_id[:128]!r} is remembered; the last {most} are (scheduler.max_decisions)",
                param="request_id",
            )
        return explained(known, decision, row.document() if row is not None else None)

    # ---- inside --------------------------------------------------------------------------------------------------------

    def _add(self, request_id: str, received_at: float) -> Row:
        row = self._rows[request_id] = Row(request_id, received_at, round(self._wall(), 3))
        while len(self._rows) > MAX_REQUESTS:
            _, gone = self._rows.popitem(last=False)
            if gone.client_id is not None and self._by_client.get(gone.client_id) == gone.request_id:
                del self._by_client[gone.client_id]
        return row

    def _decided(self, request_id: str) -> dict[str, Any] | None:
        """As the scheduler remembers it; where the request had no promise of its own, its class's."""
        decision = self._scheduler.explain(request_id)
        if decision is not None:
            promised = self._scheduler.tenants.slo_class(decision["request"]["class"])
            decision["promise"] = {name: own or getattr(promised, name) for name, own in decision["promise"].items()}
        return decision

    def _whole_why(self, row: Row) -> dict[str, Any] | None:
        """With what the scheduler remembers of the decision itself: whom it looked at, and what it expected of each."""
        decision = self._decided(row.request_id)
        return row.why if decision is None else {**(row.why or {}), **why_of(decision, {row.prefill, row.decode})}

    def _why(self, ticket: Ticket, row: Row, now: float) -> dict[str, Any]:
        """What the decision was made of: who could have had it, and what was expected of whom got it."""
        entry = self._scheduler.ledger.entries.get(ticket.request_id)
        chosen = {row.prefill, row.decode}
        candidates = [
            {
                "worker": worker.info.name,
                "role": worker.info.role,
                "chosen": worker.info.name in chosen,
                "state": worker.state,
                "prefill_queue_ms": _ms(worker.prefill_queue_s(now)),
                "decoding": worker.num_decoding,
                "context_tokens": round(worker.num_context_tokens),
                "blocks_free": worker.num_free_blocks,
            }
            for worker in list(self._scheduler.workers.values())[:MAX_CANDIDATES]
        ]
        return {
            "epoch": ticket.epoch,
            "prefill_worker": row.prefill,
            "decode_worker": row.decode,
            "disaggregated": ticket.prefill is not None,
            "queued_ms": _ms(now - row.received_at),
            "predicted_ttft_ms": _ms(ticket.predicted_ttft_s),
            "predicted_prefill_ms": _ms(entry.prefill_s if entry is not None else None),
            "expected_output_tokens": round(entry.expected_output) if entry is not None else None,
            "cached_tokens": entry.cached if entry is not None else 0,
            "candidates": candidates,
        }

    def _watch_workers(self) -> None:
        alive = {w.incarnation: (w.info.name, w.state) for w in self._scheduler.workers.values()}
        if alive == self._workers:
            return
        for incarnation, (name, _) in self._workers.items():
            if incarnation not in alive:
                running = sum(r.state in STATES[:4] and name in (r.prefill, r.decode) for r in self._rows.values())
                goes_on = f"; {running} requests that it held go on elsewhere" if running else ""
                self.event("worker_lost", f"{name} is gone{goes_on}", worker=name)
                self._beats.pop(incarnation, None)
        for incarnation, (name, state) in alive.items():
            before = self._workers.get(incarnation)
            if before is None:
                again = "registered again" if incarnation in self._knew_another else "is serving"
                self.event("worker_up", f"{name} {again}", worker=name)
            elif state == "draining" and before[1] != state:
                self.event("worker_draining", f"{name} drains: it takes no new requests", worker=name)
        self._workers = alive

    def _levels(self) -> dict[str, float]:
        used = total = 0
        for worker in self._scheduler.workers.values():
            total += worker.info.num_blocks
            used += worker.stats.num_used_blocks if worker.stats is not None else 0
        return {
            "queue": float(len(self._scheduler.queue)),
            "running": float(len(self._scheduler.ledger.entries)),
            "kv_used_share": used / total if total else 0.0,
        }

    def _flows(self) -> dict[str, float]:
        totals = self._scheduler.records.totals(list(self._scheduler.workers.values()))
        both = [totals["prefill"], totals["decode"]]
        return {
            "output_tokens": sum(float(t["generation_tokens"]) for t in both),
            "input_tokens": sum(float(t["prompt_tokens"]) for t in both),
            "kv_bytes": float(totals["decode"]["transfer_bytes"]),
        }

    def _pools(self, now: float) -> dict[str, Any]:
        queue, workers, links = self._scheduler.queue, [], []
        for worker in [*self._scheduler.workers.values(), *self._unreplaced()]:
            info, stats = worker.info, worker.stats or WorkerStats()
            rates = self._rates(worker, now)
            workers.append(
                {
                    "name": info.name,
                    "role": info.role,
                    "state": worker.state if worker.is_alive else "lost",
                    "alive": worker.is_alive,
                    "incarnation": info.incarnation,
                    "parallel": f"{info.parallel.tp_size} x {info.parallel.pp_size}",
                    "pids": list(info.rank_pids or (info.pid,)),
                    "host": info.host,
                    "device": info.device,
                    "running": stats.num_running if worker.is_alive else 0,
                    "waiting": stats.num_waiting if worker.is_alive else 0,
                    "blocks_used": stats.num_used_blocks if worker.is_alive else 0,
                    "blocks_total": info.num_blocks,
                    "blocks_cached": stats.num_cached_blocks if worker.is_alive else 0,
                    "tokens_per_s": rates[0],
                    "steps_per_s": rates[1],
                    "last_token_age_s": stats.last_token_age_s if stats.last_token_age_s >= 0 else None,
                    "rss_bytes": stats.rss_bytes if worker.is_alive else 0,
                    "gpu": stats.gpu or None,
                }
            )
            for pair in stats.pairs if worker.is_alive and info.role == "prefill" else ():  # both ends count the same transfers
                if pair.peer in self._scheduler.workers:
                    links.append(
                        {
                            "from": info.name,
                            "to": worker_name(pair.peer),
                            "transport": pair.transport,
                            "bytes_per_s": self._link_rate(worker, pair),
                            "transfers": pair.transfers,
                            "failures": pair.failed,
                        }
                    )
        workers.sort(key=lambda w: (w["role"] != "prefill", w["name"]))
        return {"queue": {"requests": len(queue), "tokens": queue.num_tokens}, "workers": workers, "links": links}

    def _unreplaced(self) -> list[WorkerState]:
        """The last that died of each name that nobody alive bears."""
        names = {w.info.name for w in self._scheduler.workers.values()}
        found = []
        for worker in reversed(self._scheduler.dead.values()):
            if worker.info.name not in names:
                names.add(worker.info.name)
                found.append(worker)
        return found

    def _rates(self, worker: WorkerState, now: float) -> tuple[float, float]:
        """(tokens, steps) a second: sampled by decode, of prompts by prefill."""
        beats = self._beats.get(worker.incarnation)
        if not worker.is_alive or beats is None or len(beats) < 2:
            return 0.0, 0.0
        (since, first), (until, last) = beats[0], beats[-1]
        name = "prompt_tokens" if worker.info.role == "prefill" else "generation_tokens"
        seconds = max(1e-3, until - since)
        tokens, steps = getattr(last, name) - getattr(first, name), last.num_steps - first.num_steps
        return round(max(0.0, tokens / seconds), 2), round(max(0.0, steps / seconds), 2)

    def _link_rate(self, worker: WorkerState, of: PairStats) -> float:
        beats = self._beats.get(worker.incarnation)
        if beats is None or len(beats) < 2:
            return 0.0
        (since, first), (until, last) = beats[0], beats[-1]
        key = (of.peer, of.transport)
        before, after = (sum(p.nbytes for p in stats.pairs if (p.peer, p.transport) == key) for stats in (first, last))
        return round(max(0.0, (after - before) / max(1e-3, until - since)), 1)


def promises_of(config: SchedulerConfig) -> dict[str, Promise]:
    """What is promised without a tenants file: there is one class."""
    return {"standard": Promise(config.ttft_target_s, config.tpot_target_s, config.attainment_target)}


def promises_in(tenants: Tenants) -> dict[str, Promise]:
    """What each class of a tenants file is promised."""
    return {name: Promise(one.ttft_s, one.tpot_s, one.attainment) for name, one in tenants.classes.items()}


def mark_document(mark: Mark) -> dict[str, Any]:
    return {"at_ms": round(1e3 * mark.at_s, 3), "name": mark.name, "worker": mark.worker, "detail": mark.detail}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
