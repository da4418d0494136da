"""One seed's plan, carried out: a cluster, clients, a nemesis, then peace, and what must be true at the end.

`run(seed)` is a pure function: the same seed gives the same history, event by event.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from protocol.events import Failed, Finished
from protocol.request import Request
from tests.faults.checks import Checks
from tests.faults.machines import Machine, Machines
from tests.faults.model import Chains
from tests.faults.plans import STOP, STOP_EVERY, Act, Plan, Wanted, plan
from tests.faults.stores import Memory
from tests.faults.virtual_loop import CURRENT, Hang, Node, VirtualLoop
from tests.faults.wire import Wires

SETTLE_S = 60.0  # after the nemesis has ended, everything is over within so much


class StopsAt:
    """A detokenizer whose text names each token, and which finds a stop string if the request has one."""

    def __init__(self, request: Request) -> None:
        self._stops = bool(request.sampling.stop)

    def feed(self, token_ids: list[int]) -> tuple[str, str | None]:
        text = ""
        for token in token_ids:
            if self._stops and token % STOP_EVERY == 0:
                return text, STOP
            text += f"{token} "
        return text, None

    def flush(self) -> str:
        return ""


class Told:
    """What one client was told."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.events: list[Any] = []
        self.has_left = False
        self.left_at = 0.0
        self.is_over = False
        self.gateway: Machine | None = None
        self.refused_connection = False


class Result(msgspec.Struct):
    seed: int
    problems: list[str]
    history: list[str]
    virtual_s: float
    numbers: dict[str, int]


class Run:
    """The parts of one run."""

    def __init__(self, the_plan: Plan, keep_history: bool) -> None:
        self.plan = the_plan
        self.history: list[str] = []
        self.problems: list[str] = []
        self.loop = VirtualLoop(max_time=the_plan.peace_at + SETTLE_S + 5.0)
        seed = the_plan.seed
        history = self.note if keep_history else None
        self.wires = Wires(self.loop, random.Random(f"wires {seed}"), history)
        self.memory = Memory(self.wires, random.Random(f"stores {seed}"), self.report)
        self.chains = Chains()
        self._seen: Counter[str] = Counter()
        self._is_peace = False
        self.machines = Machines(
            self.loop,
            self.wires,
            self.memory,
            random.Random(f"machines {seed}"),
            the_plan.shape,
            self.chains,
            StopsAt,
            self.report,
        )
        self.told = [Told(w) for w in the_plan.wanted]
        self.checks = Checks(the_plan, self.machines, self.told, self.chains, self.report)
        self.machines.on_step = self.checks.step
        self.machines.on_gone = lambda machine: self.loop.call_later(1.0, self._reboot, machine)
        self.wires.forge = self.machines.forged

    def note(self, node: Node | None, text: str) -> None:
        self.history.append(f"{self.loop.now:9.4f} {node.name if node else 'nemesis':22} {text}")

    def report(self, story: str) -> None:
        self.note(None, f"PROBLEM {story}")
        self.problems.append(f"{self.loop.now:.4f} s: {story}")

    async def main(self) -> None:
        rng = random.Random(f"main {self.plan.seed}")
        for name, value in self.plan.weather.items():
            setattr(self.wires.weather, name, value)
        for name, value in self.plan.damage.items():
            setattr(self.memory.damage, name, value)
        self.machines.start()
        for told in self.told:
            self.loop.call_at(told.wanted.arrives_at, self._arrive, told)
        for act in self.plan.acts:
            if not act.trigger:
                self.loop.call_at(act.at, self._act, act)
        if any(act.trigger for act in self.plan.acts):
            self.wires.on_event = self._watch
        while self.loop.now < self.plan.peace_at:
            await asyncio.sleep(min(0.25, self.plan.peace_at + 0.001 - self.loop.now))
            self.checks.meanwhile()
        self._make_peace(rng)
        deadline = self.loop.now + SETTLE_S
        await self._settle(deadline)
        await asyncio.sleep(0.5)  # what was said last is still on its way
        for story in await self._settle(deadline):
            self.report(f"not over {SETTLE_S:g} s after the nemesis ended: {story}")
        self.checks.at_the_end()

    async def _settle(self, deadline: float) -> list[str]:
        while (unsettled := self.checks.unsettled()) and self.loop.now < deadline:
            await asyncio.sleep(0.25)
        return unsettled

    # ---- clients ---------------------------------------------------------------------------------------------------

    def _arrive(self, told: Told) -> None:
        machine = self.machines.now["gateway", told.wanted.gateway]
        if machine.node.is_dead or machine.gateway is None:
            told.refused_connection = told.is_over = True
            return
        told.gateway = machine
        reading = machine.node.task(self._read(told, machine))

        def over(_: object) -> None:  # also when it was cancelled before its first step
            told.is_over = True

        reading.add_done_callback(over)
        if told.wanted.leaves_after_s is not None:

            def leave() -> None:
                if not told.is_over:
                    told.has_left, told.left_at = True, self.loop.now
                    reading.cancel()

            self.loop.call_later(told.wanted.leaves_after_s, leave)

    async def _read(self, told: Told, machine: Machine) -> None:
        wanted = told.wanted
        assert machine.gateway is not None
        events = machine.gateway.generate(wanted.request)
        try:
            async for event in events:
                self.wires.log(machine.node, f"client of {wanted.request.request_id}: {event}")
                told.events.append(event)
                self.checks.event(told, event)
                if isinstance(event, (Finished, Failed)):
                    continue
                if wanted.leaves_after_events is not None and len(told.events) >= wanted.leaves_after_events:
                    told.has_left, told.left_at = True, self.loop.now
                    break
                if wanted.reads_slowly:
                    await asyncio.sleep(0.1)
        finally:
            await events.aclose()

    # ---- the nemesis -----------------------------------------------------------------------------------------------

    def _watch(self, name: str, sender: Node, receiver: Node) -> bool:
        """-> True: this message is to be lost."""
        self._seen[name] += 1
        is_lost = False
        for act in self.plan.acts:
            if act.trigger == name and act.nth == self._seen[name]:
                if act.kind == "lose":
                    is_lost = True
                    continue
                node, other = (sender, receiver) if act.role == "sender" else (receiver, sender)
                (machine,) = (m for m in self.machines.all if m.node is node)
                (peer,) = (m for m in self.machines.all if m.node is other)
                self.wires.later(act.at, self._act, msgspec.structs.replace(
                    act, role=machine.role, index=machine.index, other_role=peer.role, other_index=peer.index
                ))  # fmt: skip
        return is_lost

    def _act(self, act: Act) -> None:
        machine = self.machines.now[act.role, act.index]
        later = self.loop.call_later
        if self._is_peace or machine.node.is_dead or (not machine.node.is_up and act.kind in ("stop", "half-open")):
            return
        self.wires.log(None, f"{act.kind} {machine} for {act.lasts:g} s {act.other_role} {act.flag}")
        if act.kind == "crash":
            self.machines.crash(machine, is_told=act.flag)
            later(act.lasts, self._reboot, machine)
        elif act.kind == "stop":
            self.machines.stop(machine)
            later(act.lasts, self._resume, machine)
        elif act.kind == "cut":
            self._cut(machine, self.machines.now[act.other_role, act.other_index], act)
        elif act.kind == "half-open":
            sides = [side for side in self.wires.sides if side.node is machine.node and side.other.node.is_up]
            if sides:
                self.wires.half_open(sides[int(act.at * 1e6) % len(sides)])
        elif act.kind == "slow":
            machine.slowness = 20.0
            later(act.lasts, setattr, machine, "slowness", 1.0)
        elif act.kind == "drain" and machine.is_worker:
            self.machines.drain(machine, act.lasts)

    def _cut(self, machine: Machine, other: Machine, act: Act) -> None:
        pairs = [(machine.node, other.node)]
        if act.flag:
            pairs.append((other.node, machine.node))
        elif act.lasts > 4.0:
            pairs = [
                pair
                for m in self.machines.now.values()
                if m is not machine
                for pair in ((machine.node, m.node), (m.node, machine.node))
            ]
        for pair in pairs:
            self.wires.cut(*pair)
            self.loop.call_later(act.lasts, self.wires.heal, *pair)

    def _reboot(self, dead: Machine) -> None:
        if self.machines.now[dead.role, dead.index] is dead:
            self.wires.log(None, f"successor of {dead}")
            self.machines.boot(dead.role, dead.index)

    def _resume(self, machine: Machine) -> None:
        if not machine.node.is_up and not machine.node.is_dead:
            self.wires.log(None, f"continue {machine}")
            self.machines.resume(machine)

    def _make_peace(self, rng: random.Random) -> None:
        self.wires.log(None, "peace")
        self.wires.on_event = None
        self._is_peace = True
        for machine in self.machines.all:
            machine.slowness = 1.0
        self.wires.weather.clear()
        self.memory.damage.clear()
        for pair in list(self.wires.cuts):
            self.wires.heal(*pair)
        for machine in list(self.machines.now.values()):
            self._resume(machine)
            if machine.node.is_dead:
                self._reboot(machine)


