"""The tenants file of a cluster: the one place that reads it, watches it, and says which version is in force.

It lives beside the scheduler (`SchedulerService`); gateways are told the version with each beat and fetch what they lack, so all
of a cluster goes by the same file wherever its processes run. A file is taken whole or not at all. One that cannot be used
leaves the old one in force; its line and reason are in the log, in the status and in a metric.

What was read is what was meant only if nobody was still writing: a file counts once it has stood unchanged for SETTLE_S and did not
change while it was read. (Whoever writes beside it and renames is safe whatever the pace.)

A scheduler that was restarted while the file is damaged gets what was in force from the gateways (`OfferTenants`, truth rule R9).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from configs.schema import Config
from configs.tenants import Tenants, TenantsError, read_tenants, text_of, version_of
from protocol.errors import Overloaded
from protocol.messages import TenantsInForce

log = logging.getLogger(__name__)

POLL_S = 0.5
SETTLE_S = 0.5
RETRY_S = 1.0
_decode = msgspec.msgpack.Decoder(Tenants).decode
_encode = msgspec.msgpack.Encoder().encode


class Stamp(NamedTuple):
    """Tells one state of a file from another without reading it."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def reserved_keys(config: Config) -> dict[str, str]:
    """Digests of keys that are somebody's without the file -> whose, in words."""
    key = config.gateway.api_key
    return {hashlib.sha256(key.encode()).hexdigest(): "the server's own (gateway.api_key)"} if key else {}


def check_tenants(config: Config) -> None:
    """Before anything starts: raises TenantsError (a ConfigError) with line and reason when the file cannot be used."""
    path = config.scheduler.tenants_file
    if path is not None:
        read_tenants(text_of(path), path, reserved_keys(config))


def packed(tenants: Tenants, loaded: float) -> TenantsInForce:
    """As it goes to gateways."""
    return TenantsInForce(version_of(tenants), loaded, _encode(tenants))


def unpacked(document: TenantsInForce) -> Tenants:
    """Raises msgspec.ValidationError, DecodeError."""
    return _decode(document.tenants)


class TenantsFile:
    """`start` reads it; `watch` goes on reading it. on_taken: called with each file that comes into force. wall: unix seconds."""

    def __init__(
        self,
        path: str,
        reserved: dict[str, str] | None = None,
        on_taken: Callable[[Tenants], None] = lambda _: None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.on_taken = on_taken
        self.on_refused: Callable[[TenantsError], None] = lambda _: None
        self.in_force: TenantsInForce | None = None
        self.problem: TenantsError | None = None
        self.num_taken = self.num_refused = 0
        self._reserved = reserved or {}
        self._wall = wall
        self._clock = clock
        self._has_keys = False
        self._was_offered = False  # what is in force came from a gateway, because the file cannot be used
        self._seen: Stamp | None = None  # the state that was read last, whatever came of it
        self._moving: Stamp | None = None  # a newer one, that may still be written
        self._moving_since = 0.0

    @property
    def version(self) -> str:
        """Of what is in force; "" for nothing."""
        return self.in_force.version if self.in_force is not None else ""

    def document(self) -> TenantsInForce:
        """Raises Overloaded (503) while nothing is in force."""
        if self.in_force is None:
            told = self.problem.message if self.problem is not None else f"tenants file {self.path}: it is being read"
            raise Overloaded(f"nobody can be served yet: {told}", retry_after=RETRY_S)
        return self.in_force

    def status(self) -> dict[str, Any]:
        """For people and metrics. problem: line (0: none to blame) and reason, while the file on disk cannot be used."""
        problem = {"line": self.problem.line, "reason": self.problem.reason} if self.problem is not None else None
        return {
            "path": self.path,
            "version": self.version,
            "loaded": self.in_force.loaded if self.in_force is not None else None,
            "from_gateway": self._was_offered,
            "problem": problem,
            "taken": self.num_taken,
            "refused": self.num_refused,
        }

    async def start(self) -> None:
        """Read it once, so that the first request finds it."""
        await self.poll()
        for _ in range(4):
            if self.in_force is not None or self.problem is not None:
                return
            await asyncio.sleep(SETTLE_S)
            await self.poll()

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.poll()
            except Exception:
                log.exception("watching %s", self.path)

    async def poll(self) -> None:
        """Look at the file, and read it if it changed and nobody seems to be writing."""
        stamp = self._stamp()
        if stamp == self._seen and (stamp is not None or self.problem is not None):
            self._moving = None
            return
        now = self._clock()
        if stamp is not None and stamp != self._moving:
            self._moving, self._moving_since = stamp, now
        is_old = stamp is not None and self._seen is None and self._wall() - stamp.modified_ns / 1e9 >= SETTLE_S
        if stamp is not None and not is_old and now - self._moving_since < SETTLE_S:
            return
        # In a thread: a file of thousands of tenants takes longer than requests may wait for a decision.
        found = await asyncio.to_thread(self._read)
        if self._stamp() != stamp:
            return  # it was written to meanwhile
        self._seen, self._moving = stamp, None
        if isinstance(found, TenantsError):
            self._refuse(found)
        else:
            self._take(found)

    def offer(self, document: TenantsInForce) -> bool:
        """From a gateway, of what was in force before this life. True when it is now: nothing newer is."""
        known = self.in_force
        if known is not None and not (self._was_offered and document.loaded > known.loaded):
            return False
        tenants = unpacked(document)
        log.warning("tenants file %s cannot be used; what gateways had goes on being in force (%s)", self.path, document.version)
        self._was_offered = True
        self._put_in_force(tenants, document)
        return True

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _stamp(self) -> Stamp | None:
        """None while there is no such file."""
        try:
            found = os.stat(os.path.expanduser(self.path))
        except OSError:
            return None
        return Stamp(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def _read(self) -> Tenants | TenantsError:
        try:
            return read_tenants(text_of(self.path), self.path, self._reserved)
        except TenantsError as error:
            return error

    def _take(self, tenants: Tenants) -> None:
        has_keys = any(one.api_keys for one in tenants.tenants.values())
        if self._has_keys and not has_keys and not self._reserved:
            reason = "it has no keys any more, which would let everybody in; start the server anew if that is meant"
            self._refuse(TenantsError(self.path, 0, reason))
            return
        self.problem = None
        document = packed(tenants, self._wall())
        if document.version == self.version:
            self._was_offered = False
            return
        self.num_taken += 1
        self._was_offered = False
        log.info("tenants file %s: version %s, %d tenants", self.path, document.version, len(tenants.tenants))
        self._put_in_force(tenants, document)

    def _put_in_force(self, tenants: Tenants, document: TenantsInForce) -> None:
        self.on_taken(tenants)  # before it is announced: whoever hears of a version must find it in force
        self.in_force = document
        self._has_keys = any(one.api_keys for one in tenants.tenants.values())

    def _refuse(self, error: TenantsError) -> None:
        self.num_refused += 1
        self.problem = error
        kept = f"version {self.version} stays in force" if self.in_force is not None else "nothing is in force yet"
        log.error("%s; %s", error.message, kept)
        self.on_refused(error)
