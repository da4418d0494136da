"""The decode end of `bench kv`, a process of its own: a pool with its receivers, a plain socket, a decode worker without a model.

Reads one JSON object a line from standard input and answers each with one line. Started by `bench/kv.py` only.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec

from cluster.wire import SocketNetwork
from decode.worker import DecodeWorker, Settings
from engine.blocks import BlockPool
from kvtransfer.link import make_receivers
from kvtransfer.pool import KVPool
from kvtransfer.receiving import GroupReceivers, RankReceivers
from protocol.kv import KVLayout, ShmEndpoint, TcpEndpoint
from protocol.ticket import Grant, Manifest

LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32", model_hash="bench")
SECRET = b"one secret for two processes"
NUM_BLOCKS = 160
DECODE = "decode-0-bench"


class Hello(msgspec.Struct):
    """The first line of the peer."""

    shm: ShmEndpoint
    tcp: TcpEndpoint
    raw_port: int
    address: str


def encoded(paper: Any) -> str:
    """A paper as a JSON string."""
    return base64.b64encode(msgspec.msgpack.encode(paper)).decode()


def _decoded(text: str, kind: Any) -> Any:
    return msgspec.msgpack.decode(base64.b64decode(text), type=kind)


class Peer:
    """See the module. `accepted` holds, for each grant that was sealed, when its sequences were open."""

    def __init__(self) -> None:
        self.pool = KVPool(LAYOUT, NUM_BLOCKS)
        self.pool.runs[:] = 1  # every page is there before anything is measured
        self.network = SocketNetwork("decode", SECRET)
        self.accepted: asyncio.Queue[float] = asyncio.Queue()
        verify = ThreadPoolExecutor(1, "verify")
        loop = asyncio.get_running_loop()
        self.receivers = make_receivers(self.pool, ("shm", "tcp"), SECRET, incarnation=DECODE)
        ranks = RankReceivers(self.pool, self.receivers, lambda function: loop.run_in_executor(verify, function))
        self.ranks = ranks
        settings = Settings(incarnation=DECODE, layout=LAYOUT, max_model_len=NUM_BLOCKS * LAYOUT.block_size)
        runner: Any = SimpleNamespace()  # never run: each request is cancelled as soon as it has been taken in
        blocks = BlockPool(NUM_BLOCKS, LAYOUT.block_size, enable_prefix_caching=False)
        compute = ThreadPoolExecutor(1, "engine")
        self.worker = DecodeWorker(
            settings,
            runner,
            blocks,
            GroupReceivers(ranks),
            self.network,
            time.monotonic,
            lambda function: loop.run_in_executor(compute, function),
            SECRET,
        )
        seal = self.worker._seal

        async def watched(message: Any) -> Any:
            answer = await seal(message)
            self.accepted.put_nowait(time.monotonic())
            return answer

        self.worker._seal = watched  # type: ignore[method-assign]
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._sink, daemon=True).start()

    def _sink(self) -> None:
        """The plain end of a socket pair: bytes into the pool, one byte back after each message."""
        sock, _ = self.listener.accept()
        flat = self.pool.runs.reshape(-1).data
        while head := sock.recv(8, socket.MSG_WAITALL):
            left, start = int.from_bytes(head, "big"), 0
            while left:
                count = sock.recv_into(flat[start : start + min(left, 1 << 20)])
                start, left = start + count, left - count
            sock.sendall(b"x")

    async def answer(self, asked: dict[str, Any]) -> Any:
        if asked["do"] == "expect":
            grant = _decoded(asked["grant"], Grant)
            self.ranks.expect(grant)
        elif asked["do"] == "verify":
            grant, manifest = _decoded(asked["grant"], Grant), _decoded(asked["manifest"], Manifest)
            self.ranks.forget(grant.grant_id)
            started = time.perf_counter()
            bad = await self.ranks.verify(grant, manifest)
            return {"num_bad": len(bad), "seconds": time.perf_counter() - started}
        elif asked["do"] == "forget":
            self.ranks.forget(asked["grant_id"])
            self.ranks.drop(asked["grant_id"])
        elif asked["do"] == "accepted":
            return await asyncio.wait_for(self.accepted.get(), 30)
        return {}

    async def run(self) -> None:
        await self.worker.start()
        address = self.network.address
        shm, tcp = self.receivers["shm"].endpoint(), self.receivers["tcp"].endpoint()
        assert isinstance(shm, ShmEndpoint)
        assert isinstance(tcp, TcpEndpoint)
        _say(msgspec.to_builtins(Hello(shm, tcp, self.listener.getsockname()[1], address)))
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        async for line in lines:
            _say(await self.answer(json.loads(line)))
        for receiver in self.receivers.values():
            receiver.close()


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def main() -> None:
    await Peer().run()


if __name__ == "__main__":
    asyncio.run(main())
