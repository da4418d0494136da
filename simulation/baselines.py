"""Published placement policies as `Placer`s, and earliest deadline first as an `Order`, to be measured in the same harness as ours.

Formulas and parameters are those of the papers and code (../../shared/research/scheduling.md, section A, says which). What all
of them share here, because the data plane is ours for everybody: a decode worker sets blocks aside before the prefill, so a
placement needs one with room now; every prompt goes to a prefill worker while one is alive; prefixes are not moved between prefill
workers (so Mooncake's hot-prefix replication never applies). With FCFS a request is dispatched as soon as a decode worker has room,
as published. With EDF it is held back while the chosen prefill worker has one waiting, or no order but that of arrival could ever
show.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from protocol.errors import TenantOverLimit
from protocol.messages import Admit
from scheduler.admission import retry_after
from scheduler.cost import OutputLength
from scheduler.ledger import WorkerState, blocks_to_reserve
from scheduler.placement import Blocked, Placement, Refused
from scheduler.queue import ByKey, Item

# SGLang's router (sgl-model-gateway), defaults of its cache_aware policy.
BALANCE_ABS_THRESHOLD, BALANCE_REL_THRESHOLD, CACHE_THRESHOLD = 64, 1.5, 0.3


class Baseline:
    """What the baselines have in common. holds_back: see the module (EDF)."""

    def __init__(self, hash_len: int, holds_back: bool = False) -> None:
        self.hash_len = hash_len
        self.holds_back = holds_back

    def place(
        self,
        admit: Admit,
        workers: Sequence[WorkerState],
        output: OutputLength,
        matches: Mapping[str, int],
        queued_at: float,
        now: float,
    ) -> Placement | Blocked | Refused:
        taking = [w for w in workers if w.takes_work and w.incarnation not in admit.excluded]
        decodes = [w for w in taking if w.info.role == "decode"]
        fits = [w for w in taking if w.info.role == "prefill" and _num_blocks(w, admit.prompt_len) <= w.info.num_blocks]
        if not decodes:
            return Blocked.NO_WORKER
        roomy = [w for w in decodes if has_room(admit, w)]
        if not roomy:
            return Blocked.NO_ROOM
        cached = {w.incarnation: self._cached(admit, w, matches) for w in fits}
        prefill = self.choose_prefill(admit, fits, cached, now) if fits else None
        if prefill is not None and self.holds_back and len(prefill.prefills) >= 2:
            return Blocked.NO_ROOM
        decode = self.choose_decode(admit, roomy, output, now)
        at = prefill or decode
        held = cached.get(at.incarnation, 0)
        refused = self.refuses(admit, at, decode, held, now)
        if refused is not None:
            return refused
        prefill_s = at.cost.prefill_s(admit.prompt_len, held) * at.prefill_drift.factor
        self.dispatched(admit, prefill, decode, held)
        return Placement(decode, prefill, held, prefill_s, at.prefill_queue_s(now) + prefill_s, output.expected(admit.max_tokens))

    def refuses(self, admit: Admit, at: WorkerState, decode: WorkerState, cached: int, now: float) -> Refused | None:
        """at: who would prefill. Only Mooncake's rule turns anybody away."""
        return None

    def dispatched(self, admit: Admit, prefill: WorkerState | None, decode: WorkerState, cached: int) -> None:
        """For those that remember."""

    def _cached(self, admit: Admit, worker: WorkerState, matches: Mapping[str, int]) -> int:
        return min(matches.get(worker.incarnation, 0) * self.hash_len, admit.prompt_len - 1)

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        """Fewest prompts that wait."""
        return min(workers, key=lambda w: (len(w.prefills), w.incarnation))

    def choose_decode(self, admit: Admit, workers: Sequence[WorkerState], output: OutputLength, now: float) -> WorkerState:
        """Fewest requests; most of the papers leave decode to the shortest queue."""
        return min(workers, key=_num_requests)


