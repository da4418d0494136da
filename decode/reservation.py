"""Setting blocks aside for one attempt of a request, before any prefill is spent on it (R6). Called by `worker.py`, which decides
whether to; what is set aside is kept in the `Job`, by `sequences.py` and by `handover.py`.
"""

from __future__ import annotations

from decode.handover import Handover
from decode.job import Job
from decode.sequences import Sequences
from engine.blocks import BlockPool, OutOfBlocks
from engine.prefix import full_block_hashes
from engine.sequence import Sequence
from protocol.errors import InvalidRequest
from protocol.kv import KVLayout
from protocol.messages import Reserve
from protocol.request import Request
from protocol.ticket import Grant


class Reservations:
    """prefix_queries, prefix_hits: cumulative, tokens."""

    def __init__(self, layout: KVLayout, pool: BlockPool, sequences: Sequences, handover: Handover) -> None:
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._layout = layout
        self._pool = pool
        self._sequences = sequences
        self._handover = handover

    def check_it_can_ever_fit(self, request: Request) -> None:
        """Raises InvalidRequest."""
        per_choice = self._layout.num_blocks_for(self._sequences.whole_len or request.max_total_len)
        if per_choice > self._pool.num_blocks:
            raise InvalidRequest(
                f"prompt and max_tokens need {per_choice} KV blocks, the pool has {self._pool.num_blocks}; lower max_tokens or "
                "raise --num-gpu-blocks-override (model.kv_cache_bytes on a CPU)",
                param="max_tokens",
            )

    @property
    def _headroom(self) -> int:
        """Blocks kept for the next token of those who run already; without it a newcomer would preempt somebody at once."""
        return len(self._sequences.running) // 2

    def local(self, job: Job) -> Grant:
        """Blocks for the prompt now; the prefill itself happens in this worker's own steps, in chunks. Raises OutOfBlocks."""
        request = job.request
        same = len({tuple(d) for d in job.delivered}) == 1 and not job.ended
        lead = [
            Sequence(request, choice, output_token_ids=job.delivered[choice])
            for choice in range(1 if same else request.sampling.n)
            if choice not in job.ended
        ]
        missing = sum(self._num_unwritten(len(sequence.token_ids)) for sequence in lead)
        self._sequences.start(job, lead, max(self._headroom, missing))
        if missing:
            self._sequences.hold(lead, self._pool.allocate(missing))
        job.cached_tokens = max(sequence.num_computed for sequence in lead)
        self._count(sum(len(s.token_ids) for s in lead), sum(s.num_computed for s in lead))
        return self._handover.local_grant(job)

    async def remote(self, job: Job, message: Reserve) -> Grant:
        """Blocks that a prefill worker will write, and what the choices need beside them to go on. Raises OutOfBlocks,
        TransferFailed (and then nothing is held that dropping the job does not give back)."""
        layout = self._layout
        probe = Sequence(job.request, 0, output_token_ids=job.delivered[0])
        num_tokens = len(probe.token_ids)
        job.block_hashes = full_block_hashes(probe, layout)
        cached = self._pool.match(job.block_hashes)
        num_new = layout.num_blocks_for(num_tokens) - len(cached)
        num_spare = job.request.sampling.n - (num_tokens % layout.block_size != 0)
        num_spare = max(num_spare, job.request.sampling.n * self._num_unwritten(num_tokens))
        if num_new + num_spare + self._headroom > self._pool.num_free:
            self._pool.release(cached)
            raise OutOfBlocks
        job.spare_blocks = self._pool.allocate(num_spare)
        job.granted_blocks = [*cached, *self._pool.reserve(num_new, after=cached[-1] if cached else None)]
        job.cached_tokens = len(cached) * layout.block_size
        self._count(num_tokens, job.cached_tokens)
        try:
            return await self._handover.grant(job, len(cached), num_tokens, message, job.block_hashes)
        finally:
            if job.grant is None and not job.is_dropped:  # refused before anybody could write
                self._pool.release(job.granted_blocks)
                job.granted_blocks = []

    def _num_unwritten(self, num_tokens: int) -> int:
        """Without paging: the blocks that a sequence holds beyond those of its tokens."""
        return max(0, self._layout.num_blocks_for(self._sequences.whole_len) - self._layout.num_blocks_for(num_tokens))

    def _count(self, queries: int, hits: int) -> None:
        self.prefix_queries += queries
        self.prefix_hits += hits
