"""Two groups of ranks in one process: each rank a pool of its own, the other ranks called directly instead of over a connection."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np

from kvtransfer.group import Connector, RankTransfers
from kvtransfer.handoff import written_blocks
from kvtransfer.layout import Place, num_used_slots, rank_layout
from kvtransfer.link import make_receivers
from kvtransfer.pool import KVPool
from kvtransfer.receiving import GroupReceivers, RankReceivers
from protocol.errors import TandemError, from_failure, to_failure
from protocol.kv import DTYPE_NBYTES, KVLayout
from protocol.parallel import Parallel, heads_of, layers_of
from protocol.rank import decode, encode
from protocol.ticket import Grant, Manifest, sign

SECRET = b"the cluster's secret"
NUM_BLOCKS = 12


class Caller:
    """receiving.RankCaller to a rank in this process, through the wire form of every message."""

    def __init__(self, handle) -> None:
        self.handle = handle
        self.log: list[str] = []

    async def call(self, message, timeout):
        self.log.append(type(message).__name__)
        try:
            answer = await asyncio.wait_for(self.handle(decode(encode(message))), timeout)
        except TandemError as error:
            raise from_failure(to_failure(error)) from None
        assert answer is not None, f"{message} was not answered"
        return decode(encode(answer))

    def send(self, message) -> None:
        self.log.append(type(message).__name__)
        asyncio.get_running_loop().create_task(self.handle(decode(encode(message))))


def slices(layout: KVLayout, parallel: Parallel, rank: int) -> tuple[slice, slice]:
    """(layers, heads) of a rank, for the whole model's array."""
    layers = layers_of(layout.num_layers, parallel, parallel.pp_rank(rank))
    heads = heads_of(layout.num_kv_heads, parallel, parallel.tp_rank(rank))
    return slice(layers.start, layers.stop), slice(heads.start, heads.stop)


async def inline(function):
    return function()


