"""What a GPU's pool does, on CPU tensors: its view against the host's view, the sums that papers carry, and the cuda_ipc lane."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kernels import reference
from kvtransfer import process
from kvtransfer.cuda_ipc import CudaIpcLane, CudaIpcReceiver
from kvtransfer.device import DeviceView, lane_sum_digest
from kvtransfer.layout import Area, Place, plan_routes, rank_layout
from kvtransfer.outbox import Outbox
from kvtransfer.outgoing import Source
from kvtransfer.pool import KVPool
from kvtransfer.view import View, view_of
from protocol.errors import HandshakeRefused, TransferFailed, Unsupported
from protocol.kv import LANESUM, XXH3, CudaIpcEndpoint, KVLayout
from protocol.parallel import ALONE, Parallel

LAYOUTS = [
    KVLayout(num_layers=4, num_kv_heads=4, head_dim=8, block_size=4, dtype="float32", model_hash="m"),
    KVLayout(num_layers=4, num_kv_heads=4, head_dim=6, block_size=5, dtype="bfloat16", model_hash="m"),
    KVLayout(num_layers=4, num_kv_heads=4, head_dim=3, block_size=2, dtype="uint8", model_hash="m"),
]
AREAS = [None, Area(1, 2, 0, 4), Area(0, 4, 1, 2), Area(3, 1, 3, 1)]


def filled(layout: KVLayout, num_blocks: int = 12, seed: int = 3) -> KVPool:
    pool = KVPool(layout, num_blocks)
    pool.runs[:] = np.random.default_rng(seed).integers(0, 256, pool.runs.shape, np.uint8)
    return pool


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
@pytest.mark.parametrize("area", AREAS, ids=["all", "layers", "heads", "one"])
def test_it_is_the_hosts_view_of_the_same_memory(layout, area):
    pool = filled(layout)
    ours, theirs = DeviceView(pool.tensor, layout, area), View(pool.runs, layout, area)
    assert (ours.layout, ours.num_blocks, ours.is_contiguous) == (theirs.layout, theirs.num_blocks, theirs.is_contiguous)
    blocks = [7, 2, 3, 11]
    for layer in range(ours.layout.num_layers):
        assert np.array_equal(ours.read(layer, 3, 5), theirs.read(layer, 3, 5))
        assert ours.digests(layer, blocks) == theirs.digests(layer, blocks)
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (4, ours.layout.run_nbytes), np.uint8)
    ours.write(0, blocks, data)
    written = pool.runs.copy()
    pool.runs[:] = filled(layout).runs
    theirs.write(0, blocks, data)
    assert np.array_equal(pool.runs, written)
    data = rng.integers(0, 256, (4, ours.layout.run_nbytes), np.uint8)
    (buffer,) = ours.buffers(0, blocks)
    buffer[:] = data.tobytes()
    before = pool.runs.copy()
    assert np.array_equal(pool.runs, before), "received is not stored"
    ours.commit(0, blocks)
    for i, block in enumerate(blocks):
        assert np.array_equal(theirs.read(0, block, 1)[0], data[i])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
@pytest.mark.parametrize("area", AREAS, ids=["all", "layers", "heads", "one"])
def test_lane_sums_are_the_twins(layout, area):
    pool = filled(layout)
    view, packed = DeviceView(pool.tensor, layout, area, LANESUM), View(pool.runs, layout, area)
    by_hand = lane_sum_digest(view.layout)
    everything = view.lane_sums([5, 0])
    for layer in range(view.layout.num_layers):
        digests = view.digests(layer, [5, 0])
        assert everything[32 * layer : 32 * (layer + 1)] == digests
        for i, block in enumerate([5, 0]):
            run = packed.read(layer, block, 1)[0]
            assert digests[16 * i : 16 * (i + 1)] == by_hand(np.ascontiguousarray(run).data)
            nbytes = next(n for n in (8, 4, 2, 1) if run.size // (2 * view.layout.num_kv_heads * layout.block_size) % n == 0)
            lanes = torch.from_numpy(np.ascontiguousarray(run)).view(
                {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[nbytes]
            )
            first, second = reference.lane_sums(lanes)
            assert digests[16 * i : 16 * (i + 1)] == first.to_bytes(8, "little") + second.to_bytes(8, "little")


def test_the_kind_is_one_of_two_and_fits_the_memory():
    pool = filled(LAYOUTS[0])
    with pytest.raises(TransferFailed, match="'md5' are not known here"):
        DeviceView(pool.tensor, pool.layout, None, "md5")
    with pytest.raises(TransferFailed, match="'lanesum-128' are not for host memory"):
        view_of(pool, None, LANESUM)
    assert isinstance(view_of(pool), View)


# ---- cuda_ipc ----------------------------------------------------------------------------------------------------------


class OnDevice(Source):
    """A source whose pool is taken for a GPU's."""

    def __init__(self, pool, route=None, layout=None, source=ALONE, target=ALONE):
        super().__init__(pool, route, layout, source, target)
        self.view = DeviceView(pool.tensor, pool.layout, self.route.source_area, LANESUM)
        self.digest = self.view.host_digest()


