"""The network between nodes, with a nemesis in it: `protocol.network` in virtual time, every choice from one seeded source.

What holds of `cluster/wire.py` holds here: one connection per dialer and address, either side calls and sends, sends of a
connection are handled in order and calls as tasks of their own, messages travel encoded, an aborted connection fails its
calls, and a side that hears nothing for 3 s (pings come every second while the other side lives) closes.

    connection   what is written arrives in order after a delay; while its way is cut it waits, as TCP would send it again
    way          from one node to another; a partition cuts one or both
    half-open    one side is gone and the other was not told; silence, or a restart of the machine, tells it

The kernel's part (delivery, buffers, resets) happens also while a node is stopped; the process's part runs in its node.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from protocol.errors import DeadlineExceeded, Failure, TandemError, WorkerLost, from_failure, to_failure
from protocol.messages import Message, decode, encode
from protocol.network import Handler, Peer
from protocol.ticket import Landed
from tests.faults.virtual_loop import Node, State, VirtualLoop

PING_S = 1.0
SILENCE_S = 3.0
HANDSHAKE_S = 5.0
SEND, CALL, ANSWER, END = range(4)
Frame = tuple[int, int, bytes]


class Weather:
    """How bad the network is now. Probabilities are per message."""

    def __init__(self) -> None:
        self.delay_s = 0.001  # mean of what every message takes
        self.late = 0.0  # a message takes up to late_s more
        self.late_s = 0.0
        self.overtake = 0.0  # a message may arrive before those that were written to its connection earlier
        self.vanish = 0.0  # it never arrives, and nobody is told
        self.reset = 0.0  # it never arrives, and the connection breaks
        self.twice = 0.0  # it arrives twice
        self.forge = 0.0  # of a Landed: somebody who does not know the secret sends one of his own

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


class Wires:
    """All connections, ways and listeners. history(node, text) is told everything, if anybody wants to know."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, history: Callable[[Node | None, str], None] | None = None) -> None:
        self.loop = loop
        self.rng = rng
        self.weather = Weather()
        self.history = history
        self.listeners: dict[str, VirtualNetwork] = {}
        self.sides: dict[Side, None] = {}  # open ones, in order of their making
        self.cuts: dict[tuple[Node, Node], None] = {}
        self.num_messages = 0
        self.num_forged = 0
        self.forge: Callable[[Landed], Landed | None] = lambda landed: None
        # What is sent or stored now, by whom, to whom. -> True: it never arrives.
        self.on_event: Callable[[str, Node, Node], bool] | None = None
        self._kernel = contextvars.Context()  # of no node: what is on its way goes on when its sender stops or dies

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        self.loop.call_at(when, callback, *args, context=self._kernel)

    def later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        self.at(self.loop.now + delay, callback, *args)

    def log(self, node: Node | None, *words: Any) -> None:
        if self.history is not None:
            self.history(node, " ".join(w if isinstance(w, str) else _brief(w) for w in words))

    # ---- the nemesis -----------------------------------------------------------------------------------------------

    def cut(self, source: Node, target: Node) -> None:
        self.cuts[source, target] = None
        self.review()

    def heal(self, source: Node, target: Node) -> None:
        self.cuts.pop((source, target), None)
        self.review()

    def is_cut(self, source: Node, target: Node) -> bool:
        return (source, target) in self.cuts

    def review(self) -> None:
        """Some node or way has changed: who hears nothing from now on, who hears again."""
        for side in list(self.sides):
            side.review()

    def die(self, node: Node, *, is_told: bool) -> None:
        """The kernel of a dead process closes its connections (is_told), or the whole machine went dark."""
        for side in [s for s in self.sides if s.node is node]:
            side.is_closed = True
            del self.sides[side]
            if is_told:
                side.other.arrive_later((END, 0, b""))
        for address in [a for a, network in self.listeners.items() if network.node is node]:
            self.listeners[address].is_dark = not is_told
        self.review()

    def reborn(self, dead: Node) -> None:
        """A machine is up again: whoever writes into an old connection is told that it is none."""
        for side in [s for s in self.sides if s.other.node is dead]:
            self.later(self.rng.uniform(0.0, PING_S), side.arrive, (END, 0, b""))

    def half_open(self, side: Side) -> None:
        """One side's process is told that the connection is gone, the other's is not."""
        side.is_mute = True
        side.arrive_later((END, 0, b""))
        self.review()

    def delay(self) -> float:
        weather, rng = self.weather, self.rng
        delay = weather.delay_s * rng.uniform(0.2, 2.0)
        if weather.late and rng.random() < weather.late:
            delay += weather.late_s * rng.random()
        return delay


