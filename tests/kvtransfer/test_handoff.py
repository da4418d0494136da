"""The papers and the two state machines: each refusal by itself, then random histories that must keep the truth
rules.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.handoff import (
    INBOUND_MOVES,
    OUTBOUND_MOVES,
    Effect,
    Inbound,
    InboundPhase,
    OutboundPhase,
    cached_blocks,
    written_blocks,
)
from kvtransfer.outbound import Outbound
from protocol.errors import TransferFailed
from protocol.kv import KVLayout
from protocol.ticket import FirstToken, Grant, Landed, Manifest, sign

SECRET = b"secret"
LAYOUT = KVLayout(2, 1, 4, 4, "float32", "m")


def make_grant(grant_id="g", request_id="r", epoch=1, blocks=(7, 8, 9), num_cached=1, **changes) -> Grant:
    fields = {
        "decode_incarnation": "D1",
        "prefill_incarnation": "P1",
        "num_tokens": len(blocks) * 4,
        "layout": LAYOUT,
        "lease_s": 10.0,
        "endpoints": (),
        "control_address": "127.0.0.1:1",
    } | changes
    return sign(Grant(grant_id, request_id, epoch, block_ids=tuple(blocks), num_cached_blocks=num_cached, **fields), SECRET)


def make_manifest(grant: Grant, **changes) -> Manifest:
    num_written = len(written_blocks(grant))
    fields = {
        "decode_incarnation": grant.decode_incarnation,
        "prefill_incarnation": grant.prefill_incarnation,
        "num_written": num_written,
        "layout": grant.layout,
        "digests": bytes(16 * 2 * num_written),
        "first_tokens": (FirstToken(0, 5),),
        "grant_id": grant.grant_id,
        "request_id": grant.request_id,
        "epoch": grant.epoch,
    } | changes
    return sign(Manifest(**fields), SECRET)


@pytest.fixture
def inbound() -> Inbound:
    return Inbound("D1", LAYOUT, SECRET)


@pytest.fixture
def outbound() -> Outbound:
    return Outbound("P1", LAYOUT, SECRET)


# ---- decode side -----------------------------------------------------------------------------------------------------


def test_a_reservation_that_comes_twice_is_stale_also_when_its_grant_is_over():
    inbound = Inbound("D1", LAYOUT, SECRET)
    grant = make_grant()
    inbound.granted(grant, 0.0)
    assert inbound.cancelled("g", writer_stopped=True) is Effect.RELEASE
    with pytest.raises(TransferFailed, match="stale"):
        inbound.granted(grant, 1.0)


def test_the_good_way(inbound):
    grant = make_grant()
    assert (written_blocks(grant), cached_blocks(grant)) == ((8, 9), (7,))
    assert inbound.granted(grant, now=100.0) == []
    assert inbound.next_expiry() == 110.0
    inbound.check_seal(make_manifest(grant), now=101.0)
    assert inbound.phase("g") is InboundPhase.VERIFYING
    assert inbound.next_expiry() is None, "a lease does not end a verification"
    assert inbound.verified("g", ok=True) is Effect.KEEP
    assert "g" not in inbound


def test_wrong_bytes_go_back(inbound):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    inbound.check_seal(make_manifest(grant), 1.0)
    assert inbound.verified("g", ok=False) is Effect.RELEASE
    with pytest.raises(TransferFailed, match="is over"):
        inbound.check_seal(make_manifest(grant), 2.0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"grant_id": "other"}, "is unknown"),
        ({"request_id": "s"}, "request_id is 'r' in the grant, 's' in the manifest"),
        ({"epoch": 2}, "epoch is 1 in the grant, 2"),
        ({"epoch": 0}, "epoch is 1 in the grant, 0"),
        ({"decode_incarnation": "D0"}, "for decode incarnation D0, this is D1"),
        ({"prefill_incarnation": "P0"}, "prefill_incarnation is 'P1' in the grant, 'P0'"),
        ({"layout": KVLayout(2, 1, 4, 8, "float32", "m")}, "block_size: 4 here, 8 there"),
        ({"num_written": 3}, "2 blocks were granted, 3 written"),
        ({"digests": b"x" * 63}, "63 bytes of digests, expected 64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_manifest_that_does_not_match_is_refused_and_changes_nothing(inbound, changes, why):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    with pytest.raises(TransferFailed, match=why):
        inbound.check_seal(make_manifest(grant, **changes), 1.0)
    assert inbound.phase("g") is InboundPhase.RESERVED
    inbound.check_seal(make_manifest(grant), 1.0)


def test_a_forged_manifest_is_refused(inbound):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    good = make_manifest(grant)
    forged = [
        sign(good, b"another secret"),
        msgspec.structs.replace(good, digests=b"y" * 64),
        msgspec.structs.replace(good, first_tokens=(FirstToken(0, 6),)),
        msgspec.structs.replace(good, mac=b""),
        msgspec.structs.replace(good, mac=good.mac[:-1] + bytes([good.mac[-1] ^ 1])),
    ]
    for manifest in forged:
        with pytest.raises(TransferFailed, match="MAC is not ours"):
            inbound.check_seal(manifest, 1.0)
    inbound.check_seal(good, 1.0)


def test_a_manifest_is_used_once(inbound):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    inbound.check_seal(make_manifest(grant), 1.0)
    with pytest.raises(TransferFailed, match="already verifying"):
        inbound.check_seal(make_manifest(grant), 1.0)
    inbound.verified("g", ok=True)
    with pytest.raises(TransferFailed, match="is over"):
        inbound.check_seal(make_manifest(grant), 1.0)
    assert inbound.cancelled("g") is Effect.KEEP
    assert inbound.writer_done("g") is Effect.KEEP


def test_a_lease_ends(inbound):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    assert inbound.expired(9.999) == []
    assert inbound.expired(10.0) == ["g"]
    with pytest.raises(TransferFailed, match=r"lease of grant g ended 0\.500 s ago"):
        inbound.check_seal(make_manifest(grant), 10.5)
    assert inbound.cancelled("g", writer_stopped=False) is Effect.QUARANTINE
    assert inbound.expired(11.0) == []
    assert [held.grant_id for held in inbound.quarantined()] == ["g"]
    with pytest.raises(TransferFailed, match="already quarantined"):
        inbound.check_seal(make_manifest(grant), 9.0)
    assert inbound.cancelled("g", writer_stopped=True) is Effect.KEEP, "the way out is the writer's word, not a second cancel"
    assert inbound.writer_done("g") is Effect.LIFT
    assert inbound.writer_done("g") is Effect.KEEP


def test_a_transport_that_can_refuse_needs_no_quarantine(inbound):
    inbound.granted(make_grant(), 0.0)
    assert inbound.cancelled("g", writer_stopped=True) is Effect.RELEASE


def test_cancelled_while_being_verified(inbound):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    inbound.check_seal(make_manifest(grant), 1.0)
    assert inbound.cancelled("g") is Effect.KEEP, "a thread is reading the blocks"
    assert inbound.cancelled("g") is Effect.KEEP
    assert inbound.writer_lost("P1") == []
    assert inbound.verified("g", ok=True) is Effect.RELEASE, "good bytes that nobody wants"


def test_the_writer_gives_up_or_dies(inbound):
    for i in range(4):
        inbound.granted(make_grant(f"g{i}", f"r{i}", blocks=(i,), num_cached=0), 0.0)
    inbound.granted(make_grant("other", "s", blocks=(9,), num_cached=0, prefill_incarnation="P2"), 0.0)
    assert inbound.writer_done("g0") is Effect.RELEASE
    assert inbound.cancelled("g1") is Effect.QUARANTINE
    inbound.check_seal(make_manifest(inbound.grant("g2")), 1.0)
    assert sorted(inbound.writer_lost("P1")) == [("g1", Effect.LIFT), ("g3", Effect.RELEASE)]
    assert inbound.writer_lost("P1") == []
    assert inbound.verified("g2", ok=True) is Effect.KEEP
    assert inbound.phase("other") is InboundPhase.RESERVED


def test_a_newer_epoch_makes_the_older_attempt_void(inbound):
    old, new = make_grant("old", epoch=3, blocks=(1,), num_cached=0), make_grant("new", epoch=4, blocks=(2,), num_cached=0)
    inbound.granted(old, 0.0)
    assert inbound.granted(new, 1.0) == ["old"]
    with pytest.raises(TransferFailed, match="epoch 3 is stale, epoch 4"):
        inbound.check_seal(make_manifest(old), 1.0)
    assert inbound.cancelled("old") is Effect.QUARANTINE
    with pytest.raises(TransferFailed, match="epoch 3 is stale"):
        inbound.granted(make_grant("older", epoch=3, blocks=(3,), num_cached=0), 2.0)
    with pytest.raises(TransferFailed, match="epoch 4 is stale"):
        inbound.granted(make_grant("again", epoch=4, blocks=(3,), num_cached=0), 2.0)
    inbound.check_seal(make_manifest(new), 2.0)


def test_our_own_mistakes_are_asserted(inbound):
    inbound.granted(make_grant(), 0.0)
    wrong = [
        make_grant(request_id="s"),  # an id in use
        make_grant("h", "s", blocks=(1, 8), num_cached=0),  # a block with two writers
        make_grant("h", "s", blocks=(1, 1), num_cached=0),
        make_grant("h", "s", blocks=(1,), num_cached=2),
        make_grant("h", "s", blocks=(1,), num_cached=0, decode_incarnation="D0"),
        make_grant("h", "s", blocks=(1,), num_cached=0, prefill_incarnation=""),
        make_grant("h", "s", blocks=(1,), num_cached=0, lease_s=0.0),
        msgspec.structs.replace(make_grant("h", "s", blocks=(1,), num_cached=0), mac=b""),
    ]
    for grant in wrong:
        with pytest.raises(AssertionError):
            inbound.granted(grant, 0.0)
    inbound.granted(make_grant("h", "s", blocks=(7, 10), num_cached=1), 0.0)  # cached blocks are shared
    inbound.check_integrity()


def test_memory_of_what_ended_is_bounded():
    inbound = Inbound("D1", LAYOUT, SECRET, memory_s=100.0)
    for i in range(1000):
        inbound.granted(make_grant(f"g{i}", f"r{i}", blocks=(1,), num_cached=0), float(i))
        inbound.cancelled(f"g{i}", writer_stopped=True)
    assert len(inbound._ended) <= 102
    assert len(inbound._epochs) <= 102


# ---- prefill side ----------------------------------------------------------------------------------------------------


def test_the_good_way_out(outbound):
    grant = make_grant()
    outbound.opened(grant, 0.0)
    assert outbound.pushing("g")
    assert outbound.pushing("g")
    outbound.finishing("g")
    assert not outbound.pushing("g")
    manifest = outbound.sealed("g", bytes(64), (FirstToken(0, 5),))
    assert manifest == make_manifest(grant)
    assert "g" not in outbound
    assert outbound.stop_writing("g", 1.0) is True, "nothing of ours is under way"
    with pytest.raises(TransferFailed, match="already used"):
        outbound.opened(grant, 1.0)


@pytest.mark.parametrize(
    ("grant", "why"),
    [
        (make_grant(prefill_incarnation="P0"), "for prefill incarnation 'P0', this is 'P1'"),
        (make_grant(layout=KVLayout(2, 1, 4, 4, "float16", "m")), "dtype: 'float32' here, 'float16' there"),
        (msgspec.structs.replace(make_grant(), block_ids=(1, 2, 3)), "MAC is not ours"),
        (msgspec.structs.replace(make_grant(), mac=b"\0" * 32), "MAC is not ours"),
    ],
    ids=["incarnation", "layout", "changed", "forged"],
)
def test_a_grant_that_is_not_for_us_is_refused(outbound, grant, why):
    with pytest.raises(TransferFailed, match=why):
        outbound.opened(grant, 0.0)
    assert len(outbound) == 0


def test_stale_attempts_are_not_begun(outbound):
    outbound.opened(make_grant("g4", epoch=4), 0.0)
    for epoch in (3, 4):
        with pytest.raises(TransferFailed, match=f"epoch {epoch} of r is stale"):
            outbound.opened(make_grant(f"h{epoch}", epoch=epoch), 0.0)
    outbound.opened(make_grant("g5", epoch=5), 0.0)


def test_stop_writing_overtakes_the_grant(outbound):
    """Decode's StopWriting and the gateway's Prefill come over different connections."""
    assert outbound.stop_writing("g", 0.0) is True
    with pytest.raises(TransferFailed, match="stopped by its decode worker"):
        outbound.opened(make_grant(), 1.0)


@pytest.mark.parametrize("phase", [OutboundPhase.OPENED, OutboundPhase.PUSHING, OutboundPhase.FINISHING])
def test_stop_writing_at_any_time(outbound, phase):
    outbound.opened(make_grant(), 0.0)
    if phase is not OutboundPhase.OPENED:
        outbound.pushing("g")
    if phase is OutboundPhase.FINISHING:
        outbound.finishing("g")
    assert outbound.stop_writing("g", 1.0) is False, "abort first"
    assert outbound.stop_writing("g", 1.0) is False, "asked again: still not"
    assert not outbound.pushing("g")
    with pytest.raises(TransferFailed):
        outbound.finishing("g")
    with pytest.raises(TransferFailed):
        outbound.sealed("g", bytes(64), ())
    assert outbound.failing("g")
    outbound.aborted("g")
    outbound.aborted("g")
    assert outbound.stop_writing("g", 2.0) is True
    assert not outbound.failing("g")


def test_our_lease_ends(outbound):
    outbound.opened(make_grant("a", "ra"), 0.0)
    outbound.opened(make_grant("b", "rb", decode_incarnation="D2"), 5.0)
    assert outbound.next_expiry() == 10.0
    assert outbound.expired(10.0) == ["a"]
    outbound.failing("a")
    assert outbound.expired(10.0) == []
    assert outbound.next_expiry() == 15.0


def test_every_phase_is_in_its_table():
    assert set(INBOUND_MOVES) == set(InboundPhase)
    assert set(OUTBOUND_MOVES) == set(OutboundPhase)
    for table in (INBOUND_MOVES, OUTBOUND_MOVES):
        reached = {target for targets in table.values() for target in targets}
        assert len(reached) == len(table) - 1, "all but the first phase can be reached"


# ---- random histories ------------------------------------------------------------------------------------------------


class HandOff(RuleBasedStateMachine):
    """One decode worker, two lives of prefill, a pool of eight blocks, messages that are late, lost, repeated or
    overtaken.

    The machine keeps its own books: who owns each block, and which writer could still store into it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.inbound = Inbound("D1", LAYOUT, SECRET)
        self.outbound = {name: Outbound(name, LAYOUT, SECRET) for name in ("P1", "P2")}
        self.dead: set[str] = set()
        self.free = set(range(8))
        self.quarantine: set[int] = set()
        self.kept: set[int] = set()
        self.grants: dict[str, Grant] = {}
        self.writing: set[str] = set()  # grants into which a living writer may store right now
        self.ended: dict[str, Effect] = {}
        self.manifests: list[Manifest] = []
        self.verifying: set[str] = set()
        self.newest: dict[str, int] = {}
        self.next_id = 0

    def pick(self, data, ids):
        return data.draw(st.sampled_from(sorted(ids)))

    def apply(self, grant_id: str, effect: Effect) -> None:
        """The decode worker's pool, and what must hold when blocks go back."""
        blocks = set(written_blocks(self.grants[grant_id]))
        if effect is Effect.QUARANTINE:
            assert not blocks & self.quarantine
            self.quarantine |= blocks
        elif effect in (Effect.RELEASE, Effect.LIFT):
            assert grant_id not in self.writing, "blocks went back while their writer could still store"
            assert grant_id not in self.ended, "blocks went back twice"
            assert not blocks & self.free
            assert bool(blocks & self.quarantine) == (effect is Effect.LIFT)
            self.ended[grant_id] = effect
            self.quarantine -= blocks
            self.free |= blocks

    @precondition(lambda self: len(self.free) >= 2)
    @rule(data=st.data(), request=st.sampled_from("rs"), step=st.integers(0, 2), writer=st.sampled_from(["P1", "P2"]))
    def grant(self, data, request, step, writer):
        epoch = self.newest.get(request, 0) + step
        blocks = tuple(sorted(self.free)[: data.draw(st.integers(1, 2))])
        grant = make_grant(f"g{self.next_id}", request, epoch, blocks, num_cached=0, prefill_incarnation=writer)
        self.next_id += 1
        try:
            older = self.inbound.granted(grant, self.now)
        except TransferFailed:
            assert request in self.newest
            assert epoch <= self.newest[request], "a fresh epoch was refused"
            return
        assert epoch > self.newest.get(request, -1)
        self.newest[request] = epoch
        self.grants[grant.grant_id] = grant
        self.free -= set(blocks)
        for grant_id in older:
            self.apply(grant_id, self.inbound.cancelled(grant_id))

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def prefill_message(self, data):
        """The gateway's Prefill arrives: late, or again."""
        grant = self.grants[self.pick(data, self.grants)]
        writer = grant.prefill_incarnation
        if writer in self.dead:
            return
        try:
            self.outbound[writer].opened(grant, self.now)
        except TransferFailed:
            return
        assert grant.grant_id not in self.ended, "a writer began on blocks that had gone back"
        self.outbound[writer].pushing(grant.grant_id)
        self.writing.add(grant.grant_id)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def finish(self, data):
        grant_id = self.pick(data, self.writing)
        machine = self.outbound[self.grants[grant_id].prefill_incarnation]
        try:
            machine.finishing(grant_id)
            manifest = machine.sealed(grant_id, bytes(32 * len(written_blocks(self.grants[grant_id]))), ())
        except TransferFailed:
            return
        self.writing.discard(grant_id)
        self.manifests.append(manifest)

    @precondition(lambda self: self.manifests)
    @rule(data=st.data(), keep=st.booleans())
    def seal(self, data, keep):
        """A manifest arrives; `keep`: a copy of it is still on the way."""
        place = data.draw(st.integers(0, len(self.manifests) - 1))
        manifest = self.manifests[place] if keep else self.manifests.pop(place)
        try:
            self.inbound.check_seal(manifest, self.now)
        except TransferFailed:
            return
        assert manifest.grant_id not in self.ended
        assert manifest.epoch == self.newest[manifest.request_id], "a stale epoch was applied"
        self.verifying.add(manifest.grant_id)

    @precondition(lambda self: self.verifying)
    @rule(data=st.data(), ok=st.booleans())
    def verified(self, data, ok):
        grant_id = self.pick(data, self.verifying)
        self.verifying.discard(grant_id)
        effect = self.inbound.verified(grant_id, ok)
        if effect is Effect.KEEP:
            assert ok, "unverified KV was kept"
            assert grant_id not in self.ended
            self.ended[grant_id] = effect
            self.kept |= set(written_blocks(self.grants[grant_id]))
        self.apply(grant_id, effect)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def decoded(self, data):
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.kept.discard(block)
        self.free.add(block)

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def cancel(self, data):
        grant_id = self.pick(data, self.grants)
        if grant_id in self.inbound:
            self.apply(grant_id, self.inbound.cancelled(grant_id))

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds):
        self.now += seconds
        for grant_id in self.inbound.expired(self.now):
            self.apply(grant_id, self.inbound.cancelled(grant_id))

    @precondition(lambda self: self.inbound.quarantined())
    @rule(data=st.data())
    def stop_writing(self, data):
        """StopWriting arrives; where a store may be under way the writer aborts first, then says Ok."""
        grant = data.draw(st.sampled_from(self.inbound.quarantined()))
        writer = grant.prefill_incarnation
        if writer in self.dead:
            return
        if not self.outbound[writer].stop_writing(grant.grant_id, self.now):
            self.writing.discard(grant.grant_id)
            self.outbound[writer].aborted(grant.grant_id)
        self.apply(grant.grant_id, self.inbound.writer_done(grant.grant_id))

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def prefill_gives_up(self, data):
        grant_id = self.pick(data, self.writing)
        machine = self.outbound[self.grants[grant_id].prefill_incarnation]
        assert machine.failing(grant_id)
        self.writing.discard(grant_id)
        machine.aborted(grant_id)
        self.apply(grant_id, self.inbound.writer_done(grant_id))

    @rule(writer=st.sampled_from(["P1", "P2"]))
    def prefill_dies(self, writer):
        self.dead.add(writer)
        self.writing -= {grant_id for grant_id, grant in self.grants.items() if grant.prefill_incarnation == writer}
        for grant_id, effect in self.inbound.writer_lost(writer):
            self.apply(grant_id, effect)

    @rule(writer=st.sampled_from(["P1", "P2"]))
    def prefill_lives_again(self, writer):
        """For the test's sake under the same name, but with an empty memory only where nothing was granted to it."""
        if writer in self.dead and not any(g.prefill_incarnation == writer for g in self.grants.values()):
            self.dead.discard(writer)

    @invariant()
    def every_block_has_one_place(self):
        held = [block for i, g in self.grants.items() if i in self.inbound for block in written_blocks(g)]
        assert len(held) == len(set(held))
        assert not self.free & set(held)
        assert self.quarantine <= set(held)
        assert not self.kept & (self.free | set(held))
        assert self.free | set(held) | self.kept == set(range(8)), "a block was lost"
        self.inbound.check_integrity()

    @invariant()
    def nobody_writes_into_free_or_kept_blocks(self):
        for grant_id in self.writing:
            assert not set(written_blocks(self.grants[grant_id])) & (self.free | self.kept)

    def teardown(self):
        """Whatever happened: when all writers are seen dead and all verifications end, every block is back."""
        for grant_id in list(self.verifying):
            self.verified_at_end(grant_id)
        for writer in ("P1", "P2"):
            self.prefill_dies(writer)
        assert len(self.inbound) == 0
        assert self.free | self.kept == set(range(8))

    def verified_at_end(self, grant_id):
        self.verifying.discard(grant_id)
        effect = self.inbound.verified(grant_id, ok=False)
        assert effect is Effect.RELEASE
        self.apply(grant_id, effect)


