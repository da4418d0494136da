"""One seed: a cluster, requests, clients that may leave, a nemesis, then peace, and what must be true at the end.

`run(seed)` is a pure function: the same seed gives the same history, event by event. `Plan` is what the seed says will
happen; it is made first and printed when a seed fails.
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

from protocol.events import Failed, Finished, Tokens
from protocol.request import Request, SamplingParams
from tests.faults.checks import Checks
from tests.faults.machines import MODEL, Machine, Machines, Shape
from tests.faults.model import BLOCK_SIZE, VOCAB_SIZE, Chains
from tests.faults.stores import Memory
from tests.faults.virtual_loop import Hang, Node, VirtualLoop
from tests.faults.wire import Wires

SETTLE_S = 60.0  # after the nemesis has ended, everything is over within so much
STOP_EVERY = 11  # the detokenizer finds a stop string at tokens divisible by it, for requests that ask for one
STOP = "STOP"


class Wanted(msgspec.Struct):
    """One request and its client."""

    request: Request
    arrives_at: float
    gateway: int
    leaves_after_s: float | None = None
    leaves_after_events: int | None = None
    reads_slowly: bool = False


class Act(msgspec.Struct, frozen=True):
    """What the nemesis does at some time, and for how long where it lasts.

    With a trigger: `at` seconds after the nth such message or store began, to its "sender" or "receiver" (role).
    """

    at: float
    kind: str
    role: str
    index: int
    other_role: str = ""
    other_index: int = 0
    lasts: float = 0.0
    flag: bool = False
    trigger: str = ""
    nth: int = 0


class Plan(msgspec.Struct):
    seed: int
    shape: Shape
    wanted: list[Wanted]
    acts: list[Act]
    weather: dict[str, float]
    damage: dict[str, float]
    peace_at: float
    is_quiet: bool  # nothing worse than clients that leave and a gateway that dies: what is to happen at once can be timed

    def __str__(self) -> str:
        shape = {name: value for name, value in sorted(vars(self.shape).items())}
        lines = [f"seed {self.seed}: {shape}", f"weather {self.weather}, damage {self.damage}, peace at {self.peace_at:.2f}"]
        lines += [f"  {act.at:7.3f} {act}" for act in self.acts]
        for w in self.wanted:
            r, s = w.request, w.request.sampling
            lines.append(
                f"  {w.arrives_at:7.3f} {r.request_id} at gateway {w.gateway}: {r.prompt_len} tokens + {s.max_tokens}, n {s.n}, "
                f"T {s.temperature}, stop {s.stop} {s.stop_token_ids}, leaves {w.leaves_after_s} {w.leaves_after_events}"
            )
        return "\n".join(lines)


def plan(seed: int) -> Plan:
    rng = random.Random(f"plan {seed}")
    shape = Shape()
    shape.num_prefill = rng.choice((1, 1, 2, 2, 3))
    shape.num_decode = rng.choice((1, 2, 2, 3))
    shape.num_gateways = rng.choice((1, 1, 2))
    shape.num_hosts = rng.choice((1, 1, 2, 3))
    shape.prefill_blocks = rng.choice((14, 20, 28, 40))
    shape.decode_blocks = rng.choice((14, 20, 32, 48))
    shape.prefill_step_s = rng.choice((0.01, 0.05, 0.15))
    shape.decode_step_s = rng.choice((0.01, 0.04, 0.1))
    shape.prefill_batched_tokens = rng.choice((6, 16, 64))
    shape.decode_batched_tokens = rng.choice((10, 24, 64))
    shape.threshold = rng.choice((0, 6, 10))
    shape.caching = rng.random() < 0.85
    shape.mean_output = rng.choice((128.0, 128.0, 1.0))
    wanted = [_wanted(rng, shape, i) for i in range(rng.choice((3, 4, 6, 8, 12)))]
    acts = sorted((_act(rng, shape) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6, 8)))), key=lambda act: act.at)
    acts += [_triggered(rng, shape) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
    if rng.random() < 0.15:  # a reservation of which nobody will ever speak again
        acts += [_lost("Prefill", rng.randint(1, 3)), *(_lost("Cancel", nth) for nth in range(1, 5))]
    weather, damage = _weather(rng), _damage(rng)
    is_quiet = rng.random() < 0.08
    if is_quiet:
        weather, damage = {"delay_s": 0.001}, {"delay_s": 0.002}
        acts = [Act(rng.uniform(0.5, 3.0), "crash", "gateway", 0, lasts=2.0, flag=True)] if rng.random() < 0.5 else []
    peace_at = max([4.0, *((3.0 if act.trigger else act.at) + act.lasts for act in acts)])
    return Plan(seed, shape, wanted, acts, weather, damage, peace_at, is_quiet)


def _weather(rng: random.Random) -> dict[str, float]:
    knobs = {
        "late": lambda: rng.choice((0.02, 0.2)),
        "overtake": lambda: rng.choice((0.01, 0.2)),
        "vanish": lambda: rng.choice((0.005, 0.03)),
        "reset": lambda: rng.choice((0.002, 0.01)),
        "twice": lambda: rng.choice((0.02, 0.2)),
    }
    chosen = rng.sample(sorted(knobs), rng.choice((0, 0, 1, 1, 2, 3)))
    weather = {name: knobs[name]() for name in sorted(chosen)}
    weather["delay_s"] = rng.choice((0.0005, 0.002, 0.01))
    if "late" in weather:
        weather["late_s"] = rng.choice((0.05, 0.4, 3.0))
    return weather


def _damage(rng: random.Random) -> dict[str, float]:
    knobs = {"flip": 0.03, "misdirect": 0.05, "repeat": 0.1, "lose": 0.03}
    damage = {name: knobs[name] for name in sorted(rng.sample(sorted(knobs), rng.choice((0, 0, 0, 1, 2))))}
    damage["delay_s"] = rng.choice((0.001, 0.01, 0.03))
    if rng.random() < 0.4:
        damage["slow"], damage["slow_s"] = 0.1, rng.choice((0.3, 2.0))
    return damage


def _wanted(rng: random.Random, shape: Shape, number: int) -> Wanted:
    n = rng.choice((1, 1, 1, 1, 2, 3))
    room = min(shape.decode_blocks, shape.prefill_blocks) * BLOCK_SIZE // (2 * n)
    blocks = rng.randint(0, 8)
    prompt_len = max(1, min(room, blocks * BLOCK_SIZE + rng.choice((-1, 0, 0, 1, 2))))
    common = rng.randrange(3)
    shared = min(prompt_len - 1, rng.choice((0, 0, BLOCK_SIZE, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE, 4 * BLOCK_SIZE + 1)))
    opening = random.Random(f"opening {common}").choices(range(VOCAB_SIZE), k=shared)
    prompt = (*opening, *rng.choices(range(VOCAB_SIZE), k=prompt_len - shared))  # what follows the opening is its nonce
    greedy = rng.random() < 0.5
    sampling = SamplingParams(
        n=n,
        temperature=0.0 if greedy else 1.0,
        seed=rng.randrange(2**32),
        max_tokens=rng.choice((1, 2, 3, 5, 8, 12, 20, 28)),
        stop=(STOP,) if rng.random() < 0.15 else (),
        stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), 12)) if rng.random() < 0.2 else (),
        ignore_eos=True,
    )
    request = Request(
        request_id=f"r{number}",
        model=MODEL,
        prompt_token_ids=prompt,
        sampling=sampling,
        tenant=f"tenant-{common % 2}",
        cache_salt=rng.choice(("", "", "salt")),
        priority=rng.choice((0, 0, 0, 1)),
    )
    wanted = Wanted(request, arrives_at=rng.uniform(0.1, 2.5), gateway=rng.randrange(shape.num_gateways))
    leaving = rng.random()
    if leaving < 0.12:
        wanted.leaves_after_s = rng.uniform(0.0, 2.0)
    elif leaving < 0.2:
        wanted.leaves_after_events = rng.randint(1, 4)
    wanted.reads_slowly = rng.random() < 0.15
    return wanted


def _act(rng: random.Random, shape: Shape) -> Act:
    roles = [("prefill", i) for i in range(shape.num_prefill)] + [("decode", i) for i in range(shape.num_decode)]
    others = [("gateway", i) for i in range(shape.num_gateways)] + [("scheduler", 0)]
    role, index = rng.choice(roles if rng.random() < 0.75 else others)
    kind = rng.choice(("crash", "crash", "stop", "stop", "stop", "cut", "cut", "half-open", "drain", "slow"))
    if kind in ("drain", "slow") and role not in ("prefill", "decode"):
        kind = "half-open"
    other_role, other_index = rng.choice([r for r in roles + others if r != (role, index)])
    lasts = {
        "crash": rng.choice((0.05, 0.5, 2.0, 6.0)),  # until its successor
        "stop": rng.choice((0.1, 0.7, 2.0, 4.5, 9.0)),
        "cut": rng.choice((0.3, 2.0, 5.0, 8.0)),
        "half-open": 0.0,
        "drain": rng.choice((0.5, 2.0)),
        "slow": rng.choice((0.5, 3.0)),
    }[kind]
    return Act(rng.uniform(0.3, 4.0), kind, role, index, other_role, other_index, lasts, rng.random() < 0.5)


TRIGGERS = """Admit Ticket Reserve Grant Prefill Handshake HandshakeAccepted Seal WriterDone StopWriting Cancel TokenFrame
    RequestFailed Outcome Progress WorkerInfo store store store Seal Grant""".split()


def _triggered(rng: random.Random, shape: Shape) -> Act:
    act = _act(rng, shape)
    return msgspec.structs.replace(
        act,
        at=rng.choice((0.0, 0.0, 0.003, 0.02, 0.2)),
        kind="lose" if act.kind in ("drain", "slow", "half-open") else act.kind,
        role=rng.choice(("sender", "receiver")),
        trigger=rng.choice(TRIGGERS),
        nth=rng.choice((1, 1, 2, 3, 5, 8, 13)),
    )


def _lost(message: str, nth: int) -> Act:
    return Act(0.0, "lose", "sender", 0, trigger=message, nth=nth)


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
        while (unsettled := self.checks.unsettled()) and self.loop.now < deadline:
            await asyncio.sleep(0.25)
        for story in unsettled:
            self.report(f"not over {SETTLE_S:g} s after the nemesis ended: {story}")
        await asyncio.sleep(0.5)  # what was said last is still on its way
        self.checks.at_the_end()

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
                    await asyncio.sleep(0.3)
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
            machine.worker.is_draining = True
            later(act.lasts, setattr, machine.worker, "is_draining", False)

    def _cut(self, machine: Machine, other: Machine, act: Act) -> None:
        pairs = [(machine.node, other.node)]
        if act.flag:
            pairs.append((other.node, machine.node))
        elif act.lasts > 4.0:
            pairs = [pair for m in self.machines.now.values() if m is not machine for pair in ((machine.node, m.node), (m.node, machine.node))]
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
        from tests.faults.virtual_loop import CURRENT

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
        **this.checks.numbers,
    }
    return Result(seed, this.problems, this.history, this.loop.now, numbers)