class Side:
    """One side of one connection: a `protocol.network.Peer` for the code of its node."""

    def __init__(self, network: VirtualNetwork, name: str) -> None:
        self.name = name
        self.is_closed = False
        self.is_mute = False  # its end will not be told to the other side
        self.network = network
        self.node = network.node
        self.other: Side
        self._wires = network.wires
        self._calls: dict[int, asyncio.Future[Message]] = {}
        self._next_id = 0
        self._serving: dict[asyncio.Task[None], None] = {}
        self._received: deque[Frame] = deque()
        self._under_way: deque[Frame] = deque()  # written by the other side while its way here is cut
        self._arrives_at = 0.0
        self._wake: asyncio.Future[None] | None = None
        self._silent_since: float | None = None
        self._reader = self.node.task(self._read())
        self._wires.sides[self] = None

    # ---- protocol.network.Peer -------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        self._write(SEND, 0, message)

    async def call(self, message: Message, timeout: float) -> Message:
        if self.is_closed:
            raise WorkerLost(f"the connection to {self.name} is closed")
        self._next_id += 1
        call_id = self._next_id
        future: asyncio.Future[Message] = self._wires.loop.create_future()
        self._calls[call_id] = future
        try:
            self._write(CALL, call_id, message)
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not answer {type(message).__name__} within {timeout:.1f} s") from None
        finally:
            self._calls.pop(call_id, None)
        if isinstance(answer, Failure):
            raise from_failure(answer)
        return answer

    def close(self, reason: str = "closed") -> None:
        """In its node: what `Connection.close` of cluster/wire.py does."""
        if self.is_closed:
            return
        self.is_closed = True
        self._wires.sides.pop(self, None)
        if not self.is_mute:
            if self._wires.rng.random() < 0.5:
                self.other._under_way.clear()
            self.other.arrive_later((END, 0, b""))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerLost(f"the connection to {self.name} broke: {reason}"))
                future.exception()
        current = asyncio.current_task()
        for task in (self._reader, *self._serving):
            if task is not current:
                task.cancel()
        self._wires.log(self.node, "lost", self.name, "because", reason)
        self.network.closed(self)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _write(self, kind: int, call_id: int, message: Message) -> None:
        if self.is_closed:
            return
        wires, weather, rng = self._wires, self._wires.weather, self._wires.rng
        wires.num_messages += 1
        wires.log(self.node, "->", self.name, ("send", "call", "answer")[kind], message)
        frame = (kind, call_id, encode(message))
        is_lost = wires.on_event is not None and wires.on_event(type(message).__name__, self.node, self.other.node)
        if is_lost or (weather.vanish and rng.random() < weather.vanish):
            wires.log(None, "   vanished:", message)
            return
        if weather.reset and rng.random() < weather.reset:
            wires.log(None, "   reset:", message)
            self.arrive_later((END, 0, b""))
            self.other.arrive_later((END, 0, b""))
            return
        if weather.forge and isinstance(message, Landed) and rng.random() < weather.forge:
            self._forge(message)
        self.other.arrive_later(frame)
        if weather.twice and rng.random() < weather.twice:
            self.other.arrive_later(frame)

    def _forge(self, message: Landed) -> None:
        forged = self._wires.forge(message)
        if forged is not None:
            self._wires.num_forged += 1
            self.other.arrive_later((SEND, 0, encode(forged)))

    # ---- the kernel's part -----------------------------------------------------------------------------------------

    def arrive_later(self, frame: Frame) -> None:
        wires = self._wires
        when = wires.loop.now + wires.delay()
        if not (wires.weather.overtake and wires.rng.random() < wires.weather.overtake):
            when = self._arrives_at = max(self._arrives_at, when)
        wires.at(when, self.arrive, frame)

    def arrive(self, frame: Frame) -> None:
        if self.is_closed:
            return
        if self.other.node is not self.node and self._wires.is_cut(self.other.node, self.node):
            self._under_way.append(frame)
            return
        if frame[0] == END and self._wires.rng.random() < 0.2:  # a reset, which throws away what was not read yet
            self._received.clear()
        self._received.append(frame)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def review(self) -> None:
        """Does the other side's process, as far as this kernel can tell, still send its pings?"""
        hears = self.other.node.state is State.UP and not self.other.is_closed and not self.other.is_mute
        is_cut = self._wires.is_cut(self.other.node, self.node)
        if not is_cut and self._under_way:  # TCP sends again, sooner or later
            frames, self._under_way = self._under_way, deque()
            when = self._wires.loop.now + self._wires.rng.uniform(0.0, 0.5)
            for frame in frames:
                when = self._arrives_at = max(self._arrives_at, when)
                self._wires.at(when, self.arrive, frame)
        if hears and not is_cut:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = self._wires.loop.now
            self._check_silence_at(self._silent_since + SILENCE_S + self._wires.rng.uniform(0.0, PING_S))

    def _check_silence_at(self, when: float) -> None:
        self.node.at(when, self._check_silence, self._silent_since, when)

    def _check_silence(self, since: float | None, due: float) -> None:
        """In its node. If that was stopped, the check comes late, and what is late does not count as the other's silence."""
        if self.is_closed or self._silent_since is None or self._silent_since != since:
            return
        now = self._wires.loop.now
        if now - due > PING_S / 2:
            self._silent_since = since + (now - due)
            self._check_silence_at(now + PING_S)
            return
        self.close(f"silent for {now - since:.1f} s")

    # ---- the process's part ----------------------------------------------------------------------------------------

    async def _read(self) -> None:
        received = self._received
        while True:
            while received:
                kind, call_id, body = received.popleft()
                if kind == END:
                    await asyncio.sleep(0)  # calls that came before it have begun
                    self.close("the other side closed it")
                    return
                message = decode(body)
                if kind == SEND:
                    await self._serve_send(message)
                elif kind == CALL:
                    task = self._wires.loop.create_task(self._serve_call(call_id, message))
                    self._serving[task] = None
                    task.add_done_callback(lambda ended: self._serving.pop(ended, None))
                elif (future := self._calls.get(call_id)) is not None and not future.done():
                    future.set_result(message)
            self._wake = self._wires.loop.create_future()
            await self._wake

    async def _serve_send(self, message: Message) -> None:
        try:
            await self.network.handler(self, message)
        except TandemError as error:
            self._wires.log(self.node, "refused", message, "from", self.name, "because", error.message)
        except Exception as error:
            self.network.report(f"{self.node.name} failed to handle {_brief(message)}: {error!r}", error)

    async def _serve_call(self, call_id: int, message: Message) -> None:
        answer: Message
        try:
            given = await self.network.handler(self, message)
            assert given is not None, f"no answer to {type(message).__name__}"
            answer = given
        except TandemError as error:
            answer = to_failure(error)
        except Exception as error:
            self.network.report(f"{self.node.name} failed to answer {_brief(message)}: {error!r}", error)
            answer = to_failure(error)
        self._write(ANSWER, call_id, answer)


