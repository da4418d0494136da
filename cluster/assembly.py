"""Puts a worker together from the configuration: model, pool, runner, transports, the worker itself and its papers.

The one place that knows both the configuration's keys and the constructors' arguments. Called by `deployments.py` (one worker
in a process of its own) and `local.py` (all in one process). No Ray here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

import decode.worker
import prefill.worker
from cluster.preflight import DEFAULT_BLOCK_SIZE, cpu_kv_bytes, kv_share, max_model_len, runs_on_cpu
from configs.schema import MAX_AUTO_TOKENS, Config
from configs.tenants import read_file
from decode.worker import DecodeWorker
from engine.batch import Chunk
from engine.blocks import BlockPool
from engine.cores import Cores, Ledger, Lending, ledger_path, pin_thread, sweep
from engine.follower import Follower
from engine.group import Group
from engine.host_tier import HostTier
from engine.memory import num_blocks_on_cpu, num_blocks_on_gpu
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.speculation.speculator import Speculator
from engine.step_log import StepLog, path_for
from engine.swap import Swap
from kvtransfer.group import Connector, RankTransfers
from kvtransfer.layout import Place, rank_layout
from kvtransfer.link import make_receivers, usable
from kvtransfer.listening import ANY, Ports, bind_of, listen
from kvtransfer.pool import KVPool
from kvtransfer.process import boot_id, start_ticks
from kvtransfer.receiving import GroupReceivers, RankCaller, RankReceivers
from models.config import read_config
from models.interface import Shard
from models.load import LoadedModel, LoadProgress, choose_device, load_model
from models.locate import locate
from prefill.worker import PrefillWorker
from protocol.errors import ConfigError
from protocol.kv import KVEndpoint, KVLayout, ProcessRef
from protocol.messages import WorkerInfo
from protocol.network import Clock, Network
from protocol.rank import RankMessage
from protocol.request import Request, SamplingParams

log = logging.getLogger(__name__)

WHOLE = Shard()
GROUP_TIMEOUT_S = 60.0  # the longest that a rank waits for another one, in a step or for one
MAX_SWAP_NBYTES = 4 << 30  # of host memory for preempted sequences where nobody said how much
JOIN_TIMEOUT_S = 300.0  # for the slowest rank to come
_T = TypeVar("_T")
Compute = Callable[[Callable[[], Any]], Awaitable[Any]]


class Engine(NamedTuple):
    """One model with a pool of its own; either role is built around one. In a group: the leader's own part of it."""

    loaded: LoadedModel
    layout: KVLayout  # of the whole model, whatever the rank
    kv: KVPool
    pool: BlockPool
    runner: ModelRunner
    max_model_len: int
    tier: HostTier | None = None


def load(
    config: Config, progress: Callable[[LoadProgress], None] | None = None, shard: Shard = WHOLE, group: Group | None = None
) -> LoadedModel:
    """The model, or one rank's part of it."""
    model = config.model
    return load_model(model.name, model.dtype, model.device, progress, model.revision or None, shard, group, model.quantization)


def whole_layout(config: Config, loaded: LoadedModel) -> KVLayout:
    device = str(loaded.device).split(":")[0]
    return loaded.kv_layout(config.model.block_size or DEFAULT_BLOCK_SIZE[device])


def num_blocks(config: Config, role: str, loaded: LoadedModel) -> int:
    """For how many KV blocks this rank has room. Raises ConfigError."""
    if config.model.num_blocks_override:
        return config.model.num_blocks_override
    own = rank_layout(whole_layout(config, loaded), loaded.shard.parallel, loaded.shard.rank)
    max_len = max_model_len(config, loaded.config)
    share = kv_share(config, role, own)
    if loaded.device.type == "cuda":
        return int(num_blocks_on_gpu(own, config.model.gpu_memory_utilization, max_len, loaded.device) * share)
    return num_blocks_on_cpu(own, int(cpu_kv_bytes(config, role) * share), max_len)


