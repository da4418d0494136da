"""Puts a worker together from the configuration: model, pool, runner, transports, the worker itself and its papers.

The one place that knows both the configuration's keys and the constructors' arguments. Called by `deployments.py` (one worker
in a process of its own) and `local.py` (all in one process). No Ray here.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import decode.worker
import prefill.worker
from cluster.preflight import DEFAULT_BLOCK_SIZE, cpu_kv_bytes, max_model_len
from configs.schema import Config
from decode.worker import DecodeWorker
from engine.batch import Chunk
from engine.blocks import BlockPool
from engine.memory import num_blocks_on_cpu, num_blocks_on_gpu
from engine.runner import ModelRunner
from engine.sequence import Sequence
from kvtransfer.link import make_receivers, make_sender
from kvtransfer.pool import KVPool
from kvtransfer.process import boot_id, start_ticks
from kvtransfer.transport import Sender
from models.load import LoadedModel, LoadProgress, load_model
from prefill.worker import PrefillWorker
from protocol.kv import KVEndpoint, KVLayout
from protocol.messages import WorkerInfo
from protocol.network import Clock, Network
from protocol.request import Request, SamplingParams

_T = TypeVar("_T")
Compute = Callable[[Callable[[], Any]], Awaitable[Any]]


class Engine(NamedTuple):
    """One model with a pool of its own; either role is built around one."""

    loaded: LoadedModel
    layout: KVLayout
    kv: KVPool
    pool: BlockPool
    runner: ModelRunner
    max_model_len: int


def load(config: Config, progress: Callable[[LoadProgress], None] | None = None) -> LoadedModel:
    model = config.model
    return load_model(model.name, model.dtype, model.device, progress, model.revision or None)


def build_engine(config: Config, loaded: LoadedModel, num_threads: int | None, num_sharers: int = 1) -> Engine:
    """The pool and the runner of one worker. num_sharers: workers on this host that share its memory."""
    model = config.model
    device = str(loaded.device).split(":")[0]
    layout = loaded.kv_layout(model.block_size or DEFAULT_BLOCK_SIZE[device])
    max_len = max_model_len(config, loaded.config)
    num_blocks = model.num_blocks_override or _num_blocks(config, loaded, layout, max_len, num_sharers)
    kv = KVPool(layout, num_blocks, str(loaded.device))
    runner = ModelRunner(loaded, kv.tensor, layout, num_threads)
    return Engine(loaded, layout, kv, BlockPool(num_blocks, layout.block_size, model.enable_prefix_caching), runner, max_len)


def _num_blocks(config: Config, loaded: LoadedModel, layout: KVLayout, max_len: int, num_sharers: int) -> int:
    if loaded.device.type == "cuda":
        return num_blocks_on_gpu(layout, config.model.gpu_memory_utilization, max_len, loaded.device)
    return num_blocks_on_cpu(layout, cpu_kv_bytes(config, num_sharers), max_len)


def build_decode(
    config: Config,
    engine: Engine,
    incarnation: str,
    network: Network,
    clock: Clock,
    compute: Compute,
    verify_compute: Compute,
    secret: bytes,
    transports: tuple[str, ...],
) -> DecodeWorker:
    settings = decode.worker.Settings(
        incarnation=incarnation,
        layout=engine.layout,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.decode.max_num_seqs,
        max_num_batched_tokens=config.decode.max_num_batched_tokens,
        enable_chunked_prefill=config.decode.enable_chunked_prefill,
    )
    receivers = make_receivers(engine.kv, transports, secret, config.transfer.bind_host, incarnation=incarnation)
    return DecodeWorker(settings, engine.runner, engine.pool, engine.kv, receivers, network, clock, compute, verify_compute, secret)


def build_prefill(
    config: Config,
    engine: Engine,
    incarnation: str,
    network: Network,
    clock: Clock,
    compute: Compute,
    secret: bytes,
    transports: tuple[str, ...],
) -> PrefillWorker:
    settings = prefill.worker.Settings(
        incarnation=incarnation,
        layout=engine.layout,
        max_model_len=engine.max_model_len,
        transports=transports,
        boot_id=boot_id(),
        pid=os.getpid(),
        start_ticks=start_ticks(),
        max_num_seqs=config.prefill.max_num_seqs,
        max_num_batched_tokens=config.prefill.max_num_batched_tokens,
        transfer_timeout_s=config.transfer.timeout_s,
    )

    def sender(endpoint: KVEndpoint, peer_incarnation: str) -> Sender:
        return make_sender(endpoint, engine.kv, secret, incarnation=incarnation, peer_incarnation=peer_incarnation)

    return PrefillWorker(settings, engine.runner, engine.pool, sender, network, clock, compute, secret)


def transports_of(config: Config) -> tuple[str, ...]:
    """In order of preference."""
    name = config.transfer.transport
    return ("shm", "tcp") if name == "auto" else (name,)


def worker_info(role: str, name: str, incarnation: str, config: Config, engine: Engine, network: Network) -> WorkerInfo:
    return WorkerInfo(
        incarnation=incarnation,
        role=role,
        name=name,
        address=network.address,
        model=served_name(config),
        layout=engine.layout,
        num_blocks=engine.pool.num_blocks,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.decode.max_num_seqs if role == "decode" else config.prefill.max_num_seqs,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=str(engine.loaded.device),
    )


def served_name(config: Config) -> str:
    return config.model.served_name or config.model.name


def canary(engine: Engine, worker: DecodeWorker | PrefillWorker, compute: Compute, clock: Clock) -> Callable[[], Awaitable[None]]:
    """One token out of nothing, through the whole engine; proof that this worker can produce tokens (R10). Also the warm-up."""
    request = Request(
        request_id="canary",
        model="",
        prompt_token_ids=(0,),
        sampling=SamplingParams(temperature=0.0, max_tokens=1, seed=0),
    )

    async def run() -> None:
        if engine.pool.num_free == 0:
            return
        sequence = Sequence(request)
        sequence.blocks = engine.pool.allocate(1)
        try:
            result = await compute(lambda: engine.runner.run([Chunk(sequence, 1, (sequence,))]))
        finally:
            engine.pool.release(sequence.blocks)
            worker.wake()
        if result.samples[0].error is None:
            worker.last_token_at = clock()

    return run


def inline() -> Compute:
    """Run the model on the event loop itself: one thread, one order of events, easy to step through."""

    async def compute(function: Callable[[], _T]) -> _T:
        result = function()
        await asyncio.sleep(0)
        return result

    return compute
