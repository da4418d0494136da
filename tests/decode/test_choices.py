"""Choices of one request that part ways: each is computed to its end, once."""

from __future__ import annotations

from types import SimpleNamespace

from protocol.messages import Reserve, TokenFrame
from protocol.ticket import Ticket, WorkerRef
from tests.system.local import cluster, request


async def test_a_choice_that_ended_is_not_begun_again_with_its_sibling():
    """Of two resumed choices the shorter comes back from preemption first, and ends before the prompt of the other is computed."""
    async with cluster(decode__max_num_batched_tokens=16, decode__max_num_seqs=8, prefill__replicas=0) as made:
        (decode,) = made.workers
        for loop in made._loops:
            loop.cancel()
        frames = []
        gateway = SimpleNamespace(is_closed=False, send=frames.append)
        ref = WorkerRef(decode.settings.incarnation, "decode", "d:1")
        wanted = request(range(40), n=2, max_tokens=10)
        delivered = (tuple(range(50, 55)), tuple(range(60, 69)))
        await decode.handle(gateway, Reserve(Ticket(wanted.request_id, 1, ref, None), wanted, delivered))
        mine = decode._sequences
        mine.preempt(mine.running[0])
        assert [sequence.choice for sequence in mine.preempted] == [1, 0]
        for _ in range(100):
            if not mine:
                break
            await decode.step()
        updates = [update for frame in frames if isinstance(frame, TokenFrame) for update in frame.updates]
        assert [update.index for update in updates if update.choice == 1] == [9]
        assert [update.index for update in updates if update.choice == 0] == [5, 6, 7, 8, 9]
        assert decode.is_idle