def build_engine(
    config: Config, loaded: LoadedModel, num_blocks: int, num_threads: int | None, group: Group | None = None
) -> Engine:
    """The pool and the runner of one rank."""
    layout = whole_layout(config, loaded)
    kv = KVPool(rank_layout(layout, loaded.shard.parallel, loaded.shard.rank), num_blocks, str(loaded.device))
    runner = ModelRunner(loaded, kv.tensor, layout, num_threads, group=group)
    tier = HostTier(kv, config.model.host_cache_bytes) if config.model.host_cache_bytes else None
    pool = BlockPool(num_blocks, layout.block_size, config.model.enable_prefix_caching, tier)
    return Engine(loaded, layout, kv, pool, runner, max_model_len(config, loaded.config), tier)


def _num_cores() -> int:
    """That this process may use; its first thread is never pinned."""
    return len(os.sched_getaffinity(os.getpid()))


def num_threads(config: Config, role: str) -> int:
    """CPU threads of one rank: asked for, or its share of this host's cores, or all of them where they are shared."""
    asked = config.decode.num_threads if role == "decode" else config.prefill.num_threads
    cores = _num_cores()
    return asked or (cores if config.model.cpu_sharing == "shared" else max(1, cores // config.num_ranks))


def open_ledger(config: Config, secret: bytes) -> Ledger | None:
    """This host's, of this cluster; None where cores are not shared by it, or no file for it can be made."""
    if config.model.cpu_sharing == "shared":
        return None
    path = ledger_path(secret)
    sweep(path.parent, start_ticks)
    try:
        return Ledger(path, start_ticks)
    except OSError as error:
        log.warning("cores are not lent: the ledger %s cannot be used: %s", path, error)
        return None


def pin(config: Config, role: str, ledger: Ledger) -> None:
    """Keep the calling thread, the engine's, and what it starts on its worker's own cores, where the model runs on them."""
    if choose_device(config.model.device).type != "cpu":
        return
    if config.parallel(role).num_ranks > 1 or not pin_thread(ledger.number, num_threads(config, role)):
        log.info("%s is not pinned: only workers of one rank are, and only while there are cores for each", role)


def cores_of(config: Config, role: str, ledger: Ledger | None, device: str) -> Cores | None:
    """What a worker asks before each step. Somebody who says how many threads a role may use wants no others to be used."""
    asked = config.decode.num_threads if role == "decode" else config.prefill.num_threads
    if ledger is None or config.model.cpu_sharing != "lend" or device != "cpu":
        return None
    num_ranks = config.parallel(role).num_ranks
    own = num_threads(config, role)
    cores = _num_cores()
    return Lending(ledger, own, cores, can_borrow=not asked and num_ranks == 1, num_used=own * num_ranks if num_ranks > 1 else 0)


# ---- groups ----------------------------------------------------------------------------------------------------------


def open_store(host: str, ports: Ports = ANY) -> tuple[TCPStore, int]:
    """The leader's store, on a socket that we bind: torch's own would listen on every interface. -> store, port."""
    listener = listen(host, ports)
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def join_store(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=JOIN_TIMEOUT_S))


def join_group(config: Config, store: Store, group_id: str, shard: Shard) -> Group:
    """Collective: returns when every rank has called it. Raises GroupBroken."""
    on_cpu = runs_on_cpu(config, read_config(locate(config.model.name, config.model.revision)))
    return Group(
        PrefixStore(group_id, store),
        shard.rank,
        shard.parallel,
        timeout_s=GROUP_TIMEOUT_S,
        join_timeout_s=JOIN_TIMEOUT_S,
        hostname=bind_of(config.transfer).host,
        device="cpu" if on_cpu else choose_device(config.model.device),
    )


async def idle_steps(runner: ModelRunner, compute: Compute) -> None:
    """For ever, a step of nothing every so often: the other ranks' wait for the next step stays below its deadline."""
    while True:
        await asyncio.sleep(GROUP_TIMEOUT_S / 3)
        await compute(runner.idle)


class Others(NamedTuple):
    """The other ranks of a leader's group, by rank."""

    callers: Mapping[int, RankCaller] = {}
    endpoints: Mapping[int, Mapping[str, KVEndpoint]] = {}  # of their receivers, by transport name
    processes: tuple[ProcessRef, ...] = ()  # empty: all in this one


NO_OTHERS = Others()


class RankPart:
    """What a rank that is not the leader has beside its connection: an engine that follows, and its share of the KV traffic.

    tell: sends to the leader.
    """

    def __init__(self, role: str, parts: Parts, transports: tuple[str, ...], tell: Callable[[RankMessage], None]) -> None:
        self.engine = parts.engine
        self.receivers = rank_receivers(parts, transports) if role == "decode" else None
        connector = (
            None if role == "decode" else Connector(parts.engine.kv, parts.secret, parts.incarnation, place_of(parts.engine))
        )
        self._transfers = RankTransfers(connector, self.receivers, tell)
        self.follower = Follower(parts.engine.runner, self._on_layer)

    def endpoints(self) -> dict[str, KVEndpoint]:
        return self.receivers.endpoints() if self.receivers is not None else {}

    async def handle(self, message: RankMessage) -> RankMessage | None:
        return await self._transfers.handle(message)

    def close(self) -> None:
        self._transfers.close()
        self.engine.kv.close()

    def _on_layer(self, pushes: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]) -> Callable[[int], None]:
        """The step's hook in the engine's thread: after each layer, hand this rank's part of finished blocks to its senders."""

        def push(layer: int) -> None:
            for grant_id, pairs in pushes:
                self._transfers.push(grant_id, layer, pairs)

        return push


