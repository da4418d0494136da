"""One prompt at a prefill worker, and which of its blocks leave after each chunk. Used by `worker.py` only."""

from __future__ import annotations

from engine.batch import Chunk
from engine.sequence import Sequence
from kvtransfer.transport import Sender
from prefill.links import Link
from protocol.messages import Prefill
from protocol.network import Peer
from protocol.ticket import Grant
from protocol.timeline import Spent


class Job:
    """One prompt here: its sequence, its grant, the link to its decode worker."""

    def __init__(self, message: Prefill, gateway: Peer, link: Link, now: float = 0.0) -> None:
        self.request = message.request
        self.epoch = message.ticket.epoch
        self.goes_first = message.ticket.goes_first
        self.grant: Grant = message.grant
        self.gateway = gateway
        self.link = link
        self.sequence = Sequence(
            message.request, 0, output_token_ids=message.output_token_ids[0] if message.output_token_ids else ()
        )
        self.num_pushed = self.grant.num_cached_blocks  # blocks of the grant that are on their way, or that decode had
        self.cached_tokens = 0
        self.is_dropped = False
        self.accepted_at = self.started_at = now  # the worker's clock

    def spent(self, now: float) -> Spent:
        return Spent(self.started_at - self.accepted_at, now - self.started_at)

    def chunk(self, num_tokens: int) -> Chunk:
        """The next num_tokens of the prompt; the last chunk samples token 1 of every choice."""
        sequence = self.sequence
        if num_tokens < sequence.num_uncomputed:
            return Chunk(sequence, num_tokens, ())
        return Chunk(sequence, num_tokens, (sequence, *(sequence.fork(c) for c in range(1, self.request.sampling.n))))

    def completed_blocks(self, chunk: Chunk) -> tuple[Sender, str, list[tuple[int, int]]]:
        """(my block, its index in the grant) for all blocks that are whole after this chunk and were not sent before."""
        layout = self.grant.layout
        end = self.sequence.num_computed + chunk.num_tokens
        num_whole = layout.num_blocks_for(end) if end == self.grant.num_tokens else end // layout.block_size
        pairs = [(self.sequence.blocks[i], i) for i in range(self.num_pushed, num_whole)]
        self.num_pushed = max(self.num_pushed, num_whole)
        return self.link.sender, self.grant.grant_id, pairs
