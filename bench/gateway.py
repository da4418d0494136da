"""How much one gateway carries on one core: the real HTTP door under bare uvicorn, in front of an engine that costs nothing.

    python -m bench gateway
    python -m bench gateway --streams 64 --only tokens --profile gateway.prof

The gateway is a process of its own, pinned to a core: FastAPI routes, the walk, detokenizing, server-sent events, authenticated
frames. The other side is played here: a scheduler that admits at once, a decode worker that sends a token per sequence and step as
soon as a quarter of the last step has come out at the other end, and clients that only count. Two loads:

    tokens      so many streams at once, each one token per chunk: streamed tokens per second
    requests    chats of --prompt-words words and 8 streamed tokens, over kept connections: requests per second

Shown per second of wall time, and per second of the gateway's own CPU time, which says the same of a machine that others use too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import secrets
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil

from cluster.wire import SocketNetwork
from protocol.errors import InvalidRequest
from protocol.kv import KVLayout
from protocol.messages import (
    Admit,
    AskStatus,
    Cancel,
    GatewayBeat,
    Message,
    Ok,
    Outcome,
    Progress,
    Reserve,
    Status,
    TokenFrame,
    TokenUpdate,
    Withdraw,
)
from protocol.network import Peer
from protocol.ticket import Grant, Ticket, WorkerRef

MODEL = "bundled"
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", model_hash="bench")
NUM_SHORT = 8  # tokens of an answer where requests are counted
STALL_S = 0.2  # an engine that hears of no delivery for so long steps all the same
START_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("tokens", "requests"))
    parser.add_argument("--streams", type=int, default=256, help="at once, where tokens are counted (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="tokens in one frame of a worker (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of each stream (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="where requests are counted (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1500, help="in a round (default: %(default)s)")
    parser.add_argument("--prompt-words", type=int, default=64, help="where requests are counted (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="median and range of so many (default: %(default)s)")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="of the gateway (default: %(default)s)")
    parser.add_argument("--profile", type=Path, help="write the gateway's cProfile here; figures are then worth nothing")


def run(args: argparse.Namespace) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=_loop_factory("uvloop")) as runner:
        return runner.run(_run(args))


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    secret = secrets.token_bytes(32)
    engine = Engine(secret, args.batch)
    await engine.start()
    cores = sorted(os.sched_getaffinity(0))
    with _gateway(engine.network.address, secret, args.loop, cores[0], args.profile) as (process, port):
        if len(cores) > 1:
            os.sched_setaffinity(0, set(cores[1:]))
        try:
            rows = await _measure(args, engine, process, port)
        finally:
            os.sched_setaffinity(0, set(cores))
            await engine.network.close()
    return {"loop": args.loop, "streams": args.streams, "batch": args.batch, "rounds": rows}


async def _measure(
    args: argparse.Namespace, engine: Engine, process: psutil.Process, port: int
) -> dict[str, list[dict[str, float]]]:
    deadline = time.monotonic() + START_S
    while not await _is_healthy(port):
        if time.monotonic() > deadline:
            raise SystemExit(f"bench gateway: the gateway was not ready within {START_S:g} s")
        await asyncio.sleep(0.1)
    rng = random.Random(0)
    long = _body({"prompt": [rng.randrange(10, 500) for _ in range(32)], "max_tokens": args.tokens}, "/v1/completions")
    words = " ".join(
        rng.choice(("tandem", "serves", "prefill", "and", "decode", "apart", "on", "two", "cores"))
        for _ in range(args.prompt_words)
    )
    short = _body({"messages": [{"role": "user", "content": words}], "max_tokens": NUM_SHORT}, "/v1/chat/completions")
    loads = {
        "tokens": (long, args.tokens, args.streams, args.streams),
        "requests": (short, NUM_SHORT, args.requests, args.concurrency),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for name, (request, num_tokens, number, concurrency) in loads.items():
        if args.only in (None, name):
            await _round(engine, process, port, request, num_tokens, min(number, 2 * concurrency), concurrency)
            rows[name] = [await _round(engine, process, port, request, num_tokens, number, concurrency) for _ in range(args.rounds)]
            unit = "tokens" if name == "tokens" else "requests"
            for figure in (f"{unit}_per_s", f"{unit}_per_cpu_s"):
                values = [row[figure] for row in rows[name]]
                print(
                    f"{name:<9} {figure:<19} {statistics.median(values):9.0f}   ({min(values):.0f}-{max(values):.0f})", flush=True
                )
            row = rows[name][-1]
            shares = f"the gateway had {row['cpu_share']:.0%} of a core, the load {row['load_cpu_share']:.0%} of another"
            print(f"{name:<9} {row['chunks_per_read']:.2f} chunks per read; {shares}", flush=True)
    return rows


async def _round(
    engine: Engine, process: psutil.Process, port: int, request: bytes, num_tokens: int, number: int, concurrency: int
) -> dict[str, float]:
    left = iter(range(number))
    clients = [Client(engine, request, left) for _ in range(concurrency)]
    loop = asyncio.get_running_loop()
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    engine.num_chunks = engine.num_reads = 0
    before, mine, began = sum(process.cpu_times()[:2]), time.process_time(), time.perf_counter()
    for client in clients:
        client.next()
    await asyncio.gather(*(client.over for client in clients))
    seconds, cpu = time.perf_counter() - began, sum(process.cpu_times()[:2]) - before
    tokens = number * num_tokens
    return {
        "tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / cpu, "requests_per_s": number / seconds,
        "requests_per_cpu_s": number / cpu, "cpu_share": cpu / seconds,
        "load_cpu_share": (time.process_time() - mine) / seconds, "tokens_per_chunk": tokens / max(1, engine.num_chunks),
        "chunks_per_read": engine.num_chunks / max(1, engine.num_reads),
    }  # fmt: skip


def _body(asked: dict[str, Any], path: str) -> bytes:
    body = json.dumps({"model": MODEL, "stream": True, "ignore_eos": True, "temperature": 0.0, **asked}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _is_healthy(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return b" 200 " in line


class Client(asyncio.Protocol):
    """One kept connection: sends the next request when an answer is over. It counts chunks and looks at nothing else."""

    def __init__(self, engine: Engine, request: bytes, left: Iterator[int]) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._request = request
        self._left = left
        self._tail = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from asyncio's
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def next(self) -> None:
        if next(self._left, None) is None:
            self._transport.close()
            self.over.set_result(None)
        else:
            self._tail = b""
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        num = data.count(b"data: {")
        if num:
            self._engine.delivered(num)
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            if b"data: [DONE]" not in self._tail:
                self.over.set_exception(SystemExit(f"bench gateway: an answer ended badly: {data[-300:]!r}"))
                return
            self.next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(SystemExit(f"bench gateway: a connection broke: {error}"))


class Engine:
    """A scheduler and a decode worker of the right manners, which compute nothing."""

    def __init__(self, secret: bytes, batch: int) -> None:
        self.network = SocketNetwork("engine", secret)
        self.num_chunks = 0
        self.num_reads = 0
        self._batch = batch
        self._running: dict[str, tuple[Peer, int, int, int]] = {}  # request_id -> gateway, epoch, index, max_tokens
        self._epoch = 0
        self._waiting_for = 0  # tokens that have not come out yet
        self._go_on_at = 0  # with so many of them the next step is made
        self._wake = asyncio.Event()
        self._text = [random.Random(1).randrange(300, 500) for _ in range(997)]
        self._stepping: asyncio.Task[None]

    async def start(self) -> None:
        await self.network.serve(self.handle, lambda peer: None)
        self._stepping = asyncio.create_task(self._step_for_ever())

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        if isinstance(message, Admit):
            self._epoch += 1
            return Ticket(message.request_id, self._epoch, WorkerRef("decode-0-bench", "decode", self.network.address), None)
        if isinstance(message, Reserve):
            request = message.request
            self._running[request.request_id] = (peer, message.ticket.epoch, 0, request.sampling.max_tokens or 1)
            self._wake.set()
            papers = ("grant", request.request_id, message.ticket.epoch, "decode-0-bench", "")
            return Grant(*papers, (), 0, 0, LAYOUT, 30.0, (), self.network.address)
        if isinstance(message, AskStatus):
            worker = {"role": "decode", "alive": True, "model": MODEL, "stats": {"last_token_age_s": 1.0}}
            return Status(msgspec.json.encode({"workers": [worker]}))
        if isinstance(message, GatewayBeat):
            return Ok()
        if isinstance(message, Cancel):
            self._running.pop(message.request_id, None)
            return None
        if isinstance(message, (Outcome, Progress, Withdraw)):
            return None
        raise InvalidRequest(f"the fake engine does not take {type(message).__name__}")

    def delivered(self, num: int) -> None:
        self.num_chunks += num
        self.num_reads += 1
        self._waiting_for -= num
        if self._waiting_for <= self._go_on_at:
            self._wake.set()

    async def _step_for_ever(self) -> None:
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), STALL_S if self._running else None)
            if self._wake.is_set() and self._waiting_for > self._go_on_at:
                continue  # somebody came; the clients have not caught up yet
            self._waiting_for = max(0, self._waiting_for) if self._wake.is_set() else 0
            updates: dict[Peer, list[TokenUpdate]] = {}
            for request_id, (peer, epoch, index, limit) in list(self._running.items()):
                token, reason = self._text[(index * 7 + epoch) % 997], "length" if index + 1 == limit else None
                updates.setdefault(peer, []).append(TokenUpdate(request_id, epoch, 0, index, (token,), finish_reason=reason))
                if reason is not None:
                    del self._running[request_id]
                else:
                    self._running[request_id] = (peer, epoch, index + 1, limit)
            for peer, all_of in updates.items():
                self._waiting_for += len(all_of)
                self._go_on_at = len(all_of) * 3 // 4
                for start in range(0, len(all_of), self._batch):
                    peer.send(TokenFrame(tuple(all_of[start : start + self._batch])))


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """As uvicorn makes its loop. Raises SystemExit."""
    import uvicorn

    try:
        factory = uvicorn.Config("bench", loop=cast(Any, name)).get_loop_factory()
    except ImportError:
        raise SystemExit("bench gateway: uvloop is not installed (it comes with ray[serve]); --loop asyncio does without") from None
    return factory or asyncio.new_event_loop


# ---- the gateway's process -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _gateway(address: str, secret: bytes, loop: str, core: int, profile: Path | None) -> Iterator[tuple[psutil.Process, int]]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    child = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(address, secret, port, loop, core, profile), daemon=True
    )
    child.start()
    assert child.pid is not None
    try:
        yield psutil.Process(child.pid), port
    finally:
        child.terminate()
        child.join(20)
        if child.is_alive():
            child.kill()


def _serve(address: str, secret: bytes, port: int, loop: str, core: int, profile: Path | None) -> None:
    """The door as `cluster/deployments.py` builds it, without Ray around it."""
    import uvicorn

    from cluster.door import Door
    from configs.load import load

    os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends its serving by it, and then raises it again

    async def find_scheduler() -> str:
        return address

    async def main() -> None:
        door = Door(load(env={}).config, SocketNetwork("gateway-0", secret), find_scheduler, "gateway-0", secret)
        await door.start()
        config = uvicorn.Config(door.app, host="127.0.0.1", port=port, loop=loop, log_level="warning", access_log=False)
        await uvicorn.Server(config).serve()
        await door.close()

    profiler = None
    if profile is not None:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main())
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(profile)
