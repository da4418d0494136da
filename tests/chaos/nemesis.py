"""Random `kill -9` and SIGSTOP of a fleet's processes under load, what came of it, and the table that says so.

Seeded: the same seed draws the same faults in the same order; which streams they hit is the machine's doing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.chaos.fleet import Fleet, Life, Slot

# (kind, role): how often, of a hundred faults
WEIGHTS = {
    ("kill", "decode"): 58,
    ("kill", "prefill"): 14,
    ("stop", "decode"): 11,
    ("stop", "prefill"): 11,
    ("kill", "scheduler"): 6,
}
STOP_S = (4.0, 10.0)
DOUBLE_RATE = 0.3  # of the killed decode workers: a prefill worker follows while it is busy with what they left behind
DOUBLE_PAUSE_S = (0.05, 0.3)
MAX_WAIT_S = 5.0
SETTLE_S = 60.0
SLOW_S = 5.0
WARM = {"max_tokens": 8}


class Nemesis:
    """faults: how many. pause_s: between two of them, uniform. Call `run` while the fleet's gateways are under load."""

    def __init__(self, fleet: Fleet, seed: str, pause_s: tuple[float, float], stop_s: tuple[float, float] = STOP_S) -> None:
        self.fleet = fleet
        self.faults: list[dict[str, Any]] = []
        self._rng = random.Random(seed)
        self._pause_s = pause_s
        self._stop_s = stop_s
        self._ids = itertools.count()
        self._continuing: set[asyncio.Task[None]] = set()

    async def run(self, num_faults: int) -> None:
        while len(self.faults) < num_faults:
            await asyncio.sleep(self._rng.uniform(*self._pause_s))
            await self._let_recover()
            slot, kind = await self._choose()
            await self._strike(slot, kind)
            if (kind, slot.role) == ("kill", "decode") and self._rng.random() < DOUBLE_RATE:
                await asyncio.sleep(self._rng.uniform(*DOUBLE_PAUSE_S))
                others = self.fleet.up("prefill")
                if len(others) >= 2:
                    await self._strike(self._rng.choice(others), "kill")
        if self._continuing:
            await asyncio.wait(self._continuing)

    async def _let_recover(self) -> None:
        """Faults overlap, but not until nobody gets anywhere: while a third of the streams wait for their next token, no other
        fault comes, for a few seconds at most. Otherwise a slow machine would be all that is measured."""
        gateways = [s.life for s in self.fleet.up("gateway") if s.life is not None]
        until = time.monotonic() + MAX_WAIT_S
        while time.monotonic() < until:
            waiting = await asyncio.gather(*(gateway.call("waiting") for gateway in gateways))
            if sum(w["interrupted"] for w in waiting) * 3 <= sum(w["streams"] for w in waiting):
                return
            await asyncio.sleep(0.1)

    async def _choose(self) -> tuple[Slot, str]:
        """A victim that is up, while another of its role is up as well and known to the scheduler; at most one of each role is
        stopped at a time, or there would be no room for the streams. Waits until there is one."""
        while True:
            kind, role = self._rng.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
            up = self.fleet.up(role)
            if role == "scheduler" and up:
                return up[0], kind
            known = await self._known()
            known_up = [slot for slot in up if slot.life is not None and slot.life.incarnation in known]
            is_one_stopped = any(s.life is not None and s.life.is_stopped for s in self.fleet.slots.values() if s.role == role)
            if len(known_up) >= 2 and not (kind == "stop" and is_one_stopped):
                return self._rng.choice(known_up), kind
            await asyncio.sleep(0.1)

    async def _known(self) -> set[str]:
        try:
            status = await self.fleet.status()
        except Exception:  # it is being restarted
            return set()
        return {worker["incarnation"] for worker in status["workers"] if worker["alive"]}

    async def _strike(self, slot: Slot, kind: str) -> None:
        life = slot.life
        assert life is not None
        fault = {"id": next(self._ids), "kind": kind, "role": slot.role, "incarnation": life.incarnation}
        gateways = [s.life for s in self.fleet.up("gateway") if s.life is not None]
        marks = await asyncio.gather(*(gateway.call("mark", fault=fault) for gateway in gateways))
        life.kill(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        struck = {"slot": slot.name, "at": time.monotonic(), "interrupted": sum(m["interrupted"] for m in marks)}
        self.faults.append({**fault, **struck})
        if kind == "stop":
            task = asyncio.create_task(self._continue(life, fault["id"], self._rng.uniform(*self._stop_s)))
            self._continuing.add(task)
            task.add_done_callback(self._continuing.discard)

    async def _continue(self, life: Life, fault_id: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        for gateway in self.fleet.up("gateway"):
            assert gateway.life is not None
            await gateway.life.call("continued", fault_id=fault_id)
        life.kill(signal.SIGCONT)


async def campaign(
    fleet: Fleet,
    *,
    seed: str,
    num_faults: int,
    num_streams: int,
    pause_s: tuple[float, float],
    shape: dict[str, Any],
    stop_s: tuple[float, float] = STOP_S,
) -> dict[str, Any]:
    """Load, faults, drain, settle, and everything that was counted meanwhile."""
    gateways = [slot.name for slot in fleet.slots.values() if slot.role == "gateway"]
    segments_before = set(os.listdir("/dev/shm"))
    for name in gateways:  # connections to all workers are made once
        await fleet[name].call("start", num_streams=8, seed="warm", **{**shape, **WARM})
    await asyncio.sleep(0.5)
    await asyncio.gather(*(fleet[name].call("drain", seconds=30.0) for name in gateways))
    await fleet.settle()
    before = {name: await _descriptors(fleet, name) for name in gateways}
    started = time.monotonic()
    for index, name in enumerate(gateways):
        share = num_streams // len(gateways)
        await fleet[name].call("start", num_streams=share, seed=f"{seed}/{index}", spread_s=2.0, **shape)
    await asyncio.sleep(3.0)
    nemesis = Nemesis(fleet, seed, pause_s, stop_s)
    await nemesis.run(num_faults)
    seconds = time.monotonic() - started
    drains = await asyncio.gather(*(fleet[name].call("drain", seconds=120.0, timeout=180.0) for name in gateways))
    await fleet.ready()
    checks = await fleet.settle(SETTLE_S)
    await asyncio.sleep(4.0)  # connections to the dead are given up by then
    after = {name: await _descriptors(fleet, name) for name in gateways}
    reports = [await fleet[name].call("report") for name in gateways]
    return summary(
        seed=seed, seconds=seconds, faults=nemesis.faults, reports=reports, hung=sum(d["hung"] for d in drains),
        leaked=sum(c["used"] + c["num_quarantined_blocks"] for c in checks.values()),
        fds={name: (before[name], after[name]) for name in gateways},
        segments=sorted(set(os.listdir("/dev/shm")) - segments_before),
    )  # fmt: skip


async def _descriptors(fleet: Fleet, name: str) -> int:
    """Open files of a gateway beside its connections, of which it has one to each process that it has had to do with."""
    connections = (await fleet[name].call("report"))["tables"]["connections"]
    return int((await fleet[name].call("process"))["fds"]) - int(connections)


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def summary(
    *, seed: str, seconds: float, faults: list, reports: list, hung: int, leaked: int, fds: dict, segments: list
) -> dict[str, Any]:
    interruptions = [i for report in reports for i in report["interruptions"]]
    rows = {}
    for kind, role in [*WEIGHTS, ("", "")]:
        of_kind = [f for f in faults if not kind or (f["kind"], f["role"]) == (kind, role)]
        hit = [i for i in interruptions if not kind or (i["kind"], i["role"]) == (kind, role)]
        recovered = [i["recovery_s"] for i in hit if i["recovery_s"] is not None and i["how"] != "ended first"]
        rows[f"{kind} {role}".strip() or "all"] = {
            "faults": len(of_kind),
            "interrupted": len(hit),
            "streaming": sum(i["streaming"] for i in hit),
            "placed_again": sum(i["how"] == "placed again" for i in hit),
            "p50_s": round(percentile(recovered, 0.5), 3),
            "p99_s": round(percentile(recovered, 0.99), 3),
            "max_s": round(max(recovered, default=0.0), 3),
            "unresolved": sum(i["recovery_s"] is None for i in hit),
        }

    def total(name: str) -> int:
        return sum(report.get(name, 0) for report in reports)

    return {
        "faults": faults,
        "slow": [i for i in interruptions if i["recovery_s"] is None or i["recovery_s"] > SLOW_S],
        "seed": seed,
        "seconds": round(seconds, 1),
        "rows": rows,
        "streams": total("streams"),
        "tokens": total("tokens"),
        "cancelled": total("cancelled"),
        "wrong": total("wrong"),
        "lost": total("lost") + hung,
        "failed": total("failed"),
        "leaked_blocks": leaked,
        "gateway_fds": fds,
        "segments_left": segments,
        "longest_silence_s": round(max((r["longest_silence_s"] for r in reports), default=0.0), 3),
        "tables": [r["tables"] for r in reports],
        "named": [n for r in reports for n in r["named"]],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'fault':<16}{'count':>6}{'interrupted':>13}{'mid-stream':>12}{'again':>7}{'p50 s':>8}{'p99 s':>8}{'max s':>8}"]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:<16}{row['faults']:>6}{row['interrupted']:>13}{row['streaming']:>12}{row['placed_again']:>7}"
            f"{row['p50_s']:>8.2f}{row['p99_s']:>8.2f}{row['max_s']:>8.2f}"
        )
    keys = ("streams", "tokens", "cancelled", "wrong", "lost", "failed", "leaked_blocks", "gateway_fds", "segments_left")
    lines.append("  ".join(f"{key} {result[key]}" for key in keys))
    lines.append(f"seed {result['seed']}, {result['seconds']} s, longest silence {result['longest_silence_s']} s")
    return "\n".join(lines)


def write(result: dict[str, Any], name: str) -> Path:
    """Beside the other build products; TANDEM_CHAOS_OUT names another folder."""
    folder = Path(os.environ.get("TANDEM_CHAOS_OUT") or Path(__file__).resolve().parents[2] / "build" / "chaos")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