def endpoint_of(pool: KVPool, **changes) -> CudaIpcEndpoint:
    fields = {"boot_id": process.boot_id(), "pid": 1, "device_uuid": "GPU-1", "handle": b"h" * 64, "nbytes": pool.nbytes} | changes
    return CudaIpcEndpoint(**fields)


@pytest.fixture
def peer(monkeypatch):
    """The decode worker's process: this one, under another number."""
    import os

    observe = process.observe
    monkeypatch.setattr(process, "observe", lambda boot, pid, ticks=0: observe(boot, os.getpid()) if pid == 1 else None)


def ipc_sender(source: Source, pool: KVPool, endpoint: CudaIpcEndpoint) -> Outbox:
    return Outbox(CudaIpcLane(endpoint, source, pool.layout, lambda endpoint, layout, own: pool.tensor), source)


async def test_a_transfer_lands_with_the_digests_of_what_landed(pair, run, peer):
    source = OnDevice(pair.source)
    endpoint = endpoint_of(pair.target)
    sender = ipc_sender(source, pair.target, endpoint)
    await sender.ready(5.0)
    before = pair.target.runs.copy()
    grant = pair.grant(endpoints=(endpoint,))
    sender.open(grant, endpoint)
    pair.push_all(sender, grant)
    digests = await sender.finish(grant.grant_id, 5.0)
    assert pair.is_equal(grant)
    landed = DeviceView(pair.target.tensor, pair.layout, None, LANESUM)
    assert digests == landed.lane_sums(grant.block_ids[1:]), "the zeroed end of the last block included"
    untouched = [block for block in range(pair.target.num_blocks) if block not in grant.block_ids[1:]]
    assert np.array_equal(pair.target.runs[:, untouched], before[:, untouched])
    assert sender.stats.nbytes == 2 * pair.layout.block_nbytes
    pair.target.runs[1, grant.block_ids[2], 5] ^= 16
    assert digests != landed.lane_sums(grant.block_ids[1:])
    sender.close()


async def test_what_was_not_pushed_fails_and_abort_returns(pair, peer):
    endpoint = endpoint_of(pair.target)
    sender = ipc_sender(OnDevice(pair.source), pair.target, endpoint)
    grant = pair.grant(endpoints=(endpoint,))
    sender.open(grant, endpoint)
    sender.push(grant.grant_id, 0, pair.pairs(grant))
    with pytest.raises(TransferFailed, match="2 of 4 runs .* were never pushed"):
        await sender.finish(grant.grant_id, 5.0)
    await sender.abort(grant.grant_id)
    assert not sender.push(grant.grant_id, 1, pair.pairs(grant))
    sender.close()


