"""One request of a trace on its way through the simulated cluster. State only; `cluster.py` and `workers.py` change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from simulation.blocks import Holding

if TYPE_CHECKING:
    from protocol.messages import Admit
    from simulation.decode import DecodeWorker
    from simulation.prefill import PrefillWorker


class Req:
    """prompt, output: tokens. prefix: the prompt's whole hash blocks, as the trace names them. All times are the simulation's.

    At a decode worker it computes `todo` tokens (its prompt, or what a preemption threw away) before it decodes; `context`
    tokens have KV there, `generated` tokens have been made.
    """

    __slots__ = (
        "admit", "arrived_at", "at_decode", "at_prefill", "begun_at", "band", "cached", "cls", "computed", "context", "decode",
        "epoch", "finish_step", "first_at", "generated", "index", "num_attempts", "num_retries", "offered_at", "output",
        "placed_at", "prefill", "prefill_tokens", "prefix", "prompt", "recomputed", "sealed", "spare", "tenant", "todo", "waited",
        "was_refused_at", "joined_step", "tpot_slo_s", "ttft_slo_s", "predicted_s", "is_here", "held", "goes_first",
    )  # fmt: skip

    def __init__(
        self, index: int, at: float, tenant: str, cls: str, prompt: int, output: int, prefix: tuple[int, ...], admit: Admit
    ) -> None:
        self.index = index
        self.offered_at = at  # in the trace
        self.arrived_at = at  # as last asked: later than offered_at for a client that was told to come back
        self.tenant = tenant
        self.cls = cls
        self.prompt = prompt
        self.output = output
        self.prefix = prefix
        self.admit = admit
        self.band = 0
        self.ttft_slo_s = self.tpot_slo_s = float("inf")
        self.epoch = self.num_attempts = self.num_retries = 0
        self.placed_at = -1.0
        self.begun_at = -1.0  # its prefill
        self.first_at = -1.0
        self.was_refused_at = -1.0
        self.predicted_s = 0.0
        self.waited = 0.0
        self.prefill: PrefillWorker | None = None
        self.decode: DecodeWorker | None = None
        self.at_prefill = Holding()
        self.at_decode = Holding()
        self.spare = 0  # blocks beside those, for its first step
        self.is_here = False  # the decode worker holds something for it
        self.todo = 0
        self.computed = 0
        self.sealed = 0  # hash blocks of it that may be shared where it is being prefilled
        self.goes_first = False  # at its prefill worker
        self.held = 0  # hash blocks of it that its decode worker had when it set blocks aside
        self.cached = 0  # tokens of its prompt that were not computed
        self.context = 0
        self.generated = 0
        self.finish_step = 0
        self.joined_step = 0
        self.prefill_tokens = 0  # computed for it, wherever
        self.recomputed = 0  # of these, what a preemption or another attempt made necessary

    @property
    def key(self) -> tuple[str, int]:
        return self.admit.request_id, self.epoch


class Events(Protocol):
    """What a worker needs of the simulation."""

    now: float

    def at(self, time: float, act: object, argument: object) -> None:
        """Call act(argument) then."""
        ...

    def first_token(self, req: Req) -> None: ...

    def prefilled(self, req: Req) -> None:
        """A prefill worker has computed the prompt: its KV goes over, unless its first token was its last."""
        ...

    def finished(self, req: Req) -> None: ...
