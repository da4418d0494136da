"""KV between two processes' pools on GPUs, over every transport: `pytest -m gpu tests/kvtransfer` on a machine with one.

The harness itself runs everywhere: the tests without the marker take the same way between pools in host memory.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from kvtransfer import gpu
from kvtransfer.handoff import written_blocks
from kvtransfer.layout import num_used_slots
from kvtransfer.link import TRANSPORTS, make_sender, usable
from kvtransfer.pool import KVPool
from protocol.errors import ConfigError, HandshakeRefused
from protocol.kv import KVLayout
from protocol.ticket import Grant, Manifest, sign
from tests.kvtransfer.gpu_peer import SECRET, Peer

NUM_BLOCKS = 48
BLOCKS = (9, 3, 4, 40, 17, 2, 47)
FLOATS = ["bfloat16", "float16", "float8_e4m3fn", "float32"]
needs_cupy = pytest.mark.skipif(not gpu.has_cupy(), reason="CuPy is not installed")


def layout_of(dtype: str) -> KVLayout:
    return KVLayout(num_layers=4, num_kv_heads=8, head_dim=128, block_size=16, dtype=dtype, model_hash="m")


class Handover:
    """One transfer from our pool to the peer's, and what a decode worker would do about it."""

    def __init__(self, source: KVPool, peer: Peer, transport: str, grant_id: str = "g") -> None:
        self.source, self.peer, self.transport = source, peer, transport
        self.layout = source.layout
        self.endpoint = peer.endpoints[transport]
        self.grant = sign(
            Grant(
                grant_id=grant_id,
                request_id="r",
                epoch=1,
                decode_incarnation="D1",
                prefill_incarnation="P1",
                block_ids=BLOCKS,
                num_cached_blocks=2,
                num_tokens=len(BLOCKS) * self.layout.block_size - 5,
                layout=self.layout,
                lease_s=60.0,
                endpoints=tuple(peer.endpoints.values()),
                control_address="",
            ),
            SECRET,
        )
        self.pairs = [(30 + i, index) for i, index in enumerate(range(2, len(BLOCKS)))]

    async def run(self, sender) -> Manifest:
        self.peer.order("expect", grant=self.grant)
        sender.open(self.grant, self.endpoint)
        for layer in range(self.layout.num_layers):
            assert sender.push(self.grant.grant_id, layer, self.pairs)
        digests = await sender.finish(self.grant.grant_id, 60.0)
        manifest = Manifest(
            grant_id=self.grant.grant_id,
            request_id="r",
            epoch=1,
            decode_incarnation="D1",
            prefill_incarnation="P1",
            num_written=len(written_blocks(self.grant)),
            layout=self.layout,
            digests=digests,
            first_tokens=(),
            digest=TRANSPORTS[self.transport].digest,
        )
        return sign(manifest, SECRET)

    def sender(self):
        return make_sender(
            self.endpoint,
            self.source,
            SECRET,
            incarnation="P1",
            peer_incarnation="D1",
            connect_timeout_s=10.0,
            stall_timeout_s=10.0,
        )

    def check_bytes(self) -> None:
        """What the peer holds is what we hold, zeros behind the last token, and nothing else was touched."""
        raw = self.source.tensor.view(torch.uint8).cpu().numpy()
        layout = self.layout
        for layer in range(layout.num_layers):
            for block, index in self.pairs:
                expected = raw[layer, block].copy()
                expected[:, :, num_used_slots(layout, self.grant.num_tokens, index) :] = 0
                got = self.peer.run(layer, BLOCKS[index])
                assert got == expected.tobytes(), f"layer {layer}, index {index}"
            for block in (BLOCKS[0], BLOCKS[1], 0, 5, 46):
                assert set(self.peer.run(layer, block)) == {0xA5}, f"layer {layer}, block {block} was not granted"


def random_pool(layout: KVLayout, device: str, num_blocks: int = NUM_BLOCKS) -> KVPool:
    pool = KVPool(layout, num_blocks, device)
    raw = pool.tensor.view(torch.uint8)
    generator = torch.Generator().manual_seed(1)
    raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
    if pool.is_on_gpu:
        torch.cuda.synchronize()
    return pool