async def test_abort_waits_until_the_device_has_done_the_last_store(pair, peer, monkeypatch):
    """Its word ends a quarantine, so it must not be given while a kernel may still store."""
    import asyncio
    import threading

    reached = threading.Event()

    class Event:
        def synchronize(self):
            reached.wait(10)

    monkeypatch.setattr(DeviceView, "recorded", lambda self: Event())
    endpoint = endpoint_of(pair.target)
    sender = ipc_sender(OnDevice(pair.source), pair.target, endpoint)
    grant = pair.grant(endpoints=(endpoint,))
    sender.open(grant, endpoint)
    pair.push_all(sender, grant)
    while sender.stats.nbytes < 2 * pair.layout.block_nbytes:
        await asyncio.sleep(0.005)
    stopping = asyncio.create_task(sender.abort(grant.grant_id))
    await asyncio.sleep(0.1)
    assert not stopping.done()
    reached.set()
    await asyncio.wait_for(stopping, 5.0)
    sender.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"boot_id": "other"}, "another host"),
        ({"pid": 2}, "process 2 is not visible"),
        ({"nbytes": 1000}, "not a number of our blocks"),
    ],
)
def test_it_refuses_what_is_not_reachable(pair, peer, changes, why):
    with pytest.raises(HandshakeRefused, match=why):
        ipc_sender(OnDevice(pair.source), pair.target, endpoint_of(pair.target, **changes))
    with pytest.raises(HandshakeRefused, match="not on a GPU"):
        ipc_sender(Source(pair.source), pair.target, endpoint_of(pair.target))
    with pytest.raises(Unsupported, match="cuda_ipc: the KV pool is on cpu"):
        CudaIpcReceiver(pair.target)


@pytest.mark.parametrize(("source_tp", "target_tp", "pp"), [(1, 2, 1), (2, 1, 2), (4, 2, 1), (2, 4, 2)])
async def test_every_route_between_unequal_groups(pair, peer, source_tp, target_tp, pp):
    """Each head and layer of the prompt lands on the rank that wants it, and nothing beside it is touched."""
    whole, source, target = LAYOUTS[1], Parallel(source_tp, 1), Parallel(target_tp, pp)
    rng = random.Random(source_tp * 10 + target_tp)
    truth = torch.randint(0, 256, (4, 6, 2, 4, 5, 12), dtype=torch.uint8)  # the whole model's KV of six blocks
    pools = {rank: filled(rank_layout(whole, target, rank), seed=rank) for rank in range(target.num_ranks)}
    untouched = {rank: pool.tensor.view(torch.uint8).clone() for rank, pool in pools.items()}
    sources = {rank: filled(rank_layout(whole, source, rank), seed=9 + rank) for rank in range(source.num_ranks)}
    blocks = tuple(rng.sample(range(12), 4))
    endpoints = {rank: endpoint_of(pool) for rank, pool in pools.items()}
    grant = pair.grant(
        blocks, 0, 4 * 5, layout=whole, source=source, target=target, endpoints=tuple(endpoints.values()), prefill_incarnation="P1"
    )
    for route in plan_routes(whole, source, target):
        pool = sources[route.source]
        layers = slice(route.layer, route.layer + route.num_layers)
        heads = slice(route.head, route.head + route.num_heads)
        area = route.source_area
        mine = pool.tensor.view(torch.uint8)[
            area.layer : area.layer + area.num_layers, :, :, area.head : area.head + area.num_heads
        ]
        mine[:, :6] = truth[layers, :, :, heads]
        sender = ipc_sender(OnDevice(pool, route, whole, source, target), pools[route.target], endpoints[route.target])
        sender.open(grant, endpoints[route.target])
        for layer in range(route.num_layers):
            assert sender.push(grant.grant_id, layer, [(i, i) for i in range(4)])
        digests = await sender.finish(grant.grant_id, 5.0)
        theirs = DeviceView(pools[route.target].tensor, pools[route.target].layout, route.target_area, LANESUM)
        assert digests == theirs.lane_sums(blocks)
        sender.close()
    for rank, pool in pools.items():
        place = Place(whole, target, rank)
        layers, heads = next(
            (slice(r.layer - r.target_layer, None), slice(r.head - r.target_head, None))
            for r in plan_routes(whole, source, target)
            if r.target == rank
        )
        expected = untouched[rank]
        num_layers, num_heads = expected.shape[0], expected.shape[3]
        expected[:, list(blocks)] = truth[layers, :4, :, heads][:num_layers, :, :, :num_heads]
        assert torch.equal(pool.tensor.view(torch.uint8), expected), place


def test_xxh3_is_what_papers_mean_without_a_word(pair):
    assert pair.manifest(pair.grant(), bytes(64)).digest == XXH3
