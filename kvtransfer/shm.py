"""Transport between two processes of one host: the sender writes into the decode worker's mapped pool.

The decode side does nothing while bytes arrive, and so it cannot refuse any: `forget` says False, and what is void
waits in quarantine for the writer's word or its observed death (handoff.py, process.py). Made by link.py.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable

import numpy as np

from kvtransfer import process
from kvtransfer.arrivals import Arrivals
from kvtransfer.layout import Area
from kvtransfer.outgoing import Piece, Transfer
from kvtransfer.pool import KVPool
from kvtransfer.view import View
from protocol.errors import HandshakeRefused, TransferFailed
from protocol.kv import KVLayout, ShmEndpoint
from protocol.ticket import Grant


class ShmReceiver:
    """A `Receiver`: its pool's memfd is all there is."""

    def __init__(self, pool: KVPool) -> None:
        self._endpoint = pool.shm_endpoint()

    def endpoint(self) -> ShmEndpoint:
        return self._endpoint

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
        pass

    def forget(self, grant_id: str) -> bool:
        return False

    def close(self) -> None:
        pass


class ShmLane:
    """The mapping of one peer rank's pool, made once and shared by all grants. See outgoing.Lane. layout: of that pool; area: the
    route's part of it.

    Raises HandshakeRefused, with both values where there are two, when the memory is not reachable or not the one that
    was meant.
    """

    lands_at_once = True

    def __init__(self, endpoint: ShmEndpoint, layout: KVLayout, area: Area | None = None) -> None:
        self.endpoint = endpoint
        path = f"/proc/{endpoint.pid}/fd/{endpoint.fd}"
        if endpoint.boot_id != process.boot_id():
            raise HandshakeRefused(f"shm: the peer runs on boot {endpoint.boot_id}, this is {process.boot_id()}: another host")
        peer = process.observe(endpoint.boot_id, endpoint.pid)
        if peer is None:
            raise HandshakeRefused(f"shm: process {endpoint.pid} is not visible from here (dead, or another pid namespace)")
        self._peer = peer
        try:
            mapped = self._open(path)
            self.num_blocks, rest = divmod(endpoint.nbytes, layout.block_nbytes)
            if rest:
                raise HandshakeRefused(
                    f"shm: the peer's pool of {endpoint.nbytes} bytes is not a number of our blocks of {layout.block_nbytes}"
                )
        except BaseException:
            peer.close()
            raise
        runs = np.frombuffer(mapped, np.uint8).reshape(layout.num_layers, self.num_blocks, layout.run_nbytes)
        self._view: View | None = View(runs, layout, area)

    def _open(self, path: str) -> mmap.mmap:
        endpoint = self.endpoint
        try:
            target = os.readlink(path)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HandshakeRefused(f"shm: cannot open {path}: {error.strerror} (both workers must run as one user)") from error
        try:
            found = os.fstat(fd)
            if not target.startswith("/memfd:") or (found.st_ino, found.st_size) != (endpoint.inode, endpoint.nbytes):
                raise HandshakeRefused(
                    f"shm: {path} is {target}, inode {found.st_ino}, {found.st_size} bytes; the peer spoke of a memfd, inode "
                    f"{endpoint.inode}, {endpoint.nbytes} bytes: it was restarted, or this is another pid namespace"
                )
            return mmap.mmap(fd, endpoint.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)

    def attach(self, on_broken: Callable[[], None]) -> None:
        pass

    def warm(self) -> None:
        pass

    def is_broken(self) -> bool:
        return False

    def reset(self) -> None:
        pass

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        assert self._view is not None, "store after close"
        for first, data in pieces:
            self._view.write(layer, transfer.grant.block_ids[first : first + len(data)], data)

    def fence(self, transfer: Transfer) -> None:
        # The mapping outlives its owner, so stores never fail; a dead reader is worth saying here, before a Seal that
        # nobody answers.
        if self._peer.is_dead():
            raise TransferFailed(f"the decode worker (process {self.endpoint.pid}) is dead")
        transfer.landed(transfer.num_runs - transfer.num_missing)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self._peer.close()
        self._view = None  # the mapping goes with its last view
