"""A cluster in virtual time: `scheduler.Scheduler` as production drives it, with mock workers behind it. Start at `Simulation.run`.

    arrival ─> submit ─> decisions: Ticket ─> reserve at decode ─> prefill ─> first token: progress ─> KV over links ─> decode
       ^          │ 429, 503                       │ no room                                                         │
       └─ retry ──┘ a client that comes back       └─> submit again, as cluster/gateway.py                outcome <─┘

The scheduler cannot tell it from the real one: registrations, heartbeats (as old as the setup says), progress, outcomes, ticks.
Not simulated: deaths, leases (a prefill may wait as long as its client), several choices, gateways' beats.
"""

from __future__ import annotations

import heapq
import random
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from bench.traces import Arrival
from configs.schema import SchedulerConfig
from configs.tenants import DEFAULT_CLASS, DEFAULT_TENANT, Tenants
from protocol.errors import DeadlineExceeded, Failure, TandemError, from_failure
from protocol.messages import Admit, Outcome, Progress, WorkerBeat, WorkerInfo
from protocol.parallel import Parallel
from protocol.ticket import Ticket
from scheduler.scheduler import Scheduler
from simulation.blocks import Pool
from simulation.costs import Cost
from simulation.decode import DecodeWorker
from simulation.links import Link, send
from simulation.prefill import PrefillWorker
from simulation.requests import Req
from simulation.results import End, Results
from simulation.workers import Worker

MODEL = "simulated"
TICK_S = 0.25  # as cluster/scheduler_service.py
BACK_OFF_S = 0.02  # as cluster/gateway.py after a refused reservation, times the attempts in vain
MAX_ATTEMPTS = 12
MAX_RETRIES = 8
STUCK_S = 7200.0  # without any end: a bug, not patience


class Setup(NamedTuple):
    """Everything about a run but trace and policy. prefill, decode: a cost per worker. max_tokens: what clients allow themselves;
    the scheduler never sees the real output length unless oracle_lengths. stale_s: how old a heartbeat is when it arrives.
    shared_gbps: of a link that all transfers cross. cores: groups of workers by number, prefill first, that share cores.
    """

    prefill: tuple[Cost, ...]
    decode: tuple[Cost, ...]
    tenants: Tenants
    config: SchedulerConfig
    max_tokens: int = 4096
    hash_len: int = 512
    stale_s: float = 0.001
    shared_gbps: float | None = None
    oracle_lengths: bool = False
    retries: bool = False
    seed: int = 0
    enable_prefix_caching: bool = True
    share_cores: bool = False
    warm: bool = True


MakeScheduler = Callable[[Setup, random.Random], Scheduler]


