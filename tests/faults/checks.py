"""What must be true: at every event, and when everything is over. Letters S1-S8 are the safety properties of a history.

S1 one terminal event per request whose client stayed; S2 token indexes without gap or repeat; S3 tokens and text equal the
oracle's; S4 nobody reads another prompt's KV (model.py); S5 every block comes back; S6 gauges return to zero; S7 nothing of
an older epoch is applied; S8 usage is what was delivered, told once. And while workers live: success within a bounded time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.walk import Walk
from decode.handover import Handover
from engine.prefix import full_block_hashes
from engine.sequence import Sequence
from kvtransfer.handoff import Inbound
from protocol.events import Failed, Finished, Tokens
from protocol.ticket import is_authentic
from tests.faults.machines import SECRET, Machine, Machines
from tests.faults.model import BLOCK_SIZE, LAYOUT, Chains, block_cells
from tests.faults.plans import STOP_EVERY, Plan

if TYPE_CHECKING:
    from tests.faults.scenario import Told


class Checks:
    def __init__(self, plan: Plan, machines: Machines, told: list[Told], chains: Chains, report: Callable[[str], None]) -> None:
        self.numbers: Counter[str] = Counter()
        self._plan = plan
        self._machines = machines
        self._told = told
        self._by_id = {t.wanted.request.request_id: t for t in told}
        self._chains = chains
        self._report = report
        self._answers: dict[tuple[str, int], list[int]] = {}
        self._delivered: dict[tuple[str, int], list[int]] = {}

    # ---- at every event --------------------------------------------------------------------------------------------

    def event(self, told: Told, event: Any) -> None:
        request_id = told.wanted.request.request_id
        if any(isinstance(e, (Finished, Failed)) for e in told.events[:-1]):
            self._report(f"S1 {request_id}: {event} after the terminal event")
        if isinstance(event, Tokens):
            self._tokens(told, event)
        elif isinstance(event, Finished):
            self._finished(told, event)

    def _tokens(self, told: Told, event: Tokens) -> None:
        key = (told.wanted.request.request_id, event.choice)
        answer, delivered = self._answer(told, event.choice), self._delivered.setdefault(key, [])
        if event.index != len(delivered):
            self._report(f"S2 {key}: index {event.index} after {len(delivered)} tokens")
        delivered += event.token_ids
        if delivered != answer[: len(delivered)]:
            self._report(f"S3 {key}: {delivered}, the oracle says {answer}")
        text = "".join(f"{t} " for t in event.token_ids if not (told.wanted.request.sampling.stop and t % STOP_EVERY == 0))
        if event.text != text:
            self._report(f"S3 {key}: text {event.text!r}, the oracle says {text!r}")

    def _finished(self, told: Told, event: Finished) -> None:
        request = told.wanted.request
        total = 0
        for choice in range(request.sampling.n):
            delivered, answer = self._delivered.get((request.request_id, choice), []), self._answer(told, choice)
            total += len(delivered)
            if delivered != answer:
                self._report(f"S3 {request.request_id}[{choice}]: finished with {delivered}, the oracle says {answer}")
        if event.usage.completion_tokens != total or event.usage.prompt_tokens != request.prompt_len:
            self._report(f"S8 {request.request_id}: {event.usage}, but {total} tokens were delivered")

    def _answer(self, told: Told, choice: int) -> list[int]:
        request = told.wanted.request
        key = (request.request_id, choice)
        answer = self._answers.get(key)
        if answer is None:
            sampling = request.sampling
            answer = self._chains.answer(*key[:1], request.prompt_token_ids, choice, sampling, sampling.max_tokens or 1)
            for place, token in enumerate(answer):
                if token in (sampling.stop_token_ids or ()) or (sampling.stop and token % STOP_EVERY == 0):
                    answer = answer[: place + 1]
                    break
            self._answers[key] = answer
        return answer

    def step(self, request_id: str) -> None:
        """Nobody computes for long for a client that has left, or whose gateway is dead."""
        told = self._by_id.get(request_id)
        if told is None or not self._plan.is_quiet or told.gateway is None:
            return
        shape, node = self._plan.shape, told.gateway.node
        left_at = told.left_at if told.has_left else node.died_at if node.is_dead else None
        allowed = 0.2 + 3 * max(shape.prefill_step_s, shape.decode_step_s)
        if left_at is not None and self._machines.loop.now > left_at + allowed:
            self._report(f"S6 {request_id} is still computed {self._machines.loop.now - left_at:.2f} s after its client was gone")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """S7: spies where something of an epoch is applied."""
        absorb, verify, report = Walk.absorb, Handover.verify, self._report
        check_landed, give_back = Inbound.check_landed, Handover._give_back

        def spied_absorb(walk: Walk, update: Any, now: float) -> Any:
            if update.epoch != walk.epoch:
                report(f"S7 {walk.request.request_id}: tokens of epoch {update.epoch} applied in epoch {walk.epoch}")
            return absorb(walk, update, now)

        async def spied_verify(handover: Handover, manifest: Any) -> Any:
            job = await verify(handover, manifest)
            newest = handover._inbound._epochs.get(manifest.request_id, (0.0, manifest.epoch))[1]
            if job.is_dropped or job.epoch != manifest.epoch or newest != manifest.epoch:
                report(f"S7 {manifest.grant_id} sealed, the newest epoch is {newest}, dropped: {job.is_dropped}")
            return job

        def spied_landed(inbound: Inbound, landed: Any, now: float) -> Any:
            grant = check_landed(inbound, landed, now)
            self.numbers["landed" if grant is not None else "landed_too_late"] += 1
            if not is_authentic(landed, SECRET):
                report(f"R1 a forged paper about {landed.grant_id} was not refused")
            return grant

        def spied_give_back(handover: Handover, grant_id: str, effect: Any, hashes: Any) -> None:
            self._kept(handover, grant_id, hashes)
            give_back(handover, grant_id, effect, hashes)

        with contextlib.ExitStack() as stack:
            for owner, name, spy in (
                (Walk, "absorb", spied_absorb),
                (Handover, "verify", spied_verify),
                (Handover, "_give_back", spied_give_back),
                (Inbound, "check_landed", spied_landed),
            ):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, spy)
            yield

    def _kept(self, handover: Handover, grant_id: str, hashes: Any) -> None:
        """R4: what goes to the prefix cache unsealed holds exactly the KV that its hash stands for."""
        (machine,) = (m for m in self._machines.all if m.worker is not None and getattr(m.worker, "handover", None) is handover)
        assert machine.kv is not None
        told = self._by_id[grant_id.split("/")[1]]
        request = told.wanted.request
        known = full_block_hashes(Sequence(request, 0, output_token_ids=self._answer(told, 0)), LAYOUT)
        cells = self._chains.cells((f"kept of {request.request_id}", 0), [*request.prompt_token_ids, *self._answer(told, 0)])
        for block, block_hash in zip(handover._held[grant_id], hashes, strict=False):
            self.numbers["kept_blocks"] += 1
            first = known.index(block_hash) * BLOCK_SIZE
            if not np.array_equal(block_cells(machine.kv, block), cells[first : first + BLOCK_SIZE]):
                self._report(f"R4 {machine}: block {block} was kept for {grant_id} and is not what its hash says")

    def meanwhile(self) -> None:
        """S5: what has to hold also in the middle of things."""
        for machine in self._machines.of("prefill", "decode"):
            if machine.worker is not None:
                self._whole(machine, machine.worker.pool.check_integrity)
            if machine.role == "decode" and machine.worker is not None:
                self._whole(machine, machine.worker.handover._inbound.check_integrity)
        for machine in self._machines.of("scheduler"):
            if machine.service is not None:
                self._whole(machine, machine.service.scheduler.check_integrity)

    # ---- when everything is over -----------------------------------------------------------------------------------

    def unsettled(self) -> list[str]:
        """What still goes on, or is held by somebody; empty: nothing."""
        stories = []
        for told in self._told:
            gateway_died = told.gateway is not None and told.gateway.node.is_dead
            if not told.is_over and not gateway_died:
                stories.append(f"{told.wanted.request.request_id} is not over")
        for machine in self._machines.of("gateway"):
            if machine.gateway is None:
                stories.append(f"{machine} has not started")
            elif machine.gateway.num_in_flight:
                stories.append(f"{machine}: {machine.gateway.num_in_flight} in flight")
        for machine in self._machines.of("prefill", "decode"):
            stories += self._held(machine)
        (scheduler,) = self._machines.of("scheduler")
        if scheduler.service is None:
            return [*stories, f"{scheduler} has not started"]
        entries, queue = scheduler.service.scheduler.ledger.entries, scheduler.service.scheduler.queue
        if entries or len(queue) or scheduler.service._waiting:
            stories.append(f"{scheduler}: ledger {list(entries)}, queue {len(queue)}, waiting {list(scheduler.service._waiting)}")
        return stories

    def _held(self, machine: Machine) -> list[str]:
        worker = machine.worker
        if worker is None:
            return [f"{machine} has not started"]
        pool = worker.pool
        stories = [f"{machine} drains"] if machine.drains is not None else []
        if not worker.is_idle or pool.num_used:
            stories.append(f"{machine}: {worker.in_flight()}, {pool.num_used} blocks used, {pool.num_quarantined} in quarantine")
        if machine.role == "prefill":
            alive = {m.node.name for m in self._machines.of("decode")}
            mine = worker.handover
            owed = [incarnation for incarnation in mine.links._owed if incarnation in alive]
            if owed or len(mine.outbound) or mine._jobs:
                stories.append(f"{machine}: owes {owed}, outbound {list(mine.outbound._held)}, grants {list(mine._jobs)}")
        elif len(worker.handover._inbound) or worker.handover.num_open or worker.handover._held:
            stories.append(f"{machine}: inbound {list(worker.handover._inbound._held)}, held {worker.handover._held}")
        return stories

    def at_the_end(self) -> None:
        for told in self._told:
            self._ended(told)
        for machine in self._machines.of("prefill", "decode"):
            if machine.worker is not None:
                self._whole(machine, machine.worker.check_integrity)
        self.meanwhile()
        self._outcomes()
        self._counts()

    def _counts(self) -> None:
        self.numbers["drained"] = self._machines.num_drained
        for machine in self._machines.all:
            if machine.role == "prefill" and machine.worker is not None:
                self.numbers["fallbacks"] += machine.worker.handover.links.num_fallbacks

    def _outcomes(self) -> None:
        """S8: the scheduler hears of each end once; also when much was lost, never twice."""
        outcomes = self._machines.outcomes.told
        self.numbers["outcomes"] = len(outcomes)
        times = Counter(outcome.request_id for outcome in outcomes)
        if not self._plan.weather.get("twice") and max(times.values(), default=0) > 1:
            self._report(f"S8 outcomes told more than once: {times}")
        for told in self._told if self._plan.is_quiet else ():
            request_id = told.wanted.request.request_id
            if told.gateway is None or told.gateway.node.is_dead:
                continue
            delivered = sum(len(e.token_ids) for e in told.events if isinstance(e, Tokens))
            said = [(o.kind, o.output_tokens) for o in outcomes if o.request_id == request_id]
            kinds = ("finished", "cancelled") if told.has_left else ("finished",)
            if len(said) != 1 or said[0][0] not in kinds or said[0][1] < delivered:
                self._report(f"S8 {request_id}: {delivered} tokens were delivered, the scheduler was told {said}")

    def _whole(self, machine: Machine, check: Callable[[], None]) -> None:
        try:
            check()
        except AssertionError as error:
            self._report(f"S5 {machine}: {error}")

    def _ended(self, told: Told) -> None:
        request_id = told.wanted.request.request_id
        gateway_died = told.gateway is None or told.gateway.node.is_dead
        terminal = [e for e in told.events if isinstance(e, (Finished, Failed))]
        if terminal:
            self.numbers["finished" if isinstance(terminal[0], Finished) else "failed"] += 1
        if told.has_left or gateway_died:
            self.numbers["left" if told.has_left else "gateway_died"] += 1
            return
        if len(terminal) != 1:
            self._report(f"S1 {request_id}: {len(terminal)} terminal events")
        elif isinstance(terminal[0], Failed):
            self._report(f"liveness: {request_id} failed: {terminal[0].failure}")
        else:
            drains = {act.role for act in self._plan.acts if act.kind == "drain"}  # who prefilled and goes at once is missed
            if self._plan.is_quiet and "prefill" not in drains and terminal[0].usage.num_resumptions:
                self._report(f"{request_id} was resumed, and nothing worse has happened than a drain with much time")
            self.numbers["resumptions"] += terminal[0].usage.num_resumptions
            self.numbers["cached_tokens"] += terminal[0].usage.cached_tokens
