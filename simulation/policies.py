"""The policies by name, each as a scheduler that is ready to be driven. `tandem` is what production runs.

A baseline is the same Scheduler with another Placer, its own Order, and admission off: it queues whatever comes. `-fcfs` (the
default) and `-edf` say in which order.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable

import msgspec

from protocol.errors import ConfigError
from scheduler.cost import OutputLength
from scheduler.queue import Order, fcfs
from scheduler.scheduler import Scheduler
from simulation.baselines import (
    Baseline,
    CacheAware,
    Dynamo,
    JoinShortestQueue,
    LMetric,
    Mooncake,
    Random,
    RoundRobin,
    TokenJsq,
    edf,
)
from simulation.cluster import MODEL, Setup

OURS = ("tandem", "tandem-oracle")
BASELINES: dict[str, type[Baseline]] = {
    "round-robin": RoundRobin,
    "random": Random,
    "join-shortest-queue": JoinShortestQueue,
    "token-jsq": TokenJsq,
    "cache-aware": CacheAware,
    "dynamo": Dynamo,
    "lmetric": LMetric,
    "mooncake": Mooncake,
}
NAMES = (*OURS, *BASELINES, *(f"{name}-edf" for name in BASELINES))
MAX_HASHES = 1_000_000


class OracleLength(OutputLength):
    """Knows: a run with oracle lengths tells the scheduler each request's real output as its max_tokens."""

    def expected(self, max_tokens: int) -> float:
        return float(max(1, max_tokens))


def check(name: str) -> str:
    """The policy's plain name. Raises ConfigError that names the nearest."""
    plain = name.removesuffix("-fcfs") if name.removesuffix("-fcfs") in BASELINES else name
    if plain not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, 1, 0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(NAMES)}"
        raise ConfigError(f"--policy {name}: no such policy; {hint}", param="--policy")
    return plain


def setup_for(name: str, setup: Setup) -> Setup:
    """tandem-oracle is tandem that is told the lengths."""
    return setup._replace(oracle_lengths=True) if check(name) == "tandem-oracle" else setup


def scheduler_for(name: str) -> Callable[[Setup, random.Random], Scheduler]:
    """What makes the scheduler of a run under this policy. Raises ConfigError."""
    plain = check(name)
    return _tandem if plain in OURS else _baseline(plain)


def _tandem(setup: Setup, rng: random.Random) -> Scheduler:
    scheduler = Scheduler(
        setup.config,
        tenants=setup.tenants,
        enable_prefix_caching=setup.enable_prefix_caching,
        hash_block_len=setup.hash_len,
        max_prefix_hashes=MAX_HASHES,
        draw=rng.random,
    )
    if setup.oracle_lengths:
        scheduler.costs.outputs[MODEL] = OracleLength()
    return scheduler


def _baseline(plain: str) -> Callable[[Setup, random.Random], Scheduler]:
    is_edf = plain.endswith("-edf")
    kind = BASELINES[plain.removesuffix("-edf")]

    def make(setup: Setup, rng: random.Random) -> Scheduler:
        classes = setup.tenants

        def promise(admit: msgspec.Struct) -> tuple[float, float]:
            one = classes.slo_class(admit.slo_class)  # type: ignore[attr-defined]
            return one.ttft_s, one.tpot_s

        if kind is Random:
            placer: Baseline = Random(setup.hash_len, is_edf, random.Random(setup.seed))
        elif kind is Mooncake:
            placer = Mooncake(setup.hash_len, is_edf, promise)
        else:
            placer = kind(setup.hash_len, is_edf)

        def order() -> Order:
            return edf(lambda item: item.queued_at + promise(item.admit)[0]) if is_edf else fcfs()

        # Nothing is refused and nobody is sent away for waiting: queues without bounds, as in the papers.
        config = msgspec.structs.replace(
            setup.config, max_queue_requests=2**24, max_queue_tokens=10**12, max_queue_bytes=2**50, queue_timeout_s=10**6
        )
        return Scheduler(
            config,
            tenants=setup.tenants,
            placer=placer,
            order=order,
            admission=False,
            enable_prefix_caching=setup.enable_prefix_caching,
            hash_block_len=setup.hash_len,
            max_prefix_hashes=MAX_HASHES,
            draw=rng.random,
        )

    return make