class _Loud(logging.Handler):
    """What the product logs as an error is one here."""

    def __init__(self, run: Run) -> None:
        super().__init__(logging.ERROR)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._run.report(f"logged by {record.name}: {record.getMessage()} {error!r}")


class _Quiet(logging.Handler):
    def __init__(self, run: Run) -> None:
        super().__init__(logging.INFO)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        self._run.note(CURRENT.get(), f"log: {record.getMessage()}")


LOGGERS = ("cluster", "decode", "prefill", "kvtransfer", "scheduler", "engine")


def run(seed: int, *, keep_history: bool = False, change: Callable[[Run], None] | None = None) -> Result:
    """change: applied to the parts before the start, for mutants."""
    the_plan = plan(seed)
    this = Run(the_plan, keep_history)
    if change is not None:
        change(this)
    was_collecting = gc.isenabled()
    gc.disable()  # collecting a dead node's coroutines would run their `finally` blocks
    handlers: list[logging.Handler] = [_Loud(this), _Quiet(this)] if keep_history else [_Loud(this)]
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.setLevel(logging.INFO if keep_history else logging.ERROR)
        for handler in handlers:
            logger.addHandler(handler)
    try:
        with this.machines.installed(), this.checks.installed():
            try:
                this.loop.run(this.main())
            except Hang as hang:
                this.report(str(hang))
            for story in this.loop.errors:
                this.report(story)
            this.loop.close()
    finally:
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)
        this.machines.close()
        if was_collecting:
            gc.enable()
    numbers = {
        "handles": this.loop.num_handled,
        "messages": this.wires.num_messages,
        "stores": this.memory.num_stores,
        "late_stores": this.memory.num_late,
        "refused_stores": this.memory.num_refused,
        "damaged_stores": this.memory.num_damaged,
        "forged": this.wires.num_forged,
        **this.checks.numbers,
    }
    return Result(seed, this.problems, this.history, this.loop.now, numbers)