# ---- workers ---------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a worker, or a rank of one, is made of."""

    config: Config
    engine: Engine
    incarnation: str
    network: Network | None  # None: a rank that is not the leader
    clock: Clock
    compute: Compute
    verify_compute: Compute
    secret: bytes
    speculator: Speculator | None = None


def place_of(engine: Engine) -> Place:
    return Place(engine.layout, engine.loaded.shard.parallel, engine.loaded.shard.rank)


def rank_receivers(parts: Parts, transports: tuple[str, ...]) -> RankReceivers:
    kv, (host, ports) = parts.engine.kv, bind_of(parts.config.transfer)
    place = place_of(parts.engine)
    receivers = make_receivers(
        kv, usable(transports, kv), parts.secret, host, incarnation=parts.incarnation, place=place, ports=ports
    )
    return RankReceivers(kv, receivers, parts.verify_compute, place)


def max_batched_tokens(config: Config, role: str) -> int:
    """Of one step; where that is left to the worker, the most it may come to."""
    return config.pool(role).max_num_batched_tokens or max(MAX_AUTO_TOKENS, config.pool(role).max_num_seqs)


def max_step_s(config: Config, role: str) -> float | None:
    """How long a step may take where its size is left to the worker: the strictest TPOT that any class is promised, as the tenants
    file is at this worker's start. Raises TandemError when that file cannot be read."""
    if config.pool(role).max_num_batched_tokens:
        return None
    if config.scheduler.tenants_file is None:
        return config.scheduler.tpot_target_s
    return min(one.tpot_s for one in read_file(config.scheduler.tenants_file).classes.values())


def build_worker(role: str, parts: Parts, others: Others, transports: tuple[str, ...]) -> DecodeWorker | PrefillWorker:
    return build_decode(parts, others, transports) if role == "decode" else build_prefill(parts, others, transports)


def open_step_log(config: Config, name: str, incarnation: str) -> StepLog | None:
    """Of this worker, if step logs are wanted. Raises ConfigError."""
    if config.model.step_log is None:
        return None
    path = path_for(config.model.step_log, name)
    try:
        return StepLog(path, incarnation)
    except OSError as error:
        raise ConfigError(f"cannot write the step log {path}: {error.strerror}", param="model.step_log") from None