def _num_blocks(worker: WorkerState, num_tokens: int) -> int:
    return worker.info.layout.num_blocks_for(num_tokens)


def _num_requests(worker: WorkerState) -> tuple[int, str]:
    return worker.num_decoding + worker.num_coming, worker.incarnation


def has_room(admit: Admit, worker: WorkerState) -> bool:
    """Blocks for the prompt and a place in the batch now; what it will grow to is not asked."""
    if worker.is_full or worker.num_decoding + worker.num_coming >= worker.info.max_num_seqs:
        return False
    headroom = (worker.num_decoding + worker.num_coming) // 2
    return worker.num_free_blocks >= blocks_to_reserve(worker.info, admit.prompt_len, admit.num_choices) + headroom


def uncached_tokens(worker: WorkerState) -> int:
    """Prompt tokens that wait to be computed there."""
    return sum(entry.prompt_len - entry.cached for entry in worker.prefills.values())


class RoundRobin(Baseline):
    """One after the other, each role by itself."""

    def __init__(self, hash_len: int, holds_back: bool = False) -> None:
        super().__init__(hash_len, holds_back)
        self._last: dict[str, str] = {}

    def _next(self, role: str, workers: Sequence[WorkerState]) -> WorkerState:
        ordered = sorted(workers, key=_by_number)
        last = self._last.get(role)
        after = [w for w in ordered if last is not None and _by_number(w) > _number(last)]
        return (after or ordered)[0]

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        return self._next("prefill", workers)

    def choose_decode(self, admit: Admit, workers: Sequence[WorkerState], output: OutputLength, now: float) -> WorkerState:
        return self._next("decode", workers)

    def dispatched(self, admit: Admit, prefill: WorkerState | None, decode: WorkerState, cached: int) -> None:
        for worker in (prefill, decode):
            if worker is not None:
                self._last[worker.info.role] = worker.incarnation


def _number(incarnation: str) -> tuple[int, str]:
    return len(incarnation), incarnation  # "decode:9" before "decode:10"


def _by_number(worker: WorkerState) -> tuple[int, str]:
    return _number(worker.incarnation)


class Random(Baseline):
    """Whichever."""

    def __init__(self, hash_len: int, holds_back: bool = False, rng: random.Random | None = None) -> None:
        super().__init__(hash_len, holds_back)
        self._rng = rng or random.Random(0)

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        return self._rng.choice(workers)

    def choose_decode(self, admit: Admit, workers: Sequence[WorkerState], output: OutputLength, now: float) -> WorkerState:
        return self._rng.choice(workers)


class JoinShortestQueue(Baseline):
    """Fewest requests, waiting or running, of both roles (splitwise-sim: `jsq`)."""


class TokenJsq(Baseline):
    """Fewest tokens: prompt tokens that wait at a prefill worker, tokens of context at a decode worker (splitwise-sim:
    `token_jsq`)."""

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        return min(workers, key=lambda w: (uncached_tokens(w), w.incarnation))

    def choose_decode(self, admit: Admit, workers: Sequence[WorkerState], output: OutputLength, now: float) -> WorkerState:
        return min(workers, key=lambda w: (w.num_context_tokens, w.incarnation))


class CacheAware(Baseline):
    """SGLang's router: the shortest queue when loads are far apart; else the best match above a threshold; else the smallest
    tree."""

    def __init__(self, hash_len: int, holds_back: bool = False) -> None:
        super().__init__(hash_len, holds_back)
        self._tree: Counter[str] = Counter()  # tokens that its approximate tree holds of each worker

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        loads = [len(w.prefills) for w in workers]
        low, high = min(loads), max(loads)
        if high - low > BALANCE_ABS_THRESHOLD and high > BALANCE_REL_THRESHOLD * low:
            return super().choose_prefill(admit, workers, cached, now)
        best = max(workers, key=lambda w: (cached[w.incarnation], w.incarnation))
        if cached[best.incarnation] / admit.prompt_len > CACHE_THRESHOLD:
            return best
        return min(workers, key=lambda w: (self._tree[w.incarnation], w.incarnation))

    def dispatched(self, admit: Admit, prefill: WorkerState | None, decode: WorkerState, cached: int) -> None:
        self._tree[(prefill or decode).incarnation] += admit.prompt_len - cached


