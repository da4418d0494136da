"""KV transfer between two real processes: each transport against the plain copy it is made of, and what of it is left to wait for.

A shape like a 135M-parameter Llama (30 layers, 3 KV heads, head_dim 64, float32), a prompt of 2,048 tokens. Every limit is
measured in the same run, alternating with what is held against it; medians. Two processes on this host, loopback.

    shm      all layers through the sender into the peer's mapped pool, without and with digests   against one memcpy into it
    tcp      the same over loopback, digests at both ends                                           against a raw socket pair
    digest   hashing all runs once                                                                 against computing that prefill
    exposed  last on_layer returned -> sequence open at an idle decode worker, whole workers in both processes; the prompt in
             chunks of 512 tokens, and in one                                                      against one layer's transfer
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.kv_peer import DECODE, LAYOUT, NUM_BLOCKS, SECRET, Hello, encoded
from cluster.wire import SocketNetwork
from engine.blocks import BlockPool
from engine.runner import StepResult
from engine.sampler import Sample
from engine.stats import StepStats
from kvtransfer.group import Connector
from kvtransfer.link import make_sender
from kvtransfer.outgoing import Source, Transfer
from kvtransfer.pool import KVPool
from kvtransfer.process import boot_id, start_ticks
from kvtransfer.shm import ShmLane
from kvtransfer.view import run_digest
from prefill.worker import PrefillWorker, Settings
from protocol.kv import KVEndpoint
from protocol.messages import Cancel, Ok, Prefill, RequestFailed, Reserve
from protocol.request import Request, SamplingParams
from protocol.ticket import Grant, Manifest, Ticket, WorkerRef, sign

PROMPT_LEN = 2048
PREFILL = "prefill-0-bench"
HIDDEN, INTERMEDIATE, NUM_HEADS = 576, 1536, 9  # what computing one layer takes
SLACK_S = 1.5e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--runs", type=int, default=15)
    parser.add_argument("--exposed-runs", type=int, default=15)


def run(args: argparse.Namespace) -> dict[str, Any]:
    result = asyncio.run(_Bench(args.runs, args.exposed_runs).run())
    _print(result)
    return result


class _Bench:
    """Everything of one run; `samples` by name, in seconds."""

    def __init__(self, num_runs: int, num_exposed: int) -> None:
        self.num_runs = num_runs
        self.num_exposed = num_exposed
        self.samples: dict[str, list[float]] = {}
        self.pool = KVPool(LAYOUT, NUM_BLOCKS)
        self.pool.runs[:] = np.random.default_rng(0).integers(0, 256, self.pool.runs.shape, np.uint8)
        self.num_blocks = LAYOUT.num_blocks_for(PROMPT_LEN)
        self.nbytes = self.num_blocks * LAYOUT.block_nbytes
        self._ids = itertools.count()
        root = Path(__file__).resolve().parent.parent
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.kv_peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert self._child.stdout is not None
        self.peer = msgspec.json.decode(self._child.stdout.readline(), type=Hello)

    def ask(self, **asked: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(asked) + "\n")
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline())

    def took(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    async def run(self) -> dict[str, Any]:
        try:
            await self._throughput()
            self._digest()
            for name, chunk in (("512", 512), ("whole", PROMPT_LEN)):
                await _Exposed(self, name, chunk).run()
        finally:
            assert self._child.stdin is not None
            self._child.stdin.close()
            self._child.wait(10)
        return self._result()

    # ---- throughput ------------------------------------------------------------------------------------------------

    async def _throughput(self) -> None:
        lane = ShmLane(self.peer.shm, LAYOUT)
        assert lane._view is not None
        target, rows = lane._view._parts[:, : self.num_blocks, 0], self.pool.runs[:, : self.num_blocks]
        raw = socket.create_connection(("127.0.0.1", self.peer.raw_port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain = Source(self.pool, digest=None)
        senders: dict[str, tuple[KVEndpoint, Source]] = {
            "shm": (self.peer.shm, Source(self.pool)),
            "shm, no digest": (self.peer.shm, plain),
            "tcp": (self.peer.tcp, Source(self.pool)),
        }
        made = {
            name: make_sender(end, self.pool, SECRET, incarnation=PREFILL, peer_incarnation=DECODE, source=source)
            for name, (end, source) in senders.items()
        }
        for i in range(self.num_runs + 1):  # the first one warms up
            timed: dict[str, float] = {}
            timed["memcpy"] = _time(lambda: _copy(target, rows))
            timed["raw socket"] = _time(lambda: self._send_raw(raw))
            for name, (end, _) in senders.items():
                timed[name], timed[f"{name}, verify"] = await self._send(made[name], end, has_digests=name != "shm, no digest")
            if i:
                for name, seconds in timed.items():
                    self.took(name, seconds)
        for sender in made.values():
            sender.close()
        raw.close()

    def _send_raw(self, sock: socket.socket) -> None:
        sock.sendall(self.nbytes.to_bytes(8, "big"))
        for layer in range(LAYOUT.num_layers):
            sock.sendall(self.pool.runs[layer, : self.num_blocks].reshape(-1).data)
        sock.recv(1)

    async def _send(self, sender: Any, endpoint: KVEndpoint, has_digests: bool) -> tuple[float, float]:
        """-> seconds until everything has landed, seconds of verifying it afterwards as far as it was not hashed before."""
        grant = self.grant()
        pairs = [(block, block) for block in range(self.num_blocks)]
        self.ask(do="expect", grant=encoded(grant))
        started = time.perf_counter()
        sender.open(grant, endpoint)
        for layer in range(LAYOUT.num_layers):
            sender.push(grant.grant_id, layer, pairs)
        digests = await sender.finish(grant.grant_id, 30.0)
        seconds = time.perf_counter() - started
        if not has_digests:
            self.ask(do="forget", grant_id=grant.grant_id)
            return seconds, 0.0
        verdict = self.ask(do="verify", grant=encoded(grant), manifest=encoded(_manifest(grant, digests)))
        assert verdict["num_bad"] == 0, "the bytes did not arrive"
        return seconds, verdict["seconds"]

    def grant(self) -> Grant:
        number = next(self._ids)
        return sign(
            Grant(
                grant_id=f"g{number}",
                request_id=f"r{number}",
                epoch=1,
                decode_incarnation=DECODE,
                prefill_incarnation=PREFILL,
                block_ids=tuple(range(self.num_blocks)),
                num_cached_blocks=0,
                num_tokens=PROMPT_LEN,
                layout=LAYOUT,
                lease_s=60.0,
                endpoints=(self.peer.shm, self.peer.tcp),
                control_address=self.peer.address,
            ),
            SECRET,
        )

    # ---- digest ----------------------------------------------------------------------------------------------------

    def _digest(self) -> None:
        """Against the matrix products of the same prefill, which are most of it."""
        import torch

        runs, width = self.pool.runs, LAYOUT.run_nbytes

        def hash_all() -> None:
            for layer in range(LAYOUT.num_layers):
                flat = runs[layer].reshape(-1).data
                for block in range(self.num_blocks):
                    run_digest(flat[block * width : (block + 1) * width])

        kv_width = LAYOUT.num_kv_heads * LAYOUT.head_dim
        shapes = [(HIDDEN, HIDDEN + 2 * kv_width), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
        weights = [torch.randn(shape) for shape in shapes]
        inputs = [torch.randn(PROMPT_LEN, shape[0]) for shape in shapes]
        query = torch.randn(1, NUM_HEADS, PROMPT_LEN, LAYOUT.head_dim)

        def one_layer() -> None:
            with torch.inference_mode():
                for x, weight in zip(inputs, weights, strict=True):
                    x @ weight
                torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

        one_layer()
        for _ in range(max(5, self.num_runs // 2)):
            self.took("digest", _time(hash_all))
            self.took("prefill, one layer", _time(one_layer))

    # ---- the figures -----------------------------------------------------------------------------------------------

    def _result(self) -> dict[str, Any]:
        median = {name: statistics.median(values) for name, values in self.samples.items()}
        rates = {name: self.nbytes / median[name] / 1e9 for name in ("memcpy", "shm, no digest", "shm", "raw socket", "tcp")}
        prefill_s = LAYOUT.num_layers * median["prefill, one layer"]
        ratios = {
            "shm without digest / memcpy": (_ratio(self.samples, "memcpy", "shm, no digest"), 0.85),
            "shm with digest / memcpy": (_ratio(self.samples, "memcpy", "shm"), 0.50),
            "tcp with digest / raw socket": (_ratio(self.samples, "raw socket", "tcp"), 0.85),
        }
        limits = {"digest / prefill": (median["digest"] / prefill_s, 0.01)}
        for name in ("512", "whole"):
            allowed = median[f"layer {name}"] + SLACK_S
            limits[f"exposed {name} [ms]"] = (1e3 * median[f"exposed {name}"], 1e3 * allowed)
        return {
            "prompt_len": PROMPT_LEN,
            "nbytes": self.nbytes,
            "gb_per_s": rates,
            "prefill_s": prefill_s,
            "medians_s": median,
            "at_least": {name: {"is": value, "wanted": wanted} for name, (value, wanted) in ratios.items()},
            "at_most": {name: {"is": value, "wanted": wanted} for name, (value, wanted) in limits.items()},
            "samples_s": self.samples,
        }


class _Runner:
    """engine.runner.ModelRunner without a model: a while for each layer, then token 1. ended_at: when the last hook ended."""

    def __init__(self, layer_s: float) -> None:
        self.ended_at = 0.0
        self._layer_s = layer_s
        self._matrix = np.random.default_rng(0).random((160, 160), np.float32)

    def run(self, chunks: list[Any], on_layer: Callable[[int], None], extras: Any = None) -> StepResult:
        for layer in range(LAYOUT.num_layers):
            until = time.perf_counter() + self._layer_s
            while time.perf_counter() < until:  # busy, and without the GIL for most of it, as a model is
                self._matrix @ self._matrix
            on_layer(layer)
        self.ended_at = time.monotonic()
        samples = [Sample(sequence, 7) for chunk in chunks for sequence in chunk.samples]
        return StepResult(samples, {}, StepStats(1, 0, 1, 0, len(samples), 0.1, 0.1, 0.0))


class _Exposed:
    """A whole prefill worker here, a whole decode worker in the peer, one prompt at a time."""

    def __init__(self, bench: _Bench, name: str, chunk: int) -> None:
        self.bench = bench
        self.name = name
        self.chunk = chunk
        self.runner = _Runner(5e-3)
        self.failures: list[RequestFailed] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        bench = self.bench
        incarnation = f"{PREFILL}-{self.name}"
        network = SocketNetwork(incarnation, SECRET)
        gateway = SocketNetwork("gateway", SECRET)
        settings = Settings(
            incarnation=incarnation,
            layout=LAYOUT,
            max_model_len=NUM_BLOCKS * LAYOUT.block_size,
            transports=("shm",),
            boot_id=boot_id(),
            pid=os.getpid(),
            start_ticks=start_ticks(),
            max_num_batched_tokens=self.chunk,
        )
        engine = ThreadPoolExecutor(1, "engine")
        blocks = BlockPool(NUM_BLOCKS, LAYOUT.block_size, enable_prefix_caching=False)
        runner: Any = self.runner
        worker = PrefillWorker(
            settings,
            runner,
            blocks,
            Connector(bench.pool, SECRET, incarnation),
            network,
            time.monotonic,
            lambda function: loop.run_in_executor(engine, function),
            SECRET,
        )
        await worker.start()
        await gateway.serve(self._heard, lambda peer: None)
        task = asyncio.create_task(worker.run())
        try:
            decode, prefill = await gateway.connect(bench.peer.address), await gateway.connect(network.address)
            for i in range(bench.num_exposed + 2):
                exposed = await self._one(incarnation, decode, prefill, network.address)
                layer = self._layer()
                if i > 1:
                    bench.took(f"exposed {self.name}", exposed)
                    bench.took(f"layer {self.name}", layer)
                while not worker.is_idle:
                    await asyncio.sleep(0.005)
        finally:
            task.cancel()
            await gateway.close()
            await network.close()

    async def _heard(self, peer: Any, message: Any) -> None:
        if isinstance(message, RequestFailed):
            self.failures.append(message)

    async def _one(self, incarnation: str, decode: Any, prefill: Any, address: str) -> float:
        number = next(self.bench._ids)
        request = Request(
            request_id=f"e{number}",
            model="",
            prompt_token_ids=tuple((number * 7919 + i) % 30000 for i in range(PROMPT_LEN)),
            sampling=SamplingParams(temperature=0.0, max_tokens=8, seed=0, ignore_eos=True),
        )
        ticket = Ticket(
            request.request_id, 1, WorkerRef(DECODE, "decode", self.bench.peer.address), WorkerRef(incarnation, "prefill", address)
        )
        grant = await decode.call(Reserve(ticket, request), 5)
        assert isinstance(await prefill.call(Prefill(ticket, grant, request), 5), Ok)
        accepted = await asyncio.to_thread(self.bench.ask, do="accepted")
        assert not self.failures, self.failures
        decode.send(Cancel(request.request_id))
        await asyncio.sleep(0.05)
        return float(accepted) - self.runner.ended_at

    def _layer(self) -> float:
        """Hash and copy the last chunk's runs of one layer, as the sender's thread does, while nothing else goes on."""
        bench = self.bench
        pairs = [(block, block) for block in range(min(self.chunk // LAYOUT.block_size, bench.num_blocks))]
        lane = ShmLane(bench.peer.shm, LAYOUT)
        transfer = Transfer(bench.grant(), Source(bench.pool))
        seconds = []
        for layer in range(8):
            started = time.perf_counter()
            lane.store(transfer, layer, transfer.prepare(layer, pairs))
            seconds.append(time.perf_counter() - started)
        lane.close()
        return statistics.median(seconds[1:])


def _manifest(grant: Grant, digests: bytes) -> Manifest:
    manifest = Manifest(
        grant_id=grant.grant_id,
        request_id=grant.request_id,
        epoch=grant.epoch,
        decode_incarnation=grant.decode_incarnation,
        prefill_incarnation=grant.prefill_incarnation,
        num_written=len(grant.block_ids),
        layout=grant.layout,
        digests=digests,
        first_tokens=(),
    )
    return sign(manifest, SECRET)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """[num_layers, ...] each, a layer at a time, which is how it lies in memory."""
    for layer in range(len(source)):
        np.copyto(target[layer], source[layer])


def _time(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _ratio(samples: dict[str, list[float]], limit: str, name: str) -> float:
    """The median of the pairs that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(samples[limit], samples[name], strict=True))


def _print(result: dict[str, Any]) -> None:
    print(f"{result['nbytes'] / 1e6:.0f} MB, {result['prompt_len']} tokens; {threading.active_count()} threads left")
    for name, rate in result["gb_per_s"].items():
        print(f"  {name:<28} {rate:8.2f} GB/s")
    for name in ("shm, verify", "tcp, verify"):
        print(f"  {name:<28} {1e3 * result['medians_s'][name]:8.2f} ms after everything landed, nothing hashed ahead over shm")
    for word, rows in (("at least", result["at_least"]), ("at most", result["at_most"])):
        for name, row in rows.items():
            holds = row["is"] >= row["wanted"] if word == "at least" else row["is"] <= row["wanted"]
            print(f"  {name:<28} {row['is']:8.3f} {word} {row['wanted']:.3f}   {'' if holds else 'MISSED'}")
