"""Words that are owed to decode workers whose connection broke."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from prefill.links import FIRST_DELAY_S, Links
from protocol.kv import KVLayout, MemoryEndpoint
from protocol.messages import Handshake, HandshakeAccepted, WriterDone

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32", model_hash="m")


class Network:
    """`stopped` takes connections and does not answer; everybody else shakes hands."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def connect(self, address, timeout=5.0):
        if address == "stopped":
            await asyncio.Event().wait()

        async def call(message, timeout):
            return HandshakeAccepted(address, LAYOUT, (MemoryEndpoint(1),))

        def send(message):
            assert isinstance(message, WriterDone)
            self.told.append((address, message.grant_id))

        return SimpleNamespace(is_closed=False, call=call, send=send)


async def test_one_that_does_not_answer_keeps_no_word_from_the_others():
    """Its blocks are in quarantine until it hears it."""
    network, now = Network(), 0.0

    async def connect(*_):
        return SimpleNamespace(close=lambda: None)

    links = Links(Handshake("P", LAYOUT, ("memory",), "boot"), connect, network, lambda: now, lambda _: None)
    links.writer_done(SimpleNamespace(decode_incarnation="stopped", control_address="stopped", grant_id="a"))
    now += FIRST_DELAY_S
    links.tick()
    await asyncio.sleep(0.01)
    links.writer_done(SimpleNamespace(decode_incarnation="well", control_address="well", grant_id="b"))
    now += FIRST_DELAY_S
    for _ in range(2):
        links.tick()
        await asyncio.sleep(0.01)
    assert network.told == [("well", "b")]
    assert links.num_owed == 1
