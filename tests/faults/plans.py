"""What one seed says will happen: the cluster's shape, the requests and their clients, what the nemesis does and when.

Data only; scenario.py makes it happen. A plan depends on its seed alone, so it is what a failing seed prints first.
"""

from __future__ import annotations

import random

import msgspec

from protocol.parallel import ALONE
from protocol.request import Request, SamplingParams
from tests.faults.machines import MODEL, Shape
from tests.faults.model import BLOCK_SIZE, VOCAB_SIZE
from tests.faults.ranks import PAIR

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
        shape = dict(sorted(vars(self.shape).items()))
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
    shape.prefill_parallel = rng.choice((ALONE, ALONE, ALONE, PAIR))
    shape.decode_parallel = rng.choice((ALONE, ALONE, ALONE, PAIR))
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
        acts += [Act(rng.uniform(0.3, 3.0), "drain", role, 0, lasts=30.0) for role in ("prefill", "decode") if rng.random() < 0.5]
    ends = [(3.0 if act.trigger else act.at) + (act.lasts if act.kind != "drain" else 0.0) for act in acts]
    peace_at = max([4.0, *ends])
    return Plan(seed, shape, wanted, acts, weather, damage, peace_at, is_quiet)


def _weather(rng: random.Random) -> dict[str, float]:
    knobs = {
        "late": lambda: rng.choice((0.02, 0.2)),
        "overtake": lambda: rng.choice((0.01, 0.2)),
        "vanish": lambda: rng.choice((0.005, 0.03)),
        "reset": lambda: rng.choice((0.002, 0.01)),
        "twice": lambda: rng.choice((0.02, 0.2)),
        "forge": lambda: rng.choice((0.1, 0.5)),
    }
    chosen = rng.sample(sorted(knobs), rng.choice((0, 0, 1, 1, 2, 3)))
    weather = {name: knobs[name]() for name in sorted(chosen)}
    weather["delay_s"] = rng.choice((0.0005, 0.002, 0.01))
    if "late" in weather:
        weather["late_s"] = rng.choice((0.05, 0.4, 3.0))
    return weather


def _damage(rng: random.Random) -> dict[str, float]:
    knobs = {"flip": 0.03, "misdirect": 0.05, "repeat": 0.1, "lose": 0.03, "tear": 0.2, "unmappable": 0.3}
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
        "drain": rng.choice((0.0, 0.5, 2.0, 4.0)),  # its deadline
        "slow": rng.choice((0.5, 3.0)),
    }[kind]
    return Act(rng.uniform(0.3, 4.0), kind, role, index, other_role, other_index, lasts, rng.random() < 0.5)


TRIGGERS = (  # kinds of messages, and stores; several times what is worth striking at more often
    *("Admit", "Ticket", "Reserve", "Grant", "Grant", "Prefill", "Handshake", "HandshakeAccepted", "Seal", "Seal"),
    *("WriterDone", "StopWriting", "Cancel", "TokenFrame", "RequestFailed", "Outcome", "Progress", "WorkerInfo"),
    *("Landed", "Landed", "Landed", "store", "store", "store"),
)


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
