"""What a placement is, and what decides about it: `scheduler.joint` is ours, published policies are the simulator's."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from protocol.errors import TandemError
from protocol.messages import Admit
from scheduler.cost import OutputLength
from scheduler.ledger import WorkerState


class Blocked(enum.Enum):
    """Why a request cannot be placed now."""

    NO_WORKER = "no worker"  # none alive that this request may use: others may still go ahead
    NO_ROOM = "no room"  # it is first in line and waits for room


class Placement(NamedTuple):
    decode: WorkerState
    prefill: WorkerState | None
    cached: int  # prompt tokens that the prefilling worker is believed to hold
    prefill_s: float  # predicted, without queueing
    ttft_s: float  # predicted, from now
    expected_output: float  # tokens of one choice
    tpot_s: float = 0.0  # predicted; 0: not
    tpot_limit: float = math.inf  # seconds a token that others must leave it; infinite: nothing was promised that could be kept
    goes_first: bool = False  # at the prefill worker: before those whose tenants have had their share


class Refused(NamedTuple):
    """For policies that reject: the request is over, with this error."""

    error: TandemError


class Placer(Protocol):
    """Decides where one request goes now. `workers`: those of its model. `matches`: incarnation -> leading hashes it holds.
    admit.ttft_slo_s and tpot_slo_s are what it was promised; it waits since `queued_at`."""

    def place(
        self,
        admit: Admit,
        workers: Sequence[WorkerState],
        output: OutputLength,
        matches: Mapping[str, int],
        queued_at: float,
        now: float,
    ) -> Placement | Blocked | Refused: ...


class Rules(NamedTuple):
    """What the configuration says about placement."""

    disaggregation_threshold: int
    tpot_target_s: float
    max_prefill_queue_s: float  # work beyond it waits in the scheduler's queue, where it can still change its mind
    hash_block_len: int  # tokens behind one hash of Admit.prefix_hashes
    attainment: float = 0.9  # the share of requests that is to keep its promise
