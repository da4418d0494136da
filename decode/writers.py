"""The prefill workers that may write into this decode worker's blocks: hand-shakes, how each one's death would be seen, and what a
writer that has not called yet must refuse when it does. Owned by `handover.py`; all of it on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, ItemsView, Mapping

from kvtransfer.handoff import MEMORY_S
from kvtransfer.layout import plan_routes
from kvtransfer.link import TRANSPORTS, choose, is_here, observe_all, processes_of
from kvtransfer.process import Process, boot_id
from kvtransfer.receiving import GroupReceivers
from protocol.errors import IncompatibleWorkers, Unsupported
from protocol.messages import Handshake, HandshakeAccepted
from protocol.network import Clock, Peer
from protocol.ticket import Grant

MAX_VOID_GRANTS = 256  # remembered per writer that had not called yet; more go into quarantine
MAX_VOID_WRITERS = 64  # likewise: writers with such grants


class Writer:
    """One life of a prefill worker that shook hands with us: where to ask it to stop, and how its death would be seen.

    transport: of the last hand-shake. transports: of all of them; the memory that an earlier one mapped may be mapped still.
    processes: all of its ranks; None: not all of them can be seen from here.
    """

    def __init__(self, peer: Peer, transport: str, transports: frozenset[str], processes: list[Process] | None) -> None:
        self.peer = peer
        self.transport = transport
        self.transports = transports
        self.processes = processes

    @property
    def is_dead(self) -> bool:
        """Observed, not guessed: every process of it has ended, or (elsewhere, where a late store is refused at this end) its
        connection broke."""
        if self.processes is None:
            return self.peer.is_closed
        return all(process.is_dead() for process in self.processes)

    def has_stopped(self, refused: Mapping[str, bool]) -> bool:
        """No late store of it is possible, by what the receivers say of each transport."""
        return all(refused[transport] for transport in self.transports)

    def close(self) -> None:
        for process in self.processes or ():
            with contextlib.suppress(NotImplementedError, ValueError):
                asyncio.get_running_loop().remove_reader(process.fileno())
            process.close()


class Writers:
    """on_death() is called when a process of one of them was seen to die; then ask `take_dead`."""

    def __init__(self, incarnation: str, receivers: GroupReceivers, clock: Clock, on_death: Callable[[], None]) -> None:
        self._incarnation = incarnation
        self._receivers = receivers
        self._clock = clock
        self._on_death = on_death
        self._writers: dict[str, Writer] = {}  # by prefill incarnation
        # Prefill incarnation -> what it must refuse, by when it was taken back. Said at each hand-shake, as an answer may be
        # lost, until the writer is dead or no message can still be under way.
        self._void: dict[str, dict[str, float]] = {}

    def get(self, incarnation: str) -> Writer | None:
        return self._writers.get(incarnation)

    def items(self) -> ItemsView[str, Writer]:
        return self._writers.items()

    def handshake(self, peer: Peer, message: Handshake) -> HandshakeAccepted:
        """Raises IncompatibleWorkers with both values of what differs, HandshakeRefused when no transport is common to both."""
        place = self._receivers.place
        self._check_compatible(message)
        is_same_process = len(processes_of(message)) == 1 and message.boot_id == boot_id() and message.pid == os.getpid()
        known = self._writers.get(message.incarnation)
        seen = observe_all(message)
        # Whom we watch already is this very process, also where it cannot be looked up once more (no descriptor is left, say).
        processes = known.processes if seen is None and known is not None else seen
        endpoints = self._receivers.endpoints
        try:
            same_host = processes is not None and all(is_here(of_one) for of_one in endpoints.values())
            name = choose(message.transports, tuple(endpoints), same_host, is_same_process)
        except BaseException:
            for process in seen or ():
                process.close()
            raise
        if known is not None and known.processes is not processes:
            known.close()
        before = known.transports if known is not None else frozenset()
        self._writers[message.incarnation] = Writer(peer, name, before | {name}, processes)
        self._watch(seen or [])
        void = tuple(self._void.get(message.incarnation, ()))
        return HandshakeAccepted(self._incarnation, place.layout, endpoints[name], place.parallel, void, TRANSPORTS[name].digest)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def take_dead(self) -> list[str]:
        """Incarnations that were seen to die; they are forgotten here."""
        dead = [incarnation for incarnation, writer in self._writers.items() if writer.is_dead]
        for incarnation in dead:
            self._writers.pop(incarnation).close()
            self._void.pop(incarnation, None)
        return dead

    def remember_void(self, grant: Grant) -> bool:
        """Its writer has not called yet and will be told at the hand-shake. False: too much to remember, so it might still use
        this grant: quarantine."""
        now = self._clock()
        self._prune_void(now)
        void = self._void.get(grant.prefill_incarnation, {})
        if len(void) >= MAX_VOID_GRANTS or (not void and len(self._void) >= MAX_VOID_WRITERS):
            return False
        void[grant.grant_id] = now
        self._void[grant.prefill_incarnation] = void
        return True

    def _check_compatible(self, message: Handshake) -> None:
        place = self._receivers.place
        ends = f"decode {self._incarnation} and prefill {message.incarnation}"
        difference = place.layout.difference(message.layout)
        if difference is not None:
            raise IncompatibleWorkers(f"{ends} differ: {difference}")
        try:
            plan_routes(place.layout, message.parallel, place.parallel)
        except Unsupported as error:
            raise IncompatibleWorkers(f"{ends}: {place.parallel} here, {message.parallel} there: {error.message}") from error

    def _watch(self, processes: list[Process]) -> None:
        """Be woken at once by a death. Our own process (both roles in one) needs no watching."""
        loop = asyncio.get_running_loop()
        for process in processes:
            if process.pid != os.getpid():
                with contextlib.suppress(NotImplementedError):  # a loop without descriptors finds out at the next tick
                    loop.add_reader(process.fileno(), self._died, process)

    def _died(self, process: Process) -> None:
        asyncio.get_running_loop().remove_reader(process.fileno())  # it stays readable for ever
        self._on_death()

    def _prune_void(self, now: float) -> None:
        """Nothing is under way for as long as MEMORY_S; the state machines of both sides count on the same."""
        for incarnation, void in list(self._void.items()):
            for grant_id in [g for g, since in void.items() if now - since > MEMORY_S]:
                del void[grant_id]
            if not void:
                del self._void[incarnation]
