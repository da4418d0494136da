"""Blocks of a grant that is over before its writer called: in a group they are nobody's until every rank refuses stores."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from decode.handover import Handover
from decode.job import Job
from engine.blocks import BlockPool
from kvtransfer.layout import Place
from protocol.kv import KVLayout, TcpEndpoint
from protocol.messages import Reserve
from protocol.parallel import Parallel
from protocol.request import Request, SamplingParams
from protocol.ticket import Ticket, WorkerRef

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32", model_hash="m")


class TwoRanks:
    """receiving.GroupReceivers; the other rank answers when it may. It takes what comes over tcp until it was told to forget."""

    is_alone = False
    place = Place(LAYOUT, Parallel(2, 1))

    def __init__(self, answer) -> None:
        self.endpoints = {"shm": (), "tcp": (TcpEndpoint("h", 1), TcpEndpoint("h", 2))}
        self.answer = answer
        self.may_answer = asyncio.Event()

    async def expect(self, grant):
        pass

    def forget_here(self, grant_id):
        return {"shm": False, "tcp": True}

    async def forget(self, grant_id, *, is_over):
        await self.may_answer.wait()
        return self.answer

    def drop(self, grant_id):
        pass


async def given_up(answer):
    """A grant for a writer whose connection broke: it is not known any more, and its KV connections may be there all the same."""
    pool, receivers = BlockPool(8, 4), TwoRanks(answer)
    network = SimpleNamespace(address="d:1")
    unused = lambda *_: None  # noqa: E731
    handover = Handover("D", LAYOUT, pool, receivers, network, lambda: 0.0, b"secret", unused, unused)
    ticket = Ticket("r", 1, WorkerRef("D", "decode", "d:1"), WorkerRef("P", "prefill", "p:1"))
    reserve = Reserve(ticket, Request(request_id="r", model="m", prompt_token_ids=(1,) * 12, sampling=SamplingParams()))
    job = Job(reserve, None)
    job.granted_blocks = pool.reserve(3)
    await handover.grant(job, 0, 12, reserve, ())
    handover.give_up(job)
    return pool, receivers


async def test_they_come_back_when_the_other_rank_has_answered():
    pool, receivers = await given_up({"shm": False, "tcp": True})
    await asyncio.sleep(0.01)
    assert pool.num_free == 5, "somebody else would compute into them on that rank"
    receivers.may_answer.set()
    await asyncio.sleep(0.01)
    assert pool.num_free == 8
    pool.check_integrity()


async def test_a_rank_that_does_not_answer_may_store_yet():
    pool, receivers = await given_up({"shm": False, "tcp": False})
    receivers.may_answer.set()
    await asyncio.sleep(0.01)
    assert pool.num_quarantined == 3