class Simulation:
    """One run. `watch`, if given, is called after every message that the scheduler got."""

    def __init__(
        self,
        setup: Setup,
        arrivals: Iterable[Arrival],
        make: MakeScheduler,
        class_of: Callable[[str], str] = lambda tenant: DEFAULT_CLASS,
        stop_below: float | None = None,
        num_expected: int | None = None,
        watch: Callable[[Simulation], None] | None = None,
    ) -> None:
        self.setup = setup
        self.now = 0.0
        self.rng = random.Random(setup.seed)
        self.scheduler = make(setup, self.rng)
        self.results = Results()
        self.open: dict[str, Req] = {}  # offered and not over
        self._arrivals: Iterator[Arrival] = iter(arrivals)
        self._class_of = class_of
        self._events: list[tuple[float, int, Any, Any]] = []
        self._sequence = 0
        self._num_events = 0
        self._watch = watch
        # Give up early: so many misses that the share of good ones can no longer reach stop_below.
        self._max_missed = None if stop_below is None or num_expected is None else int((1 - stop_below) * num_expected)
        self._shared = (Link(setup.shared_gbps),) if setup.shared_gbps else ()
        self.newly_refused: deque[Req] = deque(maxlen=1000)  # that will come back; whoever watches takes them out
        self.fresh_tokens = 0  # of prompts that were let in when they first asked
        self._last_end_at = 0.0
        self.last_arrival_at = 0.0
        self.prefills: dict[str, PrefillWorker] = {}
        self.decodes: dict[str, DecodeWorker] = {}
        for i, cost in enumerate(setup.prefill):
            worker = PrefillWorker(self, *self._parts(f"prefill:{i}", "prefill", cost))
            self.prefills[worker.incarnation] = worker
        for i, cost in enumerate(setup.decode):
            decode = DecodeWorker(self, *self._parts(f"decode:{i}", "decode", cost))
            self.decodes[decode.incarnation] = decode
        self.workers: list[Worker] = [*self.prefills.values(), *self.decodes.values()]
        if setup.share_cores:
            for prefill, decode in zip(self.prefills.values(), self.decodes.values(), strict=False):
                prefill.neighbours.append(decode)
                decode.neighbours.append(prefill)

    def _parts(self, name: str, role: str, cost: Cost) -> tuple[WorkerInfo, Cost, Pool, Link, int]:
        limits = cost.prefill_limits if role == "prefill" else cost.decode_limits
        info = WorkerInfo(
            incarnation=name,
            role=role,
            name=name,
            address=name,
            model=MODEL,
            layout=cost.layout(),
            num_blocks=cost.num_blocks,
            max_model_len=2**24,
            max_num_seqs=limits.max_num_seqs,
            pid=0,
            host=name,
            device=cost.device,
            parallel=Parallel(cost.gpus, 1),
            max_num_batched_tokens=limits.max_num_batched_tokens,
            price_per_hour=cost.price_per_hour,
        )
        weight = max(1, self.setup.hash_len // cost.kv.block_size)
        pool = Pool(cost.num_blocks, weight, self.setup.enable_prefix_caching)
        return info, cost, pool, Link(cost.link_gbps), self.setup.hash_len

    # ---- time ------------------------------------------------------------------------------------------------------

    def at(self, time: float, act: Any, argument: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, act, argument))

    def run(self) -> Results:
        """Until every offered request has its end."""
        period = self.setup.config.heartbeat_s
        for worker in self.workers:
            self.scheduler.register(worker.info, 0.0)
        if self.setup.warm:
            warm_up(self.scheduler, self.setup, MODEL)
        for i, worker in enumerate(self.workers):
            self.at(period * i / len(self.workers), self._beat, worker)
        self.at(TICK_S, self._tick, None)
        self._offer_next(0)
        events, pop = self._events, heapq.heappop
        while self.open or self._has_more:
            time, _, act, argument = pop(events)
            self.now = time
            self._num_events += 1
            act(argument)
            if self._max_missed is not None and self.results.num_missed > self._max_missed:
                break
        for req in list(self.open.values()):
            self._end(req, End.CUT)
        return self.results

    def _tick(self, _: None) -> None:
        lost = self.scheduler.tick(self.now)
        assert not lost, f"nobody dies here, and yet {lost}"
        self._decide()
        self.at(self.now + TICK_S, self._tick, None)
        assert self.now - self._last_end_at < STUCK_S or not self.open, f"stuck at {self.now}: {len(self.open)} requests are open"

    def _beat(self, worker: Worker) -> None:
        beat = WorkerBeat(worker.incarnation, "ready", worker.stats(self.now), worker.running())  # type: ignore[attr-defined]
        self.at(self.now + self.setup.stale_s, self._hear, beat)
        self.at(self.now + self.setup.config.heartbeat_s, self._beat, worker)

    def _hear(self, beat: WorkerBeat) -> None:
        self.scheduler.heartbeat(beat, self.now)
        self._decide()

    # ---- the door --------------------------------------------------------------------------------------------------

    def _offer_next(self, index: int) -> None:
        arrival = next(self._arrivals, None)
        self._has_more = arrival is not None
        if arrival is not None:
            self.at(arrival.at_s, self._arrive, (index, arrival))

    def _arrive(self, what: tuple[int, Arrival]) -> None:
        index, arrival = what
        self._offer_next(index + 1)
        self.last_arrival_at = self.now
        self.results.num_offered += 1
        req = self._request(index, arrival)
        self.open[req.admit.request_id] = req
        self._submit(req)

    def _request(self, index: int, arrival: Arrival) -> Req:
        setup = self.setup
        tenant = arrival.tenant or DEFAULT_TENANT
        cls = self._class_of(tenant)
        prefix = arrival.prefix[: arrival.prompt_tokens // setup.hash_len] if setup.enable_prefix_caching else ()
        admit = Admit(
            request_id=f"r{index}",
            model=MODEL,
            tenant=tenant,
            slo_class=cls,
            priority=0,
            prompt_len=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens if setup.oracle_lengths else max(setup.max_tokens, arrival.output_tokens),
            prefix_hashes=tuple(map(_as_hash, prefix)),
            deadline_s=setup.config.queue_timeout_s,
        )
        req = Req(index, self.now, tenant, cls, arrival.prompt_tokens, arrival.output_tokens, prefix, admit)
        promise = setup.tenants.slo_class(cls)
        req.ttft_slo_s, req.tpot_slo_s, req.band = promise.ttft_s, promise.tpot_s, promise.band
        return req

    def _submit(self, req: Req) -> None:
        try:
            self.scheduler.submit(req.admit, self.now)
        except TandemError as error:
            self._refused(req, error)
        else:
            self.fresh_tokens += req.prompt if req.num_attempts + req.num_retries == 0 else 0
        self._decide()

    def _refused(self, req: Req, error: TandemError) -> None:
        self.results.rejections[self.scheduler.records.last_rejection or type(error).__name__] += 1
        wait = error.retry_after
        if req.was_refused_at >= 0:
            self.results.retries.append((req.was_refused_at, req.waited, False))
        if self.setup.retries and wait is not None and req.num_retries < MAX_RETRIES:
            req.num_retries += 1
            req.was_refused_at, req.waited = self.now, wait
            if self._watch is not None:
                self.newly_refused.append(req)
            self.at(self.now + wait, self._come_back, req)
            return
        self._end(req, End.TIMED_OUT if isinstance(error, DeadlineExceeded) else End.REFUSED)

    def _come_back(self, req: Req) -> None:
        """A client that does what it was told; its promise counts from now, as any new request's."""
        req.arrived_at = self.now
        req.admit = msgspec.structs.replace(
            req.admit, request_id=f"r{req.index}-{req.num_retries}", is_retry=True, last_epoch=0, resumption=False
        )
        req.epoch = req.num_attempts = 0
        self.open.pop(f"r{req.index}-{req.num_retries - 1}" if req.num_retries > 1 else f"r{req.index}")
        self.open[req.admit.request_id] = req
        before = len(self.results.retries)
        self._submit(req)
        if len(self.results.retries) == before:
            self.results.retries.append((req.was_refused_at, req.waited, True))
            req.was_refused_at = -1.0

    def _decide(self) -> None:
        for decision in self.scheduler.decisions(self.now):
            if isinstance(decision, Ticket):
                self._placed(decision)
            else:
                self._not_placed(*decision)
        if self._watch is not None:
            self._watch(self)

    def _not_placed(self, request_id: str, failure: Failure) -> None:
        req = self.open.get(request_id)
        if req is not None:
            self._refused(req, from_failure(failure))

    # ---- an attempt ------------------------------------------------------------------------------------------------

    def _placed(self, ticket: Ticket) -> None:
        req = self.open[ticket.request_id]
        req.epoch, req.goes_first = ticket.epoch, ticket.goes_first
        req.num_attempts += 1
        if req.placed_at < 0 or req.num_attempts == 1:
            req.placed_at = self.now
            req.predicted_s = ticket.predicted_ttft_s
        req.prefill = self.prefills[ticket.prefill.incarnation] if ticket.prefill is not None else None
        req.decode = self.decodes[ticket.decode.incarnation]
        if ticket.max_tokens is not None:
            req.output = min(req.output, max(1, ticket.max_tokens))
        delay = req.decode.cost.overhead_s
        if delay > 0:
            self.at(self.now + delay, self._reserve, req)
        else:
            self._reserve(req)

    def _reserve(self, req: Req) -> None:
        assert req.decode is not None
        req.begun_at = -1.0
        if req.decode.reserve(req, self.now):
            if req.prefill is not None:
                req.prefill.accept(req, self.now)
            return
        # decode/worker.py says ReservationRefused, and the gateway asks the scheduler again after a moment.
        if req.num_attempts >= MAX_ATTEMPTS:
            self.results.rejections["no_room"] += 1
            self._tell_outcome(req, "failed")
            self._end(req, End.FAILED)
            return
        self.at(self.now + BACK_OFF_S * req.num_attempts, self._again, req)

    def _again(self, req: Req) -> None:
        req.admit = msgspec.structs.replace(req.admit, resumption=True, last_epoch=req.epoch)
        self._submit(req)

    def first_token(self, req: Req) -> None:
        req.first_at = self.now
        self.scheduler.progress(Progress(req.admit.request_id, req.epoch, self.now - req.placed_at), self.now)
        self._decide()

    def prefilled(self, req: Req) -> None:
        prefill, decode = req.prefill, req.decode
        assert prefill is not None
        assert decode is not None
        if req.output == 1:
            prefill.forget(req, self.now)
            decode.forget(req, self.now)
            self.finished(req)
            return
        nbytes = decode.num_missing_tokens(req) * decode.cost.kv.token_nbytes
        path = (prefill.link, *self._shared, decode.link)
        landed = send(path, nbytes, req.begun_at, self.now, decode.cost.transfer_s, decode.cost.kv.num_layers)
        prefill.transfers += 1
        prefill.transfer_bytes += nbytes
        prefill.transfer_s += landed - self.now
        self.at(landed, self._landed, req)

    def _landed(self, req: Req) -> None:
        assert req.prefill is not None
        assert req.decode is not None
        req.prefill.forget(req, self.now)
        req.decode.join(req, self.now)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finished(self, req: Req) -> None:
        self._end(req, End.FINISHED)  # before the scheduler places others with what came free
        self._tell_outcome(req, "finished")

    def _tell_outcome(self, req: Req, kind: str) -> None:
        has_first = req.first_at >= 0
        tpot_s = (self.now - req.first_at) / (req.output - 1) if has_first and req.output > 1 else 0.0
        outcome = Outcome(
            request_id=req.admit.request_id,
            epoch=req.epoch,
            kind=kind,
            tenant=req.tenant,
            slo_class=req.cls,
            prompt_tokens=req.prompt,
            cached_tokens=req.cached,
            output_tokens=req.generated,
            queue_s=max(0.0, req.placed_at - req.arrived_at),
            ttft_s=req.first_at - req.arrived_at if has_first else 0.0,
            tpot_s=tpot_s,
            e2e_s=self.now - req.arrived_at,
        )
        self.scheduler.outcome(outcome, self.now)
        self._decide()

    def _end(self, req: Req, end: End) -> None:
        del self.open[req.admit.request_id]
        self._last_end_at = self.now
        after = req.decode.cost.return_s if req.decode is not None else 0.0
        has_first = req.first_at >= 0
        ttft_s = req.first_at + after - req.arrived_at if has_first else -1.0
        is_finished = end is End.FINISHED
        tpot_s = (self.now - req.first_at) / (req.output - 1) if is_finished and req.output > 1 else -1.0
        is_good = is_finished and ttft_s <= req.ttft_slo_s and tpot_s <= req.tpot_slo_s
        self.results.add(
            req.index, end, req.tenant, req.cls, req.offered_at, ttft_s, tpot_s, self.now + after - req.arrived_at, is_good,
            req.prefill_tokens, req.recomputed,
        )  # fmt: skip

    # ---- figures ---------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Call it after `run`."""
        duration = self.last_arrival_at
        found = self.results.summary(duration)
        end = max(self.now, 1e-9)
        found["duration_s"] = duration
        found["simulated_s"] = self.now
        found["events"] = self._num_events
        found["utilization"] = {
            role: sum(w._busy_s(self.now) for w in pool) / (end * len(pool)) if pool else None
            for role, pool in (("prefill", list(self.prefills.values())), ("decode", list(self.decodes.values())))
        }
        queries = sum(w.prefix_queries for w in self.prefills.values())
        found["prefix_hit_rate"] = sum(w.prefix_hits for w in self.prefills.values()) / queries if queries else 0.0
        found["preemptions"] = sum(w.num_preemptions for w in self.workers)
        found["placed_local"] = self.scheduler.records.counters["placed_local"]
        if self.setup.retries:
            told = self.results.retries
            found["retries"] = {
                "came_back": len(told),
                "admitted_at_once": sum(ok for _, _, ok in told) / len(told) if told else None,
                "median_wait_s": sorted(wait for _, wait, _ in told)[len(told) // 2] if told else None,
            }
        return found

    def check_integrity(self) -> None:
        """Nothing is left behind. Call it after a run that was not cut short."""
        assert not self.open
        self.scheduler.check_integrity()
        assert len(self.results.end) == self.results.num_offered, "every offered request has one end"
        assert len(set(self.results.index)) == self.results.num_offered, "and only one"
        for worker in self.workers:
            worker.pool.check_integrity()
            assert worker.pool.is_idle, f"{worker.incarnation} still holds {worker.pool.used} blocks"


_pack = struct.Struct(">q").pack


def _as_hash(block: int) -> bytes:
    return _pack(block)


def warm_up(scheduler: Scheduler, setup: Setup, model: str) -> None:
    """Cost models as they are after some traffic: every policy begins with the same, so that a run's first seconds measure policies
    and not how quickly the fits find their order of magnitude."""
    for cost in {c.name: c for c in setup.prefill}.values():
        fit = scheduler.costs.of(model, cost.device, "prefill", Parallel(cost.gpus, 1))
        layers = cost.kv.num_layers
        for n in (128, 512, 1024, 2048, 4096, 8192, 1024, 512):
            for cached in (0, n // 2):
                fit.observe_prefill(n, cached, cost.prefill_s(n, cached))
                nbytes = n * cost.kv.token_nbytes
                fit.observe_transfer(nbytes, cost.transfer_s + nbytes * 8e-9 / cost.link_gbps / layers)
    for cost in {c.name: c for c in setup.decode}.values():
        fit = scheduler.costs.of(model, cost.device, "decode", Parallel(cost.gpus, 1))
        for batch in (1, 4, 16, 64, 128, cost.decode_limits.max_num_seqs):
            for context in (256, 1024, 4096):
                if batch * context <= cost.num_blocks * cost.kv.block_size:
                    fit.observe_decode(batch, batch * context, cost.decode_s(batch, batch * context))
        for n in (128, 512, 1024, 2048, 4096, 8192):
            fit.observe_prefill(n, 0, cost.prefill_s(n))
