"""A fleet of real processes without Ray: a scheduler, gateways and workers, each forked by `zygote.py`, restarted when it dies.

    async with Fleet(folder, config, roles) as fleet:      # starts all, waits until each said that it is ready
        os.kill(fleet["decode:0"].pid, signal.SIGKILL)     # it comes back by itself, as another incarnation at another address
        await fleet.ready("decode:0")

What Serve does in production, this does here: it restarts what died, and it knows no request. On leaving nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from configs.load import load
from configs.schema import Config
from kvtransfer.process import start_ticks

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0  # of importing everything, on a machine that has other things to do
READY_S = 20.0
CALL_S = 60.0


class Dead(Exception):
    """The process that was asked is gone."""


class Life:
    """One process in a role, from its fork to its end."""

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket
        self.pid = 0
        self.ticks = 0
        self.forked = asyncio.Event()
        self.said: dict[str, Any] = {}  # its ready line
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.status: int | None = None
        self.started_at = time.monotonic()
        self.ended_at = 0.0
        self.is_stopped = False
        self.was_killed = False
        self._writer: asyncio.StreamWriter | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}

    @property
    def is_up(self) -> bool:
        return self.ready.is_set() and not self.ended.is_set() and not self.is_stopped and not self.was_killed

    @property
    def incarnation(self) -> str:
        return str(self.said.get("incarnation", ""))

    @property
    def address(self) -> str:
        return str(self.said["address"])

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        self.is_stopped = number == signal.SIGSTOP
        self.was_killed = self.was_killed or number == signal.SIGKILL

    async def call(self, do: str, timeout: float = CALL_S, **args: Any) -> Any:
        if self.ended.is_set() or self._writer is None:
            raise Dead(f"{do}: it is not there")
        number = next(_numbers)
        self._calls[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"call": number, "do": do, "args": args}).encode() + b"\n")
        try:
            async with asyncio.timeout(timeout):
                return await self._calls[number]
        finally:
            del self._calls[number]

    def connected(self, said: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.said, self._writer = said, writer
        self.ready.set()

    def answered(self, message: dict[str, Any]) -> None:
        future = self._calls.get(message["answer"])
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(RuntimeError(message["error"]))
        else:
            future.set_result(message["value"])

    def ending(self, status: int) -> None:
        self.status = status
        self.ended_at = time.monotonic()
        self.ended.set()
        if self._writer is not None:
            self._writer.transport.abort()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(Dead(f"it ended with {status}"))


_numbers = itertools.count(1)


class Slot:
    """One role of the fleet, "decode:0", and who plays it now."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.name = name
        self.role = name.split(":")[0]
        self.spec = spec
        self.restarts = True
        self.num_lives = 0
        self.life: Life | None = None