async def hand_over(transport: str, dtype: str, ours: str, theirs: str) -> None:
    source = random_pool(layout_of(dtype), ours)
    peer = Peer(source.layout, NUM_BLOCKS, theirs, (transport,))
    try:
        handover = Handover(source, peer, transport)
        sender = handover.sender()
        try:
            await sender.ready(60.0)
            manifest = await handover.run(sender)
            refuses = peer.order("forget", grant=handover.grant).refuses
            assert refuses == {transport: transport not in ("shm", "cuda_ipc")}
            assert peer.order("verify", grant=handover.grant, manifest=manifest).bad == ()
            handover.check_bytes()
            peer.order("flip", layer=2, block=BLOCKS[4])
            assert peer.order("verify", grant=handover.grant, manifest=manifest).bad == ((2, 4),)
        finally:
            sender.close()
    finally:
        peer.close()
        source.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_the_harness_between_host_pools(transport):
    await hand_over(transport, "bfloat16", "cpu", "cpu")


def test_each_memory_has_its_transports():
    host = KVPool(layout_of("float16"), 2)
    assert usable(("cuda_ipc", "nccl", "shm", "tcp", "memory"), host) == ("shm", "tcp", "memory")
    with pytest.raises(ConfigError, match="--kv-transport nccl does not work for KV on cpu"):
        usable(("nccl",), host)


