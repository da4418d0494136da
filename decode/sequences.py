"""The sequences of a decode worker and the blocks they hold: who runs, who was preempted, who must copy before it writes.

`worker.py` decides and steps; this keeps sequences, jobs and the block pool in agreement. No I/O, no waiting.
"""

from __future__ import annotations

from collections.abc import Iterable

from decode.job import Job
from engine.batch import Chunk, is_scored
from engine.blocks import BlockPool, OutOfBlocks
from engine.prefix import attach_prefix, seal_full_blocks
from engine.sequence import Sequence
from engine.swap import Swap
from protocol.events import TokenLogprobs
from protocol.kv import KVLayout
from protocol.ticket import FirstToken

# What a sealed sequence's first frame repeats: (index, tokens, their log-probabilities)
Opening = tuple[int, tuple[int, ...], tuple[TokenLogprobs, ...] | None]


class Sequences:
    """running: in order of arrival, blocks held. preempted: in the order they return, no blocks held. whole_len: without paging,
    for how many tokens a sequence holds blocks from its beginning on; 0: as many as it has."""

    def __init__(self, pool: BlockPool, layout: KVLayout, swap: Swap | None = None, whole_len: int = 0) -> None:
        self.whole_len = whole_len
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self._pool = pool
        self._layout = layout
        self._swap = swap
        self._jobs: dict[int, Job] = {}  # by id(sequence)
        self._batch: list[Sequence] = []  # of static batching
        self._copies: dict[int, tuple[int, int]] = {}  # id(sequence) -> (shared block, own block) to copy before its next step
        self._openings: dict[int, Opening] = {}  # id(sequence)

    def __len__(self) -> int:
        return len(self.running) + len(self.preempted)

    @property
    def num_unused_slots(self) -> int:
        """Of the blocks that running sequences hold, those for a token each without one: what is wasted, and what a prompt that is
        computed here has still to fill. Shared blocks are full, so none is counted twice."""
        block_size = self._layout.block_size
        return sum(len(s.blocks) * block_size - s.num_computed for s in self.running)

    def job_of(self, sequence: Sequence) -> Job | None:
        """None once it is retired."""
        return self._jobs.get(id(sequence))

    def take_opening(self, sequence: Sequence) -> Opening:
        opening = self._openings.pop(id(sequence), None) if self._openings else None
        return opening if opening is not None else (sequence.output_len, (), None)

    # ---- coming ----------------------------------------------------------------------------------------------------

    def start(self, job: Job, leads: list[Sequence], headroom: int) -> None:
        """Blocks for a prompt that this worker prefills itself. Raises OutOfBlocks, and then nothing has changed.

        Choices that differ already (a resumption) follow the first one as if preempted: when they start, the prompt they
        share is in the prefix cache.
        """
        attach_prefix(self._pool, leads[0], self._layout, headroom)
        for sequence in leads:
            self._adopt(job, sequence, is_running=sequence is leads[0])

    def open(self, job: Job, num_written: int, first_tokens: Iterable[FirstToken]) -> None:
        """Sealed KV becomes sequences: the prompt's full blocks are shared, its last partial block is copied per choice."""
        block_size = self._layout.block_size
        num_tokens = job.request.prompt_len + len(job.delivered[0])
        blocks, job.granted_blocks = job.granted_blocks, []
        for block in blocks[len(blocks) - num_written :]:
            self._pool.filling(block)
        for first in first_tokens:
            if first.finish_reason is not None or first.choice in job.ended:
                continue
            delivered = job.delivered[first.choice]
            sequence = Sequence(job.request, first.choice, output_token_ids=(*delivered, first.token))
            sequence.num_computed = num_tokens
            sequence.block_hashes = list(job.block_hashes)
            if not job.sequences:
                sequence.blocks = list(blocks)
            else:
                self._share(sequence, blocks, job.spare_blocks)
            if len(sequence.blocks) * block_size < len(sequence.token_ids):
                sequence.blocks.append(job.spare_blocks.pop())
            logprobs = (first.logprobs,) if first.logprobs is not None else None
            self._openings[id(sequence)] = (len(delivered), (first.token,), logprobs)
            self._adopt(job, sequence)
        if not job.sequences:
            self._pool.release(blocks)
        self.hold(list(job.sequences.values()), job.spare_blocks)
        self._pool.release(job.spare_blocks)
        job.spare_blocks = []
        for sequence in job.sequences.values():
            seal_full_blocks(self._pool, sequence, self._layout)

    def hold(self, sequences: list[Sequence], spare: list[int]) -> None:
        """Without paging: blocks out of `spare` for all the tokens that each may ever have."""
        for sequence in sequences:
            missing = max(0, self._layout.num_blocks_for(self.whole_len) - len(sequence.blocks))
            sequence.blocks += spare[:missing]
            del spare[:missing]

    def part_ways(self, job: Job, chunk: Chunk) -> None:
        """The siblings of a prompt that was prefilled here once for all n choices."""
        lead = chunk.sequence
        num_blocks = self._layout.num_blocks_for(lead.num_computed)
        has_tail = lead.num_computed % self._layout.block_size != 0
        for sibling in chunk.samples[1:]:
            if sibling.choice in job.ended:
                continue
            sibling.num_computed = lead.num_computed
            try:
                own = self._pool.allocate(int(has_tail))
            except OutOfBlocks:  # recompute it when there is room; its first token stands all the same
                sibling.num_computed, sibling.blocks = 0, []
                self._adopt(job, sibling, is_running=False)
                continue
            self._share(sibling, lead.blocks[:num_blocks], own)
            self._adopt(job, sibling)

    def _share(self, sequence: Sequence, blocks: list[int], own: list[int]) -> None:
        """The prompt's full blocks are shared; a partial last one is copied, before the sequence's next step, into one of `own`."""
        num_full = sequence.num_computed // self._layout.block_size
        self._pool.share(blocks[:num_full])
        sequence.blocks = list(blocks[:num_full])
        if num_full < len(blocks):
            self._pool.share([blocks[num_full]])
            sequence.blocks.append(own.pop())
            self._copies[id(sequence)] = (blocks[num_full], sequence.blocks[-1])

    def _adopt(self, job: Job, sequence: Sequence, *, is_running: bool = True) -> None:
        job.sequences[sequence.choice] = sequence
        self._jobs[id(sequence)] = job
        (self.running if is_running else self.preempted).append(sequence)

    # ---- being there -----------------------------------------------------------------------------------------------

    def grow(self, sequence: Sequence) -> bool:
        """One more block for its next token. False: there is none, and the sequence was preempted instead."""
        if self.extend(sequence):
            return True
        self.preempt(sequence)  # a victim's blocks were shared, so less came free than the plan counted on
        return False

    def extend(self, sequence: Sequence) -> bool:
        """One more block. False: there is none."""
        try:
            sequence.blocks += self._pool.allocate(1, after=sequence.blocks[-1])
        except OutOfBlocks:
            return False
        return True

    def trim(self, sequence: Sequence) -> None:
        """Give back blocks behind the one that its newest token will be written to."""
        needed = self._layout.num_blocks_for(len(sequence.token_ids))
        if len(sequence.blocks) > needed:
            self._pool.release(sequence.blocks[needed:])
            del sequence.blocks[needed:]

    def preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if self._swap is not None and id(sequence) not in self._copies and not is_scored(sequence):
            self._swap.take_out(sequence)
        self._release_blocks(sequence)
        sequence.num_computed = 0
        if sequence.choice == 0:
            self._jobs[id(sequence)].scored.clear()  # the prompt will be scored again from its start
        self.preempted.append(sequence)

    def restart(self, sequence: Sequence) -> bool:
        """Back from preemption. False: there is no room after all."""
        try:
            attach_prefix(self._pool, sequence, self._layout, 0)
        except OutOfBlocks:
            return False
        if self._swap is not None:
            self._swap.bring_back(sequence)
            self.seal(sequence)
        self.preempted.remove(sequence)
        self.running.append(sequence)
        return True

    def chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        """So many of its next tokens, and who is sampled after them."""
        if num_tokens < sequence.num_uncomputed:
            return Chunk(sequence, num_tokens, ())
        job = self._jobs[id(sequence)]
        missing = []
        if _is_shared_prompt(job, sequence):
            missing = [c for c in range(job.request.sampling.n) if c not in job.sequences and c not in job.ended]
        return Chunk(sequence, num_tokens, (sequence, *(sequence.fork(choice) for choice in missing)))

    def static_batch(self, most: int) -> list[Sequence]:
        """Who takes part in a step without continuous batching: those who began together, until the last of them is over."""
        running = {id(sequence) for sequence in self.running}
        self._batch = [sequence for sequence in self._batch if id(sequence) in running] or self.running[:most]
        return self._batch

    def take_copies(self, chunks: Iterable[Chunk]) -> list[tuple[int, int]]:
        """(shared, own) block pairs to copy before this step; give them to `copied` after it."""
        if not self._copies:
            return []
        due = [self._copies.pop(id(chunk.sequence), None) for chunk in chunks]
        return [copy for copy in due if copy is not None]

    def copied(self, copies: list[tuple[int, int]]) -> None:
        self._pool.release([shared for shared, _ in copies])

    def seal(self, sequence: Sequence) -> None:
        seal_full_blocks(self._pool, sequence, self._layout)

    # ---- going -----------------------------------------------------------------------------------------------------

    def retire(self, sequence: Sequence) -> Job | None:
        """The sequence is over, however it ended. -> its job; None when it was retired before."""
        job = self._jobs.pop(id(sequence), None)
        if job is None:
            return None
        for holder in (self.running, self.preempted):
            if sequence in holder:
                holder.remove(sequence)
        self._openings.pop(id(sequence), None)
        if self._swap is not None:
            self._swap.forget(sequence)
        self._release_blocks(sequence)
        if job.sequences.get(sequence.choice) is sequence:
            del job.sequences[sequence.choice]
        return job

    def _release_blocks(self, sequence: Sequence) -> None:
        pending = self._copies.pop(id(sequence), None)
        if pending is not None:
            self._pool.release([pending[0]])
        self._pool.release(sequence.blocks)
        sequence.blocks = []

    def swapped_numbers(self) -> dict[str, int]:
        """By the names of `WorkerStats`."""
        return {} if self._swap is None else self._swap.numbers()

    def check_is_empty(self) -> None:
        assert not self._swap
        assert not self.running
        assert not self.preempted
        assert not self._jobs
        assert not self._copies
        assert not self._openings


def _is_shared_prompt(job: Job, sequence: Sequence) -> bool:
    """A prompt that this worker prefills once for all n choices, which part ways at its last token."""
    return (
        job.request.sampling.n > 1
        and len(job.sequences) == 1
        and sequence.choice == 0
        and sequence.output_len == len(job.delivered[0])
    )
