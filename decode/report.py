"""What a decode worker tells of itself: its statistics, and its lines in the step log. It only reads."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from decode.drafting import Drafting
from decode.handover import Handover
from decode.reservation import Reservations
from decode.sequences import Sequences
from engine.batch import Chunk
from engine.blocks import BlockPool
from engine.runner import StepResult
from engine.step_log import StepLog
from protocol.messages import WorkerStats


class Report:
    """counts: the worker's own, by name."""

    def __init__(
        self,
        counts: Mapping[str, float],
        sequences: Sequences,
        pool: BlockPool,
        handover: Handover,
        reservations: Reservations,
        drafting: Drafting | None,
    ) -> None:
        self._counts = counts
        self._sequences = sequences
        self._pool = pool
        self._handover = handover
        self._reservations = reservations
        self._drafting = drafting

    @property
    def num_waiting(self) -> int:
        return len(self._sequences.preempted) + self._handover.num_open

    def stats(self, last_token_age_s: float) -> WorkerStats:
        c = self._counts
        return WorkerStats(
            num_running=len(self._sequences.running),
            num_waiting=self.num_waiting,
            num_steps=int(c["num_steps"]),
            step_s=c["step_s"],
            prompt_tokens=int(c["prompt_tokens"]),
            generation_tokens=int(c["generation_tokens"]),
            decode_slots=int(c["decode_rows"]),
            prefix_queries=self._reservations.prefix_queries,
            prefix_hits=self._reservations.prefix_hits,
            num_preemptions=int(c["num_preemptions"]),
            transfers=self._handover.transfers,
            transfer_bytes=self._handover.transfer_bytes,
            transfers_failed=self._handover.transfers_failed,
            digest_failures=self._handover.digest_failures,
            leases_expired=self._handover.leases_expired,
            last_token_age_s=last_token_age_s,
            pairs=self._handover.pair_stats(),
            num_unused_slots=self._sequences.num_unused_slots,
            **self._sequences.swapped_numbers(),
            **(self._drafting.numbers() if self._drafting is not None else {}),
            **self._pool.numbers,
        )

    def log_step(self, log: StepLog, began_at: float, seconds: float, chunks: SequenceOf[Chunk], result: StepResult | None) -> None:
        """result: None where the step failed."""
        jobs = ((self._sequences.job_of(chunk.sequence), chunk.num_rows) for chunk in chunks)
        tokens = [(job.request.request_id, number) for job, number in jobs if job is not None]
        more = {"slots_unused": self._sequences.num_unused_slots}
        if self._drafting is not None:
            firsts = sum(len(chunk.samples) for chunk in chunks)
            more["drafted"] = sum(len(chunk.draft) for chunk in chunks)
            more["accepted"] = len(result.samples) - firsts if result is not None else 0
        log.step(began_at, seconds, tokens, len(self._sequences.running), self.num_waiting, self._pool, more)