HandOff.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHandOff = HandOff.TestCase


@given(st.binary(max_size=64), st.integers(0, 31))
@settings(max_examples=50, deadline=None)
def test_no_other_mac_is_accepted(mac, place):
    inbound = Inbound("D1", LAYOUT, SECRET)
    grant = make_grant()
    inbound.granted(grant, 0.0)
    good = make_manifest(grant)
    spoilt = bytearray(good.mac)
    spoilt[place] ^= 0x10
    for forged in (mac, bytes(spoilt)):
        if forged != good.mac:
            with pytest.raises(TransferFailed):
                inbound.check_seal(msgspec.structs.replace(good, mac=forged), 0.0)


# ---- runs that have landed -------------------------------------------------------------------------------------------


def make_landed(grant: Grant, secret=SECRET, **changes) -> Landed:
    fields = {
        "grant_id": grant.grant_id,
        "request_id": grant.request_id,
        "epoch": grant.epoch,
        "decode_incarnation": grant.decode_incarnation,
        "prefill_incarnation": grant.prefill_incarnation,
        "row": 0,
        "num_rows": 2,
        "first": 1,
        "count": 2,
        "digests": bytes(16 * 4),
    } | changes
    return sign(Landed(**fields), secret)


def test_landed_runs_are_believed_while_the_grant_is_reserved(inbound):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    for _ in range(3):  # said again, they move nothing
        assert inbound.check_landed(make_landed(grant), 1.0) == grant
        assert inbound.phase("g") is InboundPhase.RESERVED
    assert inbound.check_landed(make_landed(grant), 10.0) is None, "the lease is over"
    inbound.check_seal(make_manifest(grant), 9.0)
    assert inbound.check_landed(make_landed(grant), 9.0) is None, "sealing has begun"
    inbound.verified("g", True)
    assert inbound.check_landed(make_landed(grant), 9.0) is None


