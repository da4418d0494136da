"""Two workers' pools and their papers, small enough that a thousand transfers take seconds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from kvtransfer.digest import verify
from kvtransfer.handoff import written_blocks
from kvtransfer.link import make_receivers, make_sender
from kvtransfer.pool import KVPool
from kvtransfer.transport import Receiver, RouteSender
from protocol.errors import TandemError
from protocol.kv import KVLayout
from protocol.ticket import Grant, Manifest, sign

SECRET = b"the cluster's secret"
LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32", model_hash="m")


class Pair:
    """A prefill pool ("source") and a decode pool ("target"), and whatever connects them."""

    layout = LAYOUT
    secret = SECRET

    def __init__(self, num_blocks: int = 16) -> None:
        self.source = KVPool(LAYOUT, num_blocks)
        self.target = KVPool(LAYOUT, num_blocks)
        self.rng = np.random.default_rng(7)
        self.refill()
        self.receivers: dict[str, Receiver] = {}
        self.senders: list[RouteSender] = []
        self._ids = itertools.count()

    def refill(self) -> None:
        """New bytes everywhere at the source, other ones everywhere at the target."""
        self.source.runs[:] = self.rng.integers(0, 256, self.source.runs.shape, np.uint8)
        self.target.runs[:] = self.rng.integers(0, 256, self.target.runs.shape, np.uint8)

    def receiver(self, name: str) -> Receiver:
        if name not in self.receivers:
            self.receivers |= make_receivers(self.target, [name], SECRET, incarnation="D1", stall_timeout_s=1.0)
        return self.receivers[name]

    def sender(self, name: str, **options: object) -> RouteSender:
        options = {"incarnation": "P1", "peer_incarnation": "D1", "endpoint": self.receiver(name).endpoint()} | options
        options = {"stall_timeout_s": 1.0, "connect_timeout_s": 1.0, "secret": SECRET} | options
        sender = make_sender(pool=self.source, **options)  # type: ignore[arg-type]
        self.senders.append(sender)
        return sender

    def grant(
        self, blocks: tuple[int, ...] = (9, 3, 4), num_cached: int = 1, num_tokens: int | None = None, **changes: object
    ) -> Grant:
        fields = {
            "grant_id": f"g{next(self._ids)}",
            "request_id": "r",
            "epoch": 1,
            "decode_incarnation": "D1",
            "prefill_incarnation": "P1",
            "block_ids": blocks,
            "num_cached_blocks": num_cached,
            "num_tokens": len(blocks) * LAYOUT.block_size - 1 if num_tokens is None else num_tokens,
            "layout": LAYOUT,
            "lease_s": 10.0,
            "endpoints": tuple(receiver.endpoint() for receiver in self.receivers.values()),
            "control_address": "127.0.0.1:1",
        } | changes
        return sign(Grant(**fields), SECRET)  # type: ignore[arg-type]

    def manifest(self, grant: Grant, digests: bytes, **changes: object) -> Manifest:
        fields = {
            "grant_id": grant.grant_id,
            "request_id": grant.request_id,
            "epoch": grant.epoch,
            "decode_incarnation": grant.decode_incarnation,
            "prefill_incarnation": grant.prefill_incarnation,
            "num_written": len(written_blocks(grant)),
            "layout": grant.layout,
            "digests": digests,
            "first_tokens": (),
        } | changes
        return sign(Manifest(**fields), SECRET)  # type: ignore[arg-type]

    def pairs(self, grant: Grant) -> list[tuple[int, int]]:
        """Source blocks 5, 6, ... for the written indexes."""
        return [(5 + i, index) for i, index in enumerate(range(grant.num_cached_blocks, len(grant.block_ids)))]

    def push_all(self, sender: RouteSender, grant: Grant) -> None:
        for layer in range(LAYOUT.num_layers):
            sender.push(grant.grant_id, layer, self.pairs(grant))

    async def send(self, sender: RouteSender, grant: Grant, name: str, endpoint: object = None, timeout: float = 3.0) -> bytes:
        """The prefill worker's whole part. Raises what finish raises; aborted by then."""
        self.receiver(name).expect(grant)
        sender.open(grant, endpoint or self.receiver(name).endpoint())  # type: ignore[arg-type]
        self.push_all(sender, grant)
        try:
            return await sender.finish(grant.grant_id, timeout)
        except TandemError:
            await sender.abort(grant.grant_id)
            raise

    def is_verified(self, grant: Grant, digests: bytes, name: str) -> bool:
        """The decode worker's part of sealing."""
        self.receiver(name).forget(grant.grant_id)
        return not verify(self.target, grant, self.manifest(grant, digests))

    def is_equal(self, grant: Grant) -> bool:
        """Does the target hold what the source holds, in every slot that has a token?"""
        shape = (2, LAYOUT.num_kv_heads, LAYOUT.block_size, LAYOUT.head_dim * 4)
        for layer in range(LAYOUT.num_layers):
            for block, index in self.pairs(grant):
                used = min(LAYOUT.block_size, grant.num_tokens - index * LAYOUT.block_size)
                ours = self.source.runs[layer, block].reshape(shape)[:, :, :used]
                theirs = self.target.runs[layer, grant.block_ids[index]].reshape(shape)[:, :, :used]
                if not np.array_equal(ours, theirs):
                    return False
        return True

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        for receiver in self.receivers.values():
            receiver.close()
        self.source.close()
        self.target.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def run():
    """Run a coroutine to its end, with a deadline for the whole test."""

    def run_it(coroutine, timeout=30.0):
        return asyncio.run(asyncio.wait_for(coroutine, timeout))

    return run_it