class Dynamo(Baseline):
    """Dynamo's KV router: max(active prefill blocks + new blocks - overlap credit, 0) + (active decode blocks + new ones), the
    least wins; prefill_load_scale and the credit of a block on the device are 1. Decode workers are asked without overlap."""

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        def cost(worker: WorkerState) -> tuple[float, str]:
            size = worker.info.layout.block_size
            new = admit.prompt_len - cached[worker.incarnation]
            return (uncached_tokens(worker) + new) / size, worker.incarnation

        return min(workers, key=cost)

    def choose_decode(self, admit: Admit, workers: Sequence[WorkerState], output: OutputLength, now: float) -> WorkerState:
        return min(workers, key=lambda w: (w.info.num_blocks - w.num_free_blocks, w.incarnation))


class LMetric(Baseline):
    """New prefill tokens times batch size (arXiv 2603.15202): nothing to tune. A prefill worker's batch is whoever is there; a
    decode worker computes no new tokens, so its batch alone decides."""

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        def product(worker: WorkerState) -> tuple[float, str]:
            new = uncached_tokens(worker) + admit.prompt_len - cached[worker.incarnation]
            return new * (len(worker.prefills) + 1), worker.incarnation

        return min(workers, key=product)


class Mooncake(Baseline):
    """Algorithm 1 of Mooncake (FAST'25): least predicted TTFT = queue + prefill(length, prefix); a decode worker by least predicted
    time between tokens; 429 when either is above its promise. The best prefix is never fetched from another worker (see the
    module)."""

    def __init__(
        self, hash_len: int, holds_back: bool = False, promise: Callable[[Admit], tuple[float, float]] | None = None
    ) -> None:
        super().__init__(hash_len, holds_back)
        self._promise = promise or (lambda admit: (30.0, 0.1))

    def choose_prefill(self, admit: Admit, workers: Sequence[WorkerState], cached: Mapping[str, int], now: float) -> WorkerState:
        return min(workers, key=lambda w: (_ttft_s(admit, w, cached[w.incarnation], now), w.incarnation))

    def choose_decode(self, admit: Admit, workers: Sequence[WorkerState], output: OutputLength, now: float) -> WorkerState:
        return min(workers, key=lambda w: (_tbt_s(admit, w), w.incarnation))

    def refuses(self, admit: Admit, at: WorkerState, decode: WorkerState, cached: int, now: float) -> Refused | None:
        max_ttft_s, max_tbt_s = self._promise(admit)
        ttft_s = _ttft_s(admit, at, cached, now)
        if ttft_s <= max_ttft_s and _tbt_s(admit, decode) <= max_tbt_s:
            return None
        after = retry_after(max(0.0, ttft_s - max_ttft_s), lambda: 0.0)
        return Refused(TenantOverLimit("its TTFT or TBT would be missed (Mooncake, Algorithm 1)", retry_after=after))


def _ttft_s(admit: Admit, worker: WorkerState, cached: int, now: float) -> float:
    return worker.prefill_queue_s(now) + worker.cost.prefill_s(admit.prompt_len, cached) * worker.prefill_drift.factor


def _tbt_s(admit: Admit, worker: WorkerState) -> float:
    num_seqs = worker.num_decoding + worker.num_coming + 1
    return worker.cost.decode_s(num_seqs, worker.num_context_tokens + admit.prompt_len) * worker.decode_drift.factor


def edf(deadline: Callable[[Item], float]) -> ByKey:
    """Earliest deadline first, feasible or not; resumptions before everybody else. deadline: of an item, absolute seconds."""
    return ByKey(lambda item: (not item.admit.resumption, deadline(item), item.position, item.admit.request_id))
