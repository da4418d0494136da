"""KV between groups of unequal sizes: whatever the ranks on either side, the decode worker's ranks hold the naive permutation of
the prefill worker's model, and a wrong byte on any route is found.
"""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from kvtransfer.faults import Fault, FaultyLane
from kvtransfer.layout import num_rows, plan_routes
from protocol.errors import HandshakeRefused, TandemError, TransferFailed
from protocol.parallel import ALONE, Parallel
from tests.kvtransfer.groups import Groups, layout_of, replaced

SIZES = [Parallel(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
PAIRS = list(itertools.product(SIZES, SIZES))


def can_split(num_heads: int, *parallels: Parallel) -> bool:
    return all(num_heads >= p.tp_size or p.tp_size % num_heads == 0 for p in parallels)


async def transfer(groups: Groups, grant) -> bytes:
    """Both workers' whole part, up to the seal."""
    await groups.receivers.expect(grant)
    await groups.sender.open(grant)
    groups.push(grant)
    digests = await groups.sender.finish(grant.grant_id, 5.0)
    await groups.receivers.forget(grant.grant_id, is_over=False)
    return digests


def in_groups(run, layout, source, target, transport, scenario, seed=0, **options):
    async def whole():
        groups = Groups(layout, source, target, transport, seed)
        try:
            groups.make_receivers()
            await groups.make_sender(**options)
            return await scenario(groups)
        finally:
            groups.close()

    return run(whole())


@pytest.mark.parametrize("transport", ["memory", "shm", "tcp"])
@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_every_pair_of_sizes_moves_the_same_bytes(run, transport, num_heads):
    async def scenario(groups):
        grant = groups.grant()
        digests = await transfer(groups, grant)
        assert len(digests) == num_rows(groups.layout, groups.source, groups.target) * 3 * 16
        assert await groups.receivers.verify(grant, groups.manifest(grant, digests)) == []
        groups.check(grant)

    for seed, (source, target) in enumerate(PAIRS):
        if can_split(num_heads, source, target):
            num_layers = 3 if num_heads < 8 else 5
            in_groups(run, layout_of(num_layers, num_heads), source, target, transport, scenario, seed)


def test_one_layer_and_many_heads_over_uneven_stages(run):
    """Three layers over two stages, one of which has two; and heads that do not divide evenly."""

    async def scenario(groups):
        grant = groups.grant()
        digests = await transfer(groups, grant)
        assert await groups.receivers.verify(grant, groups.manifest(grant, digests)) == []
        groups.check(grant)

    sizes = [(3, Parallel(2, 2), Parallel(1, 2)), (5, Parallel(4, 1), Parallel(2, 1)), (7, ALONE, Parallel(4, 2))]
    for heads, source, target in sizes:
        in_groups(run, layout_of(3, heads), source, target, "shm", scenario)


@pytest.mark.parametrize("transport", ["memory", "shm", "tcp"])
@pytest.mark.parametrize(("source", "target"), [(Parallel(2, 2), Parallel(1, 1)), (Parallel(1, 2), Parallel(4, 1))], ids=str)
def test_a_flip_on_any_route_is_found_and_named(run, transport, source, target):
    layout = layout_of(3, 4)

    async def scenario(groups):
        for number, route in enumerate(plan_routes(layout, source, target)):
            grant = groups.grant(grant_id=f"g{number}", request_id=f"r{number}")
            digests = await transfer(groups, grant)
            await asyncio.sleep(0)
            array = groups.array(groups.targets[route.target])
            layer, index = random.Random(number).randrange(route.num_layers), 2
            array[route.target_layer + layer, grant.block_ids[index], 1, route.target_head, 0, 3] ^= 8
            groups.rank_receivers[route.target].drop(grant.grant_id)  # else the flip came after the reading, as any later one
            bad = await groups.receivers.verify(grant, groups.manifest(grant, digests))
            assert bad == [(route.layer + layer, index)]

    in_groups(run, layout, source, target, transport, scenario)


@pytest.mark.parametrize("fault", [Fault.FLIP, Fault.DROP, Fault.MISDIRECT], ids=lambda fault: fault.value)
@pytest.mark.parametrize("transport", ["memory", "shm", "tcp"])
def test_what_a_lane_spoils_on_any_rank_is_never_taken(run, transport, fault):
    rng = random.Random(f"{transport} {fault}")
    is_spoiling = [False]

    def tamper(lane):
        return FaultyLane(lane, lambda: fault if is_spoiling[0] and rng.random() < 0.3 else None, rng)

    async def scenario(groups):
        refused = 0
        for number in range(20):
            is_spoiling[0] = number % 4 > 0
            grant = groups.grant(grant_id=f"g{number}")
            try:
                digests = await transfer(groups, grant)
                bad = await groups.receivers.verify(grant, groups.manifest(grant, digests))
            except TandemError:
                await groups.sender.abort(grant.grant_id)
                bad = ["refused"]
            refused += bool(bad)
            if not bad:
                groups.check(grant)
            assert is_spoiling[0] or not bad
            for pool in groups.targets:
                pool.runs[:] = 0xEE
        assert refused > 5

    in_groups(run, layout_of(3, 4), Parallel(2, 1), Parallel(1, 2), transport, scenario, tamper=tamper)


def test_what_landed_is_told_with_rows_of_the_manifest(run):
    """Each rank tells its own runs; together they are the manifest, row by row."""

    async def scenario(groups):
        grant = groups.grant()
        digests = await transfer(groups, grant)
        rows: dict[int, bytes] = {}
        for landed in groups.landed:
            assert (landed.grant_id, landed.first, landed.count) == (grant.grant_id, 1, 3)
            for i in range(landed.num_rows):
                rows[landed.row + i] = landed.digests[i * 48 : (i + 1) * 48]
        assert b"".join(rows[row] for row in sorted(rows)) == digests

    for source, target in [(ALONE, ALONE), (Parallel(2, 2), Parallel(1, 2)), (Parallel(1, 2), Parallel(4, 1))]:
        in_groups(run, layout_of(3, 4), source, target, "shm", scenario)


def test_landed_runs_are_hashed_ahead_and_the_seal_reads_nothing(run, monkeypatch):
    read = []

    async def scenario(groups):
        grant = groups.grant()
        await groups.receivers.expect(grant)
        await groups.sender.open(grant)
        groups.push(grant)
        digests = await groups.sender.finish(grant.grant_id, 5.0)
        for landed in groups.landed:
            groups.receivers.landed(grant, landed, "shm")
        await asyncio.sleep(0.05)
        await groups.receivers.forget(grant.grant_id, is_over=False)
        from kvtransfer import receiving

        verify = receiving.verify
        monkeypatch.setattr(receiving, "verify", lambda *args: read.append(args) or verify(*args))
        assert await groups.receivers.verify(grant, groups.manifest(grant, digests)) == []
        assert not read
        groups.check(grant)

    for source, target in [(ALONE, ALONE), (Parallel(2, 2), Parallel(1, 2))]:
        in_groups(run, layout_of(3, 4), source, target, "shm", scenario)


def test_a_run_that_is_stored_again_after_it_was_hashed(run):
    """The early digest is of the old bytes; the manifest decides, and the run is read again."""

    async def scenario(groups):
        grant = groups.grant()
        await groups.receivers.expect(grant)
        await groups.sender.open(grant)
        groups.push(grant)
        await asyncio.sleep(0.05)
        for landed in groups.landed:
            groups.receivers.landed(grant, landed, "shm")
        await asyncio.sleep(0.05)
        groups.model ^= 0xFF
        for pool in groups.sources:
            pool.runs[:] ^= 0xFF
        groups.push(grant)
        digests = await groups.sender.finish(grant.grant_id, 5.0)
        await groups.receivers.forget(grant.grant_id, is_over=False)
        assert await groups.receivers.verify(grant, groups.manifest(grant, digests)) == []
        groups.check(grant)

    in_groups(run, layout_of(3, 4), ALONE, ALONE, "shm", scenario)


def test_a_group_that_cannot_open_everywhere_is_open_nowhere(run):
    async def scenario(groups):
        grant = groups.grant()
        await groups.receivers.expect(grant)
        groups.others[1]._senders.disconnected(1)
        with pytest.raises(TransferFailed, match="no sender to decode worker D1"):
            await groups.sender.open(grant)
        assert "RankAbort" in groups.callers[1].log
        assert not groups.sender.push(grant.grant_id, 0, groups.pairs(grant))
        await groups.sender.abort(grant.grant_id)

    in_groups(run, layout_of(2, 2), Parallel(2, 1), ALONE, "shm", scenario)


def test_a_link_that_ends_after_its_successor_began_leaves_it_alone(run):
    """A pair that changes transports keeps the old link until its last prompt is over; then it alone is closed."""

    async def scenario(groups):
        old, late = groups.sender, groups.grant(grant_id="late", block_ids=(0, 1, 2, 8))
        await groups.receivers.expect(late)
        await old.open(late)
        new = await groups.connect()
        assert groups.callers[1].log == ["RankConnect", "RankOpen", "RankConnect"]
        groups.sender = old
        groups.push(late)
        digests = await old.finish("late", 5.0)
        assert await groups.receivers.verify(late, groups.manifest(late, digests)) == []
        old.close()
        await asyncio.sleep(0.05)
        assert groups.callers[1].log[-1] == "RankDisconnect"
        groups.sender = new
        grant = groups.grant()
        digests = await transfer(groups, grant)
        assert await groups.receivers.verify(grant, groups.manifest(grant, digests)) == []

    in_groups(run, layout_of(2, 2), Parallel(2, 1), ALONE, "shm", scenario)


def test_the_grant_decides_which_groups_meet(run):
    async def scenario(groups):
        await groups.sender.abort("nobody")
        for changes in ({"source": ALONE}, {"target": Parallel(2, 2)}):
            with pytest.raises(HandshakeRefused, match="this sender is from"):
                await groups.sender.open(replaced(groups.grant(), **changes))

    in_groups(run, layout_of(2, 2), Parallel(2, 1), Parallel(1, 2), "shm", scenario)


def test_endpoints_must_be_one_per_rank(run):
    async def scenario(groups):
        from kvtransfer.group import Connector

        connector = Connector(groups.sources[0], b"x", "P1")
        with pytest.raises(HandshakeRefused, match="1 endpoints for the 2 ranks"):
            await connector.connect("D1", Parallel(1, 2), groups.receivers.endpoints["shm"][:1], lambda *_: None)

    in_groups(run, layout_of(2, 2), ALONE, Parallel(1, 2), "shm", scenario)
