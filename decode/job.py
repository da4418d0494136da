"""One attempt of one request at a decode worker. State only; `worker.py` and `handover.py` change it."""

from __future__ import annotations

from engine.sequence import Sequence
from protocol.events import TokenLogprobs
from protocol.messages import Reserve
from protocol.network import Peer
from protocol.ticket import Grant


class Job:
    """Its sequences by choice, whom to tell, and, until its KV is sealed, what its grant set aside."""

    def __init__(self, reserve: Reserve, gateway: Peer) -> None:
        self.request = reserve.request
        self.epoch = reserve.ticket.epoch
        self.delivered = reserve.output_token_ids or ((),) * reserve.request.sampling.n
        self.gateway = gateway
        self.sequences: dict[int, Sequence] = {}
        self.grant: Grant | None = None
        self.granted_blocks: list[int] = []  # the grant's, until a sequence owns them
        self.block_hashes: list[bytes] = []  # of the prompt's full blocks, where somebody else prefills it
        self.spare_blocks: list[int] = []  # for what follows the prompt: a copy of its last block, or a fresh one
        self.cached_tokens = 0
        self.scored: list[TokenLogprobs | None] = []  # the prompt's own log-probabilities, as its chunks yield them
        self.ended: set[int] = set(reserve.finished)  # choices that are over, also before they ever ran here
        self.is_dropped = False

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.epoch
