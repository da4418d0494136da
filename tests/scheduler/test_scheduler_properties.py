"""Whatever happens in whatever order: one decision per attempt, nobody on the dead, sums that balance, first come first."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from configs.schema import SchedulerConfig
from protocol.errors import Overloaded, TandemError, TenantOverLimit
from protocol.kv import KVLayout
from protocol.messages import Admit, GatewayBeat, Outcome, Progress, WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import Ticket
from scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(
    policy="fcfs",
    max_queue_requests=6,
    max_queue_tokens=4000,
    max_queue_bytes=40_000,
    queue_timeout_s=20.0,
    recovery_s=5.0,
    disaggregation_threshold=64,
    tpot_target_s=0.05,
)


class Cluster(RuleBasedStateMachine):
    """Drives a scheduler as gateways and workers would, with late, lost and repeated messages."""

    attempts = Bundle("attempts")  # (request_id, epoch) that got a ticket

    @initialize()
    def begin(self) -> None:
        self.scheduler = Scheduler(CONFIG, draw=lambda: 0.5, max_prefix_hashes=40, gateway_lease_s=6.0)
        self.now = 0.0
        self.num_requests = 0
        self.lives = 0
        self.alive: dict[str, WorkerInfo] = {}
        self.waiting: dict[str, Admit] = {}  # submitted, undecided
        self.arrival: dict[str, int] = {}  # request_id -> order of its first arrival
        self.epochs: dict[str, int] = {}  # the last one decided
        self.decided: set[tuple[str, int]] = set()
        self.running: dict[str, Ticket] = {}

    # ---- what may happen -------------------------------------------------------------------------------------------

    @rule(role=st.sampled_from(["prefill", "decode"]), seqs=st.integers(1, 6), blocks=st.integers(20, 200))
    @precondition(lambda self: len(self.alive) < 6)
    def register(self, role: str, seqs: int, blocks: int) -> None:
        self.lives += 1
        info = WorkerInfo(
            incarnation=f"w{self.lives}",
            role=role,
            name=f"{role}:{self.lives % 3}",
            address=f"w{self.lives}:1",
            model="m",
            layout=KVLayout(2, 2, 16, 16, "float32", "hash"),
            num_blocks=blocks,
            max_model_len=4096,
            max_num_seqs=seqs,
            pid=1,
            host="h",
            device="cpu",
        )
        self.scheduler.register(info, self.now)
        self.alive[info.incarnation] = info

    @rule(
        prompt_len=st.integers(1, 1200),
        max_tokens=st.integers(1, 200),
        choices=st.integers(1, 3),
        tenant=st.sampled_from(["a", "b"]),
        prefix=st.integers(0, 3),
        deadline=st.floats(0.5, 40.0),
    )
    def submit(self, prompt_len: int, max_tokens: int, choices: int, tenant: str, prefix: int, deadline: float) -> None:
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        hashes = tuple(bytes([prefix, i]) * 8 for i in range(prompt_len // 64))
        message = Admit(
            request_id=request_id,
            model="m",
            tenant=tenant,
            slo_class="standard",
            priority=0,
            prompt_len=prompt_len,
            max_tokens=max_tokens,
            num_choices=choices,
            prefix_hashes=hashes,
            deadline_s=deadline,
        )
        self.arrival[request_id] = self.num_requests
        self._submit(message)

    def _submit(self, message: Admit) -> None:
        before = len(self.scheduler.queue)
        refusal = self._refusal(message)
        if refusal is not None:
            assert not message.resumption or refusal.http_status == 400, "what was admitted is not refused for load"
            if isinstance(refusal, Overloaded | TenantOverLimit):
                assert refusal.retry_after is not None
                assert math.isfinite(refusal.retry_after)
                assert refusal.retry_after > 0
            return
        self.waiting[message.request_id] = message
        if not message.resumption and before:
            queue = self.scheduler.queue
            assert len(queue) <= CONFIG.max_queue_requests
            assert queue.num_tokens <= CONFIG.max_queue_tokens
            assert queue.num_bytes <= CONFIG.max_queue_bytes

    def _refusal(self, message: Admit) -> TandemError | None:
        try:
            self.scheduler.submit(message, self.now)
        except TandemError as error:
            return error
        return None

    @rule(target=attempts)
    def decide(self) -> object:
        tickets = []
        order = []
        for decision in self.scheduler.decisions(self.now):
            if isinstance(decision, Ticket):
                request_id, epoch = decision.request_id, decision.epoch
                message = self.waiting.pop(request_id)
                assert decision.decode.incarnation in self.alive, "never on the dead"
                if decision.decode.incarnation in message.excluded:
                    others = [w for w in self.scheduler.workers.values() if w.takes_work and w.info.role == "decode"]
                    assert {w.incarnation for w in others} <= set(message.excluded), "only where there is no other"
                assert decision.decode.role == "decode"
                if decision.prefill is not None:
                    assert decision.prefill.incarnation in self.alive
                    assert decision.prefill.incarnation not in message.excluded
                    assert decision.prefill.role == "prefill"
                assert math.isfinite(decision.predicted_ttft_s)
                assert decision.predicted_ttft_s > 0
                self.running[request_id] = decision
                order.append((not message.resumption, self.arrival[request_id]))
                tickets.append(decision)
            else:
                request_id, failure = decision
                message = self.waiting.pop(request_id)
                epoch = self.scheduler._minted[request_id][0]
                assert failure.retry_after is not None
                assert failure.retry_after > 0
            assert (request_id, epoch) not in self.decided, "one decision per attempt"
            assert epoch > self.epochs.get(request_id, 0)
            self.decided.add((request_id, epoch))
            self.epochs[request_id] = epoch
        assert order == sorted(order), "first come, first served, resumptions before"
        for message in self.waiting.values():
            if order and not message.excluded:
                assert (not message.resumption, self.arrival[message.request_id]) > order[-1], "nobody was overtaken"
        return tickets[-1] if tickets else None

    @rule(ticket=attempts, seconds=st.floats(0.0, 5.0))
    def progress(self, ticket: Ticket | None, seconds: float) -> None:
        if ticket is not None:
            self.scheduler.progress(Progress(ticket.request_id, ticket.epoch, seconds), self.now)

    @rule(ticket=attempts, kind=st.sampled_from(["finished", "failed", "cancelled"]), tokens=st.integers(0, 300))
    def outcome(self, ticket: Ticket | None, kind: str, tokens: int) -> None:
        if ticket is not None:
            self._end(ticket.request_id, ticket.epoch, kind, tokens)

    def _end(self, request_id: str, epoch: int, kind: str = "finished", tokens: int = 10) -> None:
        message = Outcome(
            request_id=request_id,
            epoch=epoch,
            kind=kind,
            tenant="a",
            slo_class="standard",
            prompt_tokens=10,
            cached_tokens=0,
            output_tokens=tokens,
            queue_s=0.1,
            ttft_s=0.2,
            tpot_s=0.03,
            e2e_s=1.0,
        )
        self.scheduler.outcome(message, self.now)
        self.running.pop(request_id, None)
        self.waiting.pop(request_id, None)

    @rule(ticket=consumes(attempts), blame=st.sampled_from(["nobody", "prefill", "decode"]))
    def again(self, ticket: Ticket | None, blame: str) -> None:
        """Its reservation was refused, or a worker failed it."""
        if ticket is None or self.running.get(ticket.request_id) is not ticket:
            return
        del self.running[ticket.request_id]
        blamed = {"nobody": None, "prefill": ticket.prefill, "decode": ticket.decode}[blame]
        self._submit(
            Admit(
                request_id=ticket.request_id,
                model="m",
                tenant="a",
                slo_class="standard",
                priority=0,
                prompt_len=100,
                max_tokens=20,
                excluded=(blamed.incarnation,) if blamed else (),
                resumption=True,
                last_epoch=ticket.epoch,
            )
        )

    @rule(data=st.data())
    @precondition(lambda self: self.waiting)
    def withdraw(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        self.scheduler.withdraw(request_id, self.now)
        del self.waiting[request_id]

    @rule(data=st.data(), forget=st.booleans(), free=st.integers(0, 200), state=st.sampled_from(["ready", "draining"]))
    @precondition(lambda self: self.alive)
    def beat(self, data: st.DataObject, forget: bool, free: int, state: str) -> None:
        incarnation = data.draw(st.sampled_from(sorted(self.alive)))
        mine = [
            (t.request_id, t.epoch)
            for t in self.running.values()
            if incarnation in (t.decode.incarnation, t.prefill.incarnation if t.prefill else "")
        ]
        stale = [(r, self.epochs[r]) for r in self.waiting if self.epochs.get(r)]
        running = () if forget else (*mine, *stale, ("stranger", 2))
        info = self.alive[incarnation]
        stats = WorkerStats(
            num_free_blocks=min(free, info.num_blocks),
            num_used_blocks=info.num_blocks - min(free, info.num_blocks),
            num_steps=int(self.now * 10),
            step_s=self.now,
            generation_tokens=int(self.now * 20),
        )
        assert self.scheduler.heartbeat(WorkerBeat(incarnation, state, stats, running), self.now)

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def die(self, data: st.DataObject) -> None:
        incarnation = data.draw(st.sampled_from(sorted(self.alive)))
        del self.alive[incarnation]
        self._lost(self.scheduler.worker_lost(incarnation, self.now), incarnation)
        assert not self.scheduler.heartbeat(WorkerBeat(incarnation, "ready", WorkerStats()), self.now)

    def _lost(self, attempts: list[tuple[str, int]], incarnation: str) -> None:
        for request_id, epoch in attempts:
            ticket = self.running.get(request_id)
            if ticket is not None and ticket.epoch == epoch:
                assert incarnation in (ticket.decode.incarnation, ticket.prefill.incarnation if ticket.prefill else "")

    @rule(seconds=st.floats(0.01, 4.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.tick(self.now)
        self.alive = {i: w for i, w in self.alive.items() if i in self.scheduler.workers}

    @rule(gateway=st.sampled_from(["g", "h"]), names_all=st.booleans())
    def gateway_beat(self, gateway: str, names_all: bool) -> None:
        mine = [r for r in (*self.running, *self.waiting) if (int(r[1:]) % 2 == 0) == (gateway == "g")]
        named = mine if names_all else mine[::2]
        self.scheduler.gateway_beat(GatewayBeat(gateway, tuple((r, self.epochs.get(r, 0)) for r in named)), self.now)
        self._sync()

    @rule()
    def gateways_fall_silent(self) -> None:
        self.now += 6.5
        self.scheduler.tick(self.now)
        self.alive = {i: w for i, w in self.alive.items() if i in self.scheduler.workers}
        self._sync()

    def _sync(self) -> None:
        """Requests whose gateway dropped them are over."""
        here = self.scheduler.queue
        self.waiting = {r: a for r, a in self.waiting.items() if r in here or r in self.scheduler._pending}
        self.running = {r: t for r, t in self.running.items() if r in self.scheduler.ledger.entries}

    # ---- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def sums_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        self._drop_abandoned()
        pushed_out = self.scheduler._pending.keys()  # made room, and nobody was told yet
        assert set(self.waiting) - pushed_out == {i.admit.request_id for i in self.scheduler.queue}, "nothing is lost in the queue"
        assert len(self.scheduler.index) <= 40
        wakeup = self.scheduler.next_wakeup(self.now)
        assert wakeup is None or wakeup >= self.now
        status = self.scheduler.status(self.now)
        assert status["queue"]["requests"] == len(self.waiting.keys() - pushed_out)

    def _drop_abandoned(self) -> None:
        """A tick may have ended a gateway's lease, and with it what it held."""
        for request_id in [r for r in self.waiting if r not in self.scheduler.queue and r not in self.scheduler._pending]:
            assert request_id in self.scheduler._ended
            del self.waiting[request_id]

    def teardown(self) -> None:
        """When all is over the ledger is empty and every worker's sums are zero."""
        if not hasattr(self, "scheduler"):
            return
        for request_id in [*self.scheduler.ledger.entries, *self.waiting]:
            self._end(request_id, 99)
        assert self.scheduler.ledger.entries == {}
        assert len(self.scheduler.queue) == 0
        assert self.scheduler.queue.num_tokens == self.scheduler.queue.num_bytes == 0
        for worker in self.scheduler.workers.values():
            sums = (worker.num_coming, worker.num_decoding, worker.num_context_tokens, worker.blocks_at_end)
            assert sums == (0, 0, 0.0, 0)
            assert worker.prefill_backlog_s == 0.0
            assert worker.blocks_unseen == 0
            assert not worker.prefills
        self.scheduler.check_integrity()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