def test_landed_runs_of_what_is_void_are_nobodys(inbound):
    grant = make_grant()
    assert inbound.check_landed(make_landed(grant), 0.0) is None, "unknown"
    inbound.granted(grant, 0.0)
    inbound.cancelled("g", writer_stopped=False)
    assert inbound.check_landed(make_landed(grant), 1.0) is None, "quarantined"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"secret": b"other"}, "MAC is not ours"),
        ({"request_id": "s"}, "request_id is 'r' in the grant, 's' in the landed runs"),
        ({"epoch": 2}, "epoch is 1 in the grant, 2 in the landed runs"),
        ({"prefill_incarnation": "P2"}, "prefill_incarnation is 'P1' in the grant, 'P2'"),
        ({"decode_incarnation": "D2"}, "decode_incarnation is 'D1' in the grant, 'D2'"),
        ({"row": 1}, r"rows 1 \+ 2 of 2"),
        ({"row": -1}, r"rows -1 \+ 2 of 2"),
        ({"num_rows": 0, "digests": b""}, r"rows 0 \+ 0 of 2"),
        ({"first": 0}, r"blocks 0 \+ 2 of 3"),
        ({"first": 2}, r"blocks 2 \+ 2 of 3"),
        ({"count": 0, "digests": b""}, r"blocks 1 \+ 0 of 3"),
        ({"count": 1 << 40}, r"blocks 1 \+ 1099511627776 of 3"),
        ({"digests": bytes(16 * 3)}, "48 bytes of digests"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_landed_runs_outside_of_the_grant_are_refused(inbound, changes, why):
    grant = make_grant()
    inbound.granted(grant, 0.0)
    with pytest.raises(TransferFailed, match=why):
        inbound.check_landed(make_landed(grant, **changes), 1.0)
    assert inbound.phase("g") is InboundPhase.RESERVED