@pytest.mark.gpu
@needs_cupy
@pytest.mark.parametrize("dtype", FLOATS)
async def test_cuda_ipc_between_two_processes(dtype):
    await hand_over("cuda_ipc", dtype, "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
async def test_tcp_between_gpu_pools(dtype):
    await hand_over("tcp", dtype, "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("ours", "theirs"), [("cuda", "cpu"), ("cpu", "cuda")])
async def test_tcp_between_a_gpu_and_host_memory(ours, theirs):
    await hand_over("tcp", "bfloat16", ours, theirs)


@pytest.mark.gpu
@needs_cupy
async def test_nccl_between_two_processes():
    if torch.cuda.device_count() > 1:
        await hand_over("nccl", "bfloat16", "cuda:0", "cuda:1")
        return
    with pytest.raises(HandshakeRefused, match="NCCL does not connect a GPU with itself"):
        await hand_over("nccl", "bfloat16", "cuda", "cuda")
    pytest.skip("one GPU only: the two ends refuse each other, as they should, and nothing can be sent")


@pytest.mark.gpu
@needs_cupy
def test_a_pool_is_plain_memory_with_a_handle_and_goes_back():
    torch.zeros(1, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    pool = KVPool(layout_of("bfloat16"), 512, "cuda")
    assert pool.tensor.is_contiguous()
    assert not pool.tensor.view(torch.uint8).any()
    assert len(gpu.export(pool.tensor)) == 64
    assert before - torch.cuda.mem_get_info()[0] >= pool.nbytes
    kept = pool.tensor
    pool.close()
    kept.fill_(1.0)  # a view that outlives the pool is still memory
    torch.cuda.synchronize()
    del kept
    assert before - torch.cuda.mem_get_info()[0] < pool.nbytes // 2
    with pytest.raises(ConfigError, match="lower --gpu-memory-utilization"):
        KVPool(layout_of("float32"), 1 << 22, "cuda")


@pytest.mark.gpu
@needs_cupy
async def test_what_is_sent_is_what_the_engine_had_launched_not_what_had_ended():
    """The push comes while the engine's kernels are still queued behind a long one; the bytes are those of after."""
    source = random_pool(layout_of("bfloat16"), "cuda")
    peer = Peer(source.layout, NUM_BLOCKS, "cuda", ("cuda_ipc",))
    handover = Handover(source, peer, "cuda_ipc")
    sender = handover.sender()
    try:
        await sender.ready(60.0)
        torch.cuda._sleep(400_000_000)  # about 0.2 s
        source.tensor.view(torch.uint8).fill_(7)
        manifest = await handover.run(sender)
        assert peer.order("verify", grant=handover.grant, manifest=manifest).bad == ()
        handover.check_bytes()
        assert set(peer.run(3, BLOCKS[2])) == {7}
    finally:
        sender.close()
        peer.close()
        source.close()


@pytest.mark.gpu
@needs_cupy
async def test_it_says_when_the_decode_worker_is_dead():
    source = random_pool(layout_of("bfloat16"), "cuda")
    peer = Peer(source.layout, NUM_BLOCKS, "cuda", ("cuda_ipc",))
    handover = Handover(source, peer, "cuda_ipc")
    sender = handover.sender()
    try:
        await sender.ready(60.0)
        peer.order("expect", grant=handover.grant)
        sender.open(handover.grant, handover.endpoint)
        peer._process.kill()
        peer._process.wait()
        for layer in range(4):
            sender.push(handover.grant.grant_id, layer, handover.pairs)
        with pytest.raises(Exception, match="is dead"):
            await sender.finish(handover.grant.grant_id, 30.0)
        await sender.abort(handover.grant.grant_id)
    finally:
        sender.close()
        source.close()


@pytest.mark.gpu
async def test_inside_one_process_over_memory():
    from kvtransfer.digest import verify
    from kvtransfer.link import make_receivers

    source, target = random_pool(layout_of("bfloat16"), "cuda"), KVPool(layout_of("bfloat16"), NUM_BLOCKS, "cuda")
    receivers = make_receivers(target, ["memory"], SECRET)

    class Here:
        endpoints = {"memory": receivers["memory"].endpoint()}

        def order(self, do, grant):
            receivers["memory"].expect(grant)

    handover = Handover(source, Here(), "memory")  # type: ignore[arg-type]
    sender = handover.sender()
    manifest = await handover.run(sender)
    assert verify(target, handover.grant, manifest) == []
    sender.close()


@pytest.mark.gpu
def test_the_host_tier_of_a_gpu_pool():
    from engine.blocks import BlockPool
    from engine.host_tier import HostTier

    pool = random_pool(layout_of("bfloat16"), "cuda", 8)
    raw = pool.tensor.view(torch.uint8)
    truth = raw.clone()
    tier = HostTier(pool, 16 * pool.layout.block_nbytes)
    blocks = BlockPool(8, 16, tier=tier)
    held = blocks.allocate(8)
    hashes = [bytes([i]) for i in range(8)]
    for block, block_hash in zip(held, hashes, strict=True):
        blocks.seal(block, block_hash)
    blocks.release(held)
    taken = blocks.allocate(8)
    raw.fill_(0)
    blocks.release(taken)
    tier.spoil(hashes[6], 12345)
    found = blocks.match(hashes)
    assert len(found) == 6
    assert tier.stats.digest_failures == 1
    for block, original in zip(found, held, strict=False):
        assert torch.equal(raw[:, block], truth[:, original])


@pytest.mark.gpu
@needs_cupy
async def test_how_long_4096_tokens_of_an_8b_model_take(capsys):
    """Printed, with a bound that only a broken path would miss: 512 MiB by one kernel per layer between two processes."""
    layout = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16", model_hash="m")
    source = KVPool(layout, 600, "cuda")
    source.tensor.view(torch.uint8).random_(0, 256)
    torch.cuda.synchronize()
    peer = Peer(layout, 600, "cuda", ("cuda_ipc",))
    handover = Handover(source, peer, "cuda_ipc")
    sender = handover.sender()
    try:
        await sender.ready(60.0)
        order = np.random.default_rng(0).permutation(600)[:256].tolist()
        times = []
        for attempt in range(12):
            grant = sign(
                Grant(
                    grant_id=f"g{attempt}",
                    request_id="r",
                    epoch=1,
                    decode_incarnation="D1",
                    prefill_incarnation="P1",
                    block_ids=tuple(order),
                    num_cached_blocks=0,
                    num_tokens=4096,
                    layout=layout,
                    lease_s=60.0,
                    endpoints=tuple(peer.endpoints.values()),
                    control_address="",
                ),
                SECRET,
            )
            sender.open(grant, handover.endpoint)
            started = time.perf_counter()
            for layer in range(32):
                sender.push(grant.grant_id, layer, [(i, i) for i in range(256)])
            digests = await sender.finish(grant.grant_id, 30.0)
            times.append(time.perf_counter() - started)
        manifest = Manifest("g11", "r", 1, "D1", "P1", 256, layout, digests, (), digest="lanesum-128")
        started = time.perf_counter()
        assert peer.order("verify", grant=grant, manifest=manifest).bad == ()
        verified = time.perf_counter() - started
        median = float(np.median(times[2:]))
        with capsys.disabled():
            print(
                f"\n4096 tokens, {256 * layout.block_nbytes / 2**20:.0f} MiB over cuda_ipc: {median * 1e3:.2f} ms, "
                f"{256 * layout.block_nbytes / median / 1e9:.0f} GB/s (min {min(times) * 1e3:.2f} ms); verified in "
                f"{verified * 1e3:.2f} ms, the pipe to the other process included"
            )
        assert median < 0.1
    finally:
        sender.close()
        peer.close()
        source.close()
