"""One attempt of one request at a decode worker. State only; `worker.py` and `handover.py` change it."""

from __future__ import annotations

from engine.sequence import Sequence
from protocol.events import TokenLogprobs
from protocol.messages import Reserve
from protocol.network import Clock, Peer
from protocol.ticket import Grant
from protocol.timeline import Spent


class Job:
    """Its sequences by choice, whom to tell, and, until its KV is sealed, what its grant set aside."""

    def __init__(self, reserve: Reserve, gateway: Peer, now: float = 0.0) -> None:
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
        self.began_at = now  # reserved, or sealed where a prefill worker computed the prompt; the worker's clock
        self.first_step_at: float | None = None
        self.transfer_s: float | None = None  # computed by the prefill worker -> verified here
        self.has_told = False

    def sealed(self, now: float, landed_s: float, since: float) -> None:
        """Its KV is verified; the verification began at `since`, and landed_s is what the writer measured before it."""
        self.began_at, self.transfer_s = now, landed_s + now - since

    def take_scores(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Of the prompt, what was not told yet."""
        scored, self.scored = tuple(self.scored), []
        return scored or None

    def take_spent(self, clock: Clock) -> Spent | None:
        """What its first token from here took, told once. A prompt that came over waited from its seal on, the step included."""
        if self.has_told:
            return None
        self.has_told, now = True, clock()
        if self.transfer_s is not None:
            return Spent(now - self.began_at, 0.0, self.transfer_s)
        first_step_at = self.first_step_at or now
        return Spent(first_step_at - self.began_at, now - first_step_at)

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.epoch