class Groups:
    """`model`: the source's KV as one array [layers, blocks, 2, heads, slots, row bytes]. `targets`, `sources`: pools by rank."""

    def __init__(self, layout: KVLayout, source: Parallel, target: Parallel, transport: str, seed: int = 0) -> None:
        self.layout, self.source, self.target, self.transport = layout, source, target, transport
        rng = np.random.default_rng(seed)
        row = layout.head_dim * DTYPE_NBYTES[layout.dtype]
        shape = (layout.num_layers, NUM_BLOCKS, 2, layout.num_kv_heads, layout.block_size, row)
        self.model = rng.integers(0, 256, shape, np.uint8)
        self.sources = [KVPool(rank_layout(layout, source, rank), NUM_BLOCKS) for rank in range(source.num_ranks)]
        self.targets = [KVPool(rank_layout(layout, target, rank), NUM_BLOCKS) for rank in range(target.num_ranks)]
        for rank, pool in enumerate(self.sources):
            layers, heads = slices(layout, source, rank)
            self.array(pool)[:] = self.model[layers, :, :, heads]
        for pool in self.targets:
            pool.runs[:] = 0xEE
        self.landed: list = []

    def array(self, pool: KVPool) -> np.ndarray:
        one = pool.layout
        row = one.head_dim * DTYPE_NBYTES[one.dtype]
        return pool.runs.reshape(one.num_layers, NUM_BLOCKS, 2, one.num_kv_heads, one.block_size, row)

    def make_receivers(self) -> GroupReceivers:
        """With the event loop running."""
        self.rank_receivers = []
        for rank, pool in enumerate(self.targets):
            place = Place(self.layout, self.target, rank)
            receivers = make_receivers(pool, [self.transport], SECRET, incarnation="D1", place=place, stall_timeout_s=2.0)
            self.rank_receivers.append(RankReceivers(pool, receivers, inline, place))
        own, *others = self.rank_receivers
        self.decode_callers = {
            rank: Caller(RankTransfers(None, receivers, lambda _: None).handle) for rank, receivers in enumerate(others, 1)
        }
        theirs = {rank: (self.decode_callers[rank], receivers.endpoints()) for rank, receivers in enumerate(others, 1)}
        self.receivers = GroupReceivers(own, theirs)
        return self.receivers

    async def make_sender(self, **options):
        options = {"stall_timeout_s": 2.0, "connect_timeout_s": 2.0} | options
        self.others = {}
        for rank in range(1, self.source.num_ranks):
            connector = Connector(self.sources[rank], SECRET, "P1", Place(self.layout, self.source, rank), **options)
            self.others[rank] = RankTransfers(connector, None, lambda message: self.landed.append(message.landed))
        self.callers = {rank: Caller(transfers.handle) for rank, transfers in self.others.items()}
        self.leader = Connector(self.sources[0], SECRET, "P1", Place(self.layout, self.source), self.callers, **options)
        return await self.connect()

    async def connect(self):
        endpoints = self.receivers.endpoints[self.transport]
        self.sender = await self.leader.connect("D1", self.target, endpoints, lambda grant, landed: self.landed.append(landed))
        return self.sender

    def grant(self, blocks=(9, 3, 4, 7), num_cached=1, num_tokens=None, **changes) -> Grant:
        fields = {
            "grant_id": "g",
            "request_id": "r",
            "epoch": 1,
            "decode_incarnation": "D1",
            "prefill_incarnation": "P1",
            "block_ids": blocks,
            "num_cached_blocks": num_cached,
            "num_tokens": len(blocks) * self.layout.block_size - 1 if num_tokens is None else num_tokens,
            "layout": self.layout,
            "lease_s": 10.0,
            "endpoints": tuple(end for of_one in self.receivers.endpoints.values() for end in of_one),
            "control_address": "127.0.0.1:1",
            "source": self.source,
            "target": self.target,
        } | changes
        return sign(Grant(**fields), SECRET)

    def pairs(self, grant: Grant) -> list[tuple[int, int]]:
        """Source blocks 5, 6, ... for the written indexes."""
        return [(5 + i, index) for i, index in enumerate(range(grant.num_cached_blocks, len(grant.block_ids)))]

    def push(self, grant: Grant, pairs=None, layers=None) -> None:
        """As the step's hooks do, rank by rank."""
        for rank, pool in enumerate(self.sources):
            push = self.sender.push if rank == 0 else self.others[rank].push
            for layer in layers if layers is not None else range(pool.layout.num_layers):
                push(grant.grant_id, layer, pairs if pairs is not None else self.pairs(grant))

    def manifest(self, grant: Grant, digests: bytes) -> Manifest:
        return sign(
            Manifest(
                grant_id=grant.grant_id,
                request_id=grant.request_id,
                epoch=grant.epoch,
                decode_incarnation="D1",
                prefill_incarnation="P1",
                num_written=len(written_blocks(grant)),
                layout=grant.layout,
                digests=digests,
                first_tokens=(),
            ),
            SECRET,
        )

    def expected(self, grant: Grant) -> np.ndarray:
        """The naive permutation: what a decode worker of one rank would hold."""
        wanted = np.full_like(self.model, 0xEE)
        for block, index in self.pairs(grant):
            used = num_used_slots(self.layout, grant.num_tokens, index)
            wanted[:, grant.block_ids[index]] = 0
            wanted[:, grant.block_ids[index], :, :, :used] = self.model[:, block, :, :, :used]
        return wanted

    def check(self, grant: Grant) -> None:
        wanted = self.expected(grant)
        for rank, pool in enumerate(self.targets):
            layers, heads = slices(self.layout, self.target, rank)
            assert np.array_equal(self.array(pool), wanted[layers, :, :, heads]), f"rank {rank} of {self.target}"

    def close(self) -> None:
        if hasattr(self, "sender"):
            self.sender.close()
            for transfers in self.others.values():
                transfers.close()
        for receivers in getattr(self, "rank_receivers", []):
            receivers.close()
        for pool in [*self.sources, *self.targets]:
            pool.close()


def layout_of(num_layers: int, num_heads: int) -> KVLayout:
    return KVLayout(num_layers=num_layers, num_kv_heads=num_heads, head_dim=4, block_size=4, dtype="float32", model_hash="m")


def replaced(grant: Grant, **changes) -> Grant:
    return sign(msgspec.structs.replace(grant, **changes), SECRET)