class Zygote:
    """The process that forks (`zygote.py`); one for all fleets of this test run, as importing takes seconds."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "tests.chaos.zygote", str(os.getpid())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env=environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._pending = b""
        deadline = time.monotonic() + START_S
        while not self.heard(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the zygote does not start"
            assert self._process.poll() is None, "the zygote ended"

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def heard(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        if not select.select([self.stdout], [], [], seconds)[0]:
            return []
        *lines, self._pending = (self._pending + os.read(self.stdout, 1 << 16)).split(b"\n")
        return [json.loads(line) for line in lines]


_zygotes: list[Zygote] = []


def zygote() -> Zygote:
    if not _zygotes or not _zygotes[-1].is_alive:
        _zygotes.append(Zygote())
    return _zygotes[-1]


def make_config(**keys: Any) -> Config:
    """Keys as `decode__max_num_seqs=8`; the toy model with a pool that holds the whole load on one worker."""
    flags = {
        "model.name": "toy",
        "model.block_size": 16,
        "model.num_blocks_override": 8192,
        "model.max_len": 1024,
        "decode.max_num_seqs": 256,
        "decode.max_num_batched_tokens": 512,
        "prefill.max_num_batched_tokens": 256,
        "scheduler.tpot_target_s": 60,
        "scheduler.ttft_target_s": 60,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return load(flags=flags, env={}).config


class Fleet:
    """roles: how many of each, {"gateway": 1, "prefill": 3, "decode": 3}; there is always one scheduler.

    specs: keys of single slots or of a whole role, e.g. {"decode": {"min_step_s": 0.02}, "decode:0": {"hook": {...}}}; see
    `roles.py` and `hooks.py`. restart_s: how long until what died is forked again. first_life_only: these keys a successor
    does not inherit.
    """

    first_life_only = ("hook", "max_fds")

    def __init__(
        self,
        folder: Path,
        config: Config,
        roles: Mapping[str, int],
        specs: Mapping[str, Mapping[str, Any]] | None = None,
        restart_s: float = 0.0,
    ) -> None:
        self.folder = folder
        self.config = config
        self.secret = secrets.token_bytes(32)
        self.restart_s = restart_s
        self.pids: dict[int, int] = {}  # all that ever lived, with their start, so that a recycled pid is not taken for one
        self.ended_by_themselves: list[str] = []  # "decode:0: -9" where it was not us who killed it
        self.slots: dict[str, Slot] = {}
        for role, count in {"scheduler": 1, **roles}.items():
            for index in range(count):
                name = f"{role}:{index}" if role != "scheduler" else role
                spec = {"slot": name, "role": role, "index": index, **(specs or {}).get(role, {}), **(specs or {}).get(name, {})}
                self.slots[name] = Slot(name, spec)
        self._zygote: Zygote
        self._lives: dict[int, Life] = {}  # by ticket
        self._by_pid: dict[int, Life] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closing = False

    # ---- for tests ---------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Life:
        life = self.slots[name].life
        assert life is not None
        return life

    def up(self, role: str) -> list[Slot]:
        return [s for s in self.slots.values() if s.role == role and s.life is not None and s.life.is_up]

    async def ready(self, *names: str, seconds: float = READY_S) -> None:
        """Until these (all, without names) are played by a living process that said it is ready."""
        try:
            async with asyncio.timeout(seconds):
                for name in names or self.slots:
                    while not self[name].is_up:
                        await asyncio.sleep(0.01)
        except TimeoutError:
            down = [slot.name for slot in self.slots.values() if slot.life is None or not slot.life.is_up]
            raise AssertionError(f"not ready within {seconds} s: {', '.join(down)}\n{self.tail()}") from None

    async def find_scheduler(self) -> str:
        return (self.folder / "scheduler").read_text()

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self["scheduler"].call("status")
        return status

    async def settle(self, seconds: float = 20.0) -> dict[str, dict[str, Any]]:
        """Until no worker holds anything, nor has blocks in quarantine; then each checks its pool. -> their numbers."""
        checks: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + seconds
        while True:
            await self.ready()
            for slot in self.slots.values():
                if slot.role in ("prefill", "decode"):
                    checks[slot.name] = await self[slot.name].call("check")
            busy = {name: c for name, c in checks.items() if c["used"] or c["num_quarantined_blocks"] or not c["is_idle"]}
            if not busy:
                return checks
            if time.monotonic() > deadline:
                what = {n: {k: c[k] for k in ("used", "num_quarantined_blocks", "is_idle")} for n, c in busy.items()}
                raise AssertionError(f"still held after {seconds} s: {what}\n{self.tail()}")
            await asyncio.sleep(0.1)

    def tail(self, num_lines: int = 40) -> str:
        lines: list[str] = []
        for path in sorted(self.folder.glob("*.log")):
            lines += path.read_text(errors="replace").splitlines()[-num_lines:]
        return "\n".join(sorted(lines)[-num_lines:])

    def survivors(self) -> list[int]:
        """Of all processes that this fleet ever had, those that still run."""
        return [pid for pid, ticks in self.pids.items() if start_ticks(pid) == ticks]

    # ---- starting and restarting -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Fleet:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._short = tempfile.TemporaryDirectory(prefix="tandem-fleet-")  # a socket's path is 107 bytes at most
        self._control = f"{self._short.name}/control"
        self._server = await asyncio.start_unix_server(self._accept, self._control, limit=1 << 26)
        self._zygote = zygote()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._zygote.stdout, self._hear)
        try:
            self.start("scheduler")
            await self.ready("scheduler")
            for name in self.slots:
                if name != "scheduler":
                    self.start(name)
            await self.ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._is_closing = True
        for life in self._lives.values():
            life.was_killed = True
            if life.forked.is_set() and not life.ended.is_set():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(life.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                for life in list(self._lives.values()):
                    await life.ended.wait()
        asyncio.get_running_loop().remove_reader(self._zygote.stdout)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        self._short.cleanup()

    def start(self, name: str) -> Life:
        slot = self.slots[name]
        life = slot.life = Life(next(_numbers))
        self._lives[life.ticket] = life
        spec = {k: v for k, v in slot.spec.items() if slot.num_lives == 0 or k not in self.first_life_only}
        spec |= {
            "ticket": life.ticket,
            "control": self._control,
            "folder": str(self.folder),
            "log": spec.get("log") or str(self.folder / f"{name}.log"),
            "config": spec.get("config") or msgspec.to_builtins(self.config),
            "secret": self.secret.hex(),
        }
        if callable(spec.get("transports")):
            spec["transports"] = spec["transports"]()
        slot.num_lives += 1
        os.write(self._zygote.stdin, json.dumps(spec).encode() + b"\n")
        return life

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hear(self) -> None:
        """From the zygote: who was forked, who ended. Of children of an earlier fleet nothing is wanted any more."""
        for message in self._zygote.heard():
            if "pid" in message:
                life = self._lives[message["ticket"]]
                life.pid = message["pid"]
                life.ticks = self.pids[life.pid] = start_ticks(life.pid)
                self._by_pid[life.pid] = life
                life.forked.set()
            elif message.get("exit") in self._by_pid:
                life = self._by_pid.pop(message["exit"])
                life.ending(message["status"])
                del self._lives[life.ticket]
                slot = next((s for s in self.slots.values() if s.life is life), None)
                if slot is not None and not life.was_killed:
                    self.ended_by_themselves.append(f"{slot.name}: {message['status']}")
                if slot is not None and slot.restarts and not self._is_closing:
                    self._spawn(self._restart(slot))

    async def _restart(self, slot: Slot) -> None:
        await asyncio.sleep(self.restart_s)
        if not self._is_closing and slot.restarts:
            self.start(slot.name)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            said = json.loads(await reader.readline() or b"{}")
            life = self._lives.get(said.pop("ticket", 0))
            if life is None:
                writer.close()
                return
            await life.forked.wait()
            life.connected(said, writer)
            while line := await reader.readline():
                life.answered(json.loads(line))
