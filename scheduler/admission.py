"""Refusing early and honestly: which bound was hit, whose fault it is (429 or 503), and when to come back.

Retry-After is computed: the time in which the backlog drains to half of the bound that was hit, at the rate at which
requests were placed lately, or, before anything was placed, at the rate that the cost models predict. Jittered upwards,
so that those who were refused together do not come back together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from protocol.errors import InvalidRequest, NoWorker, Overloaded, PromptTooLong, TandemError, TenantOverLimit
from protocol.messages import Admit, WorkerInfo
from scheduler.cost import OutputLength
from scheduler.ledger import WorkerState, blocks_to_reserve
from scheduler.queue import Queue

MIN_RETRY_S, MAX_RETRY_S = 1.0, 600.0
JITTER = 0.2
START_UP_PRIOR_S = 20.0


class Refusal(Exception):
    """A request is turned away: the error, and its reason as the counters name it."""

    def __init__(self, error: TandemError, reason: str) -> None:
        super().__init__(error.message)
        self.error = error
        self.reason = reason


class DrainRate:
    """At what rate the queue has been emptied, in tokens a second; measured only while there was a backlog."""

    WINDOW_S = 60.0

    def __init__(self) -> None:
        self._placed: deque[tuple[float, int]] = deque(maxlen=1024)

    def placed(self, num_tokens: int, now: float, was_backlog: bool) -> None:
        if not was_backlog:
            self._placed.clear()
        self._placed.append((now, num_tokens))

    def tokens_per_s(self, now: float) -> float | None:
        """None while too little was seen to tell."""
        while self._placed and self._placed[0][0] < now - self.WINDOW_S:
            self._placed.popleft()
        if len(self._placed) < 8:
            return None
        span = now - self._placed[0][0]
        return sum(n for _, n in self._placed) / span if span > 0.1 else None


def drain_s(
    num_tokens: int, num_requests: int, workers: Iterable[WorkerState], output: OutputLength, rate: DrainRate, now: float
) -> float:
    """Seconds until so much backlog has been placed, by what was measured, else by what is predicted."""
    measured = rate.tokens_per_s(now)
    if measured is not None and measured > 0:
        return num_tokens / measured
    alive = [w for w in workers if w.takes_work]
    decodes = [w for w in alive if w.info.role == "decode"]
    prefills = [w for w in alive if w.info.role == "prefill"] or decodes
    if not decodes or not num_requests:
        return MIN_RETRY_S
    mean_prompt = max(1, num_tokens // num_requests)
    # Two stages in a row; the slower one sets the pace. Prefills run one after the other, decodes side by side.
    prefill_pace = sum(1.0 / w.cost.prefill_s(mean_prompt, 0) for w in prefills)
    decode_pace = sum(_decode_pace(w, mean_prompt, output) for w in decodes)
    return num_requests / max(1e-6, min(prefill_pace, decode_pace))


def _decode_pace(worker: WorkerState, mean_prompt: int, output: OutputLength) -> float:
    """Requests a second of a full worker."""
    per_request = worker.info.layout.num_blocks_for(int(mean_prompt + output.mean))
    num_seqs = max(1, min(worker.info.max_num_seqs, worker.info.num_blocks // max(1, per_request)))
    return num_seqs / (output.mean * worker.cost.decode_s(num_seqs, num_seqs * (mean_prompt + output.mean / 2)))


def retry_after(seconds: float, draw: Callable[[], float]) -> float:
    """Clamped, and jittered upwards by `draw()` in [0, 1)."""
    return max(MIN_RETRY_S, min(MAX_RETRY_S, seconds)) * (1.0 + JITTER * draw())


def overflowing(
    admit: Admit, queue: Queue, over: tuple[str, float], drain: float, draw: Callable[[], float]
) -> tuple[TandemError, str]:
    """The refusal of a request that a bounded queue cannot take, and its name in the counters. over: as `Queue.overflow` says.

    drain: seconds until the whole queue is placed. A tenant that holds more than its equal share of a queue which others
    wait in too is over its limit (429); otherwise the cluster is (503).
    """
    bound, fill = over
    after = retry_after(drain * (fill - 0.5) / fill, draw)
    limit = {"requests": queue.max_requests, "tokens": queue.max_tokens, "bytes": queue.max_bytes}[bound]
    tenants = queue.tokens_of.keys() | {admit.tenant}
    share = queue.tokens_of[admit.tenant] / max(1, queue.num_tokens)
    if len(tenants) > 1 and share > 1.0 / len(tenants):
        text = f"the queue is full and {share:.0%} of it is tenant {admit.tenant}'s, more than its equal share of it"
        error: TandemError = TenantOverLimit(
            f"{text} (scheduler.max_queue_{bound} = {limit})", param=f"scheduler.max_queue_{bound}", retry_after=after
        )
        return error, "tenant_share"
    text = f"the queue is full: {len(queue)} requests with {queue.num_tokens} tokens wait"
    error = Overloaded(f"{text} (scheduler.max_queue_{bound} = {limit})", param=f"scheduler.max_queue_{bound}", retry_after=after)
    return error, f"queue_{bound}"


def pushed_out(admit: Admit, by_higher_band: bool, drain: float, draw: Callable[[], float]) -> Refusal:
    """A waiting request has to make room: for a higher band, or for a tenant that has less in the queue."""
    after = retry_after(drain / 2, draw)
    if by_higher_band:
        text = f"the queue is full, and a class before {admit.slo_class} needed the room"
        return Refusal(Overloaded(f"{text} (scheduler.max_queue_requests and its like)", retry_after=after), "shed")
    text = f"the queue is full, and tenant {admit.tenant} has more in it than the one that came"
    return Refusal(TenantOverLimit(f"{text} (scheduler.max_queue_requests and its like)", retry_after=after), "tenant_share")


def check_it_fits(admit: Admit, largest: WorkerInfo) -> None:
    """Raises InvalidRequest for what the largest decode worker's pool could never hold."""
    num_tokens = admit.prompt_len + admit.max_tokens
    if largest.layout.num_blocks_for(num_tokens) > largest.num_blocks:
        raise PromptTooLong(
            f"prompt and max_tokens are {num_tokens} tokens, the KV pool of a worker holds "
            f"{largest.num_blocks * largest.layout.block_size}; lower max_tokens or raise --num-gpu-blocks-override "
            "(model.kv_cache_bytes on a CPU)",
            param="max_tokens",
        )
    if admit.resumption:
        return  # its choices, grown by now, come back one after the other
    if blocks_to_reserve(largest, admit.prompt_len, admit.num_choices) > largest.num_blocks:
        raise InvalidRequest(
            f"{admit.num_choices} choices of a prompt of {admit.prompt_len} tokens do not fit into a worker's "
            f"{largest.num_blocks} KV blocks; lower n or raise --num-gpu-blocks-override",
            param="n",
        )


def hopeless(drain: float, patience: float, draw: Callable[[], float]) -> TenantOverLimit:
    """What is queued already takes longer than this request may wait."""
    return TenantOverLimit(
        f"what waits already takes about {drain:.0f} s, and this request may wait {patience:.0f} s "
        "(scheduler.queue_timeout_s, or the request's own deadline)",
        param="scheduler.queue_timeout_s",
        retry_after=retry_after(drain - patience, draw),
    )


def no_worker(model: str, seconds: float, draw: Callable[[], float]) -> NoWorker:
    """seconds: until a worker that starts now is expected."""
    return NoWorker(
        f"no decode worker for {model} is alive that this request may use; one may be starting (see /health)",
        retry_after=retry_after(seconds, draw),
    )