class VirtualNetwork:
    """One node's place on the network: a `protocol.network.Network`. report(story, error): a handler raised what is not ours."""

    def __init__(self, wires: Wires, node: Node, address: str, report: Callable[[str, BaseException], None]) -> None:
        self.address = address
        self.wires = wires
        self.node = node
        self.report = report
        self.is_dark = False  # the machine is gone: nobody even refuses
        self.handler: Handler
        self._on_lost: Callable[[Peer], None] = lambda peer: None
        self._outgoing: dict[str, Side] = {}
        self._dialing: dict[str, asyncio.Lock] = {}

    async def serve(self, handler: Handler, on_lost: Callable[[Peer], None]) -> None:
        self.handler = handler
        self._on_lost = on_lost
        self.wires.listeners[self.address] = self

    async def connect(self, address: str, timeout: float = HANDSHAKE_S) -> Peer:
        async with self._dialing.setdefault(address, asyncio.Lock()):
            known = self._outgoing.get(address)
            if known is not None and not known.is_closed:
                return known
            dialed: asyncio.Future[Side] = self.wires.loop.create_future()
            self.wires.later(self.wires.delay(), self._knock, address, dialed)
            try:
                async with asyncio.timeout(timeout):
                    side = await dialed
            except TimeoutError:
                raise WorkerLost(f"{self.node.name} cannot reach {address}: TimeoutError") from None
            self._outgoing[address] = side
            return side

    async def close(self) -> None:
        self.wires.listeners.pop(self.address, None)
        for side in [s for s in self.wires.sides if s.network is self]:
            side.close("this process is going away")

    def closed(self, side: Side) -> None:
        for address, known in list(self._outgoing.items()):
            if known is side:
                del self._outgoing[address]
        self._on_lost(side)

    def _knock(self, address: str, dialed: asyncio.Future[Side]) -> None:
        """The dialer's kernel reaches the other machine, or not."""
        target = self.wires.listeners.get(address)
        if dialed.done() or self.node.is_dead:
            return
        if target is not None and (
            target.is_dark or self.wires.is_cut(self.node, target.node) or self.wires.is_cut(target.node, self.node)
        ):
            return  # until the caller's timeout
        if target is None or target.node.is_dead:
            dialed.set_exception(WorkerLost(f"{self.node.name} cannot reach {address}: connection refused"))
            return
        target.node.soon(self._shake, target, dialed)  # a stopped process accepts when it goes on

    def _shake(self, target: VirtualNetwork, dialed: asyncio.Future[Side]) -> None:
        """In the target's node: its side exists from now on, the dialer's when the answer has come back."""
        there = Side(target, self.node.name)
        here = there.other = _Unborn(self)
        self.wires.later(self.wires.delay(), self._shaken, target, there, here, dialed)

    def _shaken(self, target: VirtualNetwork, there: Side, unborn: _Unborn, dialed: asyncio.Future[Side]) -> None:
        if dialed.done() or self.node.is_dead or there.is_closed:
            there.arrive((END, 0, b""))
            if not dialed.done() and not self.node.is_dead:
                dialed.set_exception(WorkerLost(f"{self.node.name} cannot reach {target.address}: it closed the connection"))
            return
        here = Side(self, target.address)
        here.other, there.other = there, here
        for frame in unborn.frames:
            here.arrive(frame)
        dialed.set_result(here)
        here.review()
        there.review()


class _Unborn(Side):
    """The dialer's side before the dialer knows of it: what the other side already writes waits here."""

    def __init__(self, network: VirtualNetwork) -> None:
        self.frames: list[Frame] = []
        self._under_way = deque()
        self.node = network.node
        self.is_closed = False
        self.is_mute = False

    def arrive_later(self, frame: Frame) -> None:
        self.frames.append(frame)


def _brief(message: Any) -> str:
    """For the history: the message's kind and what it is about."""
    about = [getattr(message, name) for name in ("request_id", "epoch", "grant_id", "incarnation") if hasattr(message, name)]
    for name in ("ticket", "grant", "manifest"):
        part = getattr(message, name, None)
        if part is not None:
            about += [part.request_id, part.epoch]
            break
    if updates := getattr(message, "updates", None):
        about += [f"{u.request_id}/{u.epoch}[{u.choice}]@{u.index}+{len(u.tokens)}{'P' if u.from_prefill else ''}" for u in updates]
    if isinstance(message, Failure):
        about += [message.kind, message.message[:60]]
    return f"{type(message).__name__} {' '.join(str(a) for a in about)}"