def build_decode(parts: Parts, others: Others, transports: tuple[str, ...]) -> DecodeWorker:
    config, engine = parts.config, parts.engine
    settings = decode.worker.Settings(
        incarnation=parts.incarnation,
        layout=engine.layout,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.decode.max_num_seqs,
        max_num_batched_tokens=max_batched_tokens(config, "decode"),
        max_step_s=max_step_s(config, "decode"),
        enable_chunked_prefill=config.decode.enable_chunked_prefill,
        without=config.decode.without,
    )
    theirs = {rank: (caller, others.endpoints[rank]) for rank, caller in others.callers.items()}
    receivers = GroupReceivers(rank_receivers(parts, transports), theirs)
    assert parts.network is not None
    swap = make_swap(engine) if config.decode.preemption_mode == "swap" else None
    return DecodeWorker(
        settings, engine.runner, engine.pool, receivers, parts.network, parts.clock, parts.compute, parts.secret,
        speculator=parts.speculator, swap=swap,
    )  # fmt: skip


def make_swap(engine: Engine) -> Swap:
    """Over the host tier of the prefix cache; where there is none one of the pool's own size, and evicted prefixes go there too."""
    pool = engine.pool
    tier = engine.tier or pool.tier
    if not isinstance(tier, HostTier):
        tier = HostTier(engine.kv, min(engine.kv.nbytes, MAX_SWAP_NBYTES))
        pool.tier = tier if pool.enable_prefix_caching else None
    return Swap(tier, pool)


def build_prefill(parts: Parts, others: Others, transports: tuple[str, ...]) -> PrefillWorker:
    config, engine = parts.config, parts.engine
    settings = prefill.worker.Settings(
        incarnation=parts.incarnation,
        layout=engine.layout,
        max_model_len=engine.max_model_len,
        transports=usable(transports, engine.kv),
        boot_id=boot_id(),
        pid=os.getpid(),
        start_ticks=start_ticks(),
        parallel=engine.loaded.shard.parallel,
        ranks=(ProcessRef(boot_id(), os.getpid(), start_ticks()), *others.processes),
        max_num_seqs=config.prefill.max_num_seqs,
        max_num_batched_tokens=max_batched_tokens(config, "prefill"),
        max_step_s=max_step_s(config, "prefill"),
        transfer_timeout_s=config.transfer.timeout_s,
    )
    connector = Connector(engine.kv, parts.secret, parts.incarnation, place_of(engine), others.callers)
    assert parts.network is not None
    return PrefillWorker(settings, engine.runner, engine.pool, connector, parts.network, parts.clock, parts.compute, parts.secret)


def transports_of(config: Config) -> tuple[str, ...]:
    """In order of preference; what the pool's memory is not for is left out later (`usable`)."""
    name = config.transfer.transport
    return ("cuda_ipc", "nccl", "shm", "tcp") if name == "auto" else (name,)


def worker_info(role: str, name: str, parts: Parts, others: Others) -> WorkerInfo:
    config, engine = parts.config, parts.engine
    assert parts.network is not None
    pids = [process.pid for process in others.processes] or [os.getpid()] * len(others.callers)
    return WorkerInfo(
        incarnation=parts.incarnation,
        role=role,
        name=name,
        address=parts.network.address,
        model=config.served_name,
        layout=engine.layout,
        num_blocks=engine.pool.num_blocks,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.pool(role).max_num_seqs,
        max_num_batched_tokens=max_batched_tokens(config, role),
        price_per_hour=config.pool(role).price_per_hour,
        is_spot=config.pool(role).is_spot,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=str(engine.loaded.device),
        parallel=engine.loaded.shard.parallel,
        rank_pids=(os.getpid(), *pids),
    )


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
