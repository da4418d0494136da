"""Speculation of one worker: who guesses, how long each draft is to be, and what came of it.

    plan    before a step: the length of each decoding sequence's draft; a pure function of what was measured
    draft   in the engine's thread: the guesses themselves
    learn   after the step: what was right, and what the step took

Where guessing costs nothing to speak of (lookup), it goes on while no draft pays, and what would have been right is seen in the
tokens that come anyway. Where a model guesses, one sequence at a time is tried all the same, after pauses that grow with each
vain try.
Called by decode/drafting.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.sequence import Sequence
from engine.speculation.pays import Acceptance, StepCost, can_pay, choose

log = logging.getLogger(__name__)

CHECK_EVERY = 64  # steps: one is made the other way, so that both ways' times stay known
MIN_PAUSE, MAX_PAUSE = 16, 1024  # steps between two tries with a model whose drafts do not pay
TRY_LEN = 2  # of a draft that is made to see how good they are


class Guesser(Protocol):
    """Where guesses come from. Owned by one worker; forgets a sequence when it is told to."""

    knows_at_once: bool  # guess() is cheap and can be asked at any time
    num_computed: int  # tokens that a model computed for it, since the beginning

    def guess(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """count tokens, or none; where knows_at_once."""
        ...

    def draft(self, asked: SequenceOf[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """At most as many tokens as asked for each sequence, in the engine's thread."""
        ...

    def forget(self, sequence: Sequence) -> None: ...


class _State:
    """Of one sequence."""

    __slots__ = ("acceptance", "seen", "tried_at")

    def __init__(self, parent: Acceptance) -> None:
        self.acceptance = Acceptance(parent)
        self.seen: tuple[int, int] | None = None  # (length, the token that was guessed to follow), not in a draft
        self.tried_at = 0  # plan


class Speculator:
    """longest: of a draft, in tokens. adapts: False for the longest draft always, whether it pays or not.

    num_drafts, num_draft_tokens, num_accepted: since the beginning. draft_s: seconds of guessing by a model.
    """

    def __init__(self, guesser: Guesser, longest: int, adapts: bool = True, clock: Callable[[], float] = time.perf_counter) -> None:
        assert longest >= 1, longest
        self.guesser = guesser
        self.longest = longest
        self.adapts = adapts
        self.num_drafts = self.num_draft_tokens = self.num_accepted = 0
        self.draft_s = 0.0
        self.cost = StepCost()
        self.mean = Acceptance()
        self._clock = clock
        self._states: dict[int, _State] = {}  # by id(sequence)
        self._num_plans = 0
        self._trial: int | None = None  # id of the sequence
        self._trial_pause = MIN_PAUSE
        self._trial_at = 0

    # ---- before the step -------------------------------------------------------------------------------------------

    def plan(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int], num_sequences: int, context: int) -> list[int]:
        """Draft lengths. limits: the most for each. num_sequences, context: of the whole step, those that may not have one too."""
        self._num_plans += 1
        if not self.adapts:
            return [self._guessed(s, min(limit, self.longest)) for s, limit in zip(sequences, limits, strict=True)]
        if not self.cost.is_known:
            return [0] * len(sequences)
        is_check = self._num_plans % CHECK_EVERY == 0
        parts, round_s = self.cost.parts(num_sequences, context), self.cost.round_s
        if not is_check and not can_pay(num_sequences, self.longest, parts, round_s):
            return [0] * len(sequences)
        chances = [self._chances(s, min(limit, self.longest)) for s, limit in zip(sequences, limits, strict=True)]
        lengths = choose(chances, num_sequences, parts, round_s)
        if is_check and any(lengths):
            return [0] * len(lengths)
        if not self.guesser.knows_at_once:
            self._try_one(sequences, chances, lengths)
        elif is_check and chances:
            best = max(range(len(chances)), key=lambda i: chances[i][:1])
            lengths[best] = min(TRY_LEN, len(chances[best]))
        return lengths

    def _guessed(self, sequence: Sequence, limit: int) -> int:
        return limit if limit < 1 or not self.guesser.knows_at_once else len(self.guesser.guess(sequence, limit))

    def _chances(self, sequence: Sequence, limit: int) -> list[float]:
        """Of the tokens that a draft for it might have, none where nobody has a guess."""
        if limit < 1:
            return []
        state = self._state(sequence)
        if self.guesser.knows_at_once:
            guess = self.guesser.guess(sequence, limit)
            state.seen = (len(sequence), guess[0]) if guess else None
            return state.acceptance.chances(len(guess))
        return state.acceptance.chances(limit)

    def _try_one(self, sequences: SequenceOf[Sequence], chances: SequenceOf[SequenceOf[float]], lengths: list[int]) -> None:
        """Whatever is expected of it: its text may have changed. It stays the one until a draft of it was made."""
        idle = {id(s): i for i, s in enumerate(sequences) if chances[i] and not lengths[i]}
        if self._trial not in idle and self._num_plans >= self._trial_at and idle:
            self._trial = min(idle, key=lambda key: (self._states[key].tried_at, len(sequences[idle[key]])))
        if self._trial in idle:
            own = idle[self._trial]
            lengths[own] = min(TRY_LEN, len(chances[own]))

    def _end_try(self, state: _State, was_right: bool) -> None:
        self._trial = None
        state.tried_at = self._num_plans
        self._trial_pause = MIN_PAUSE if was_right else min(MAX_PAUSE, 2 * self._trial_pause)
        self._trial_at = self._num_plans + self._trial_pause

    # ---- in the engine's thread ------------------------------------------------------------------------------------

    def draft(self, asked: SequenceOf[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """The guesses, at most as many as asked. A guesser that fails costs its drafts, not the step."""
        started, computed = self._clock(), self.guesser.num_computed
        try:
            drafts = self.guesser.draft(asked)
        except Exception:
            log.exception("drafting failed; the step goes on without")
            return [()] * len(asked)
        seconds = self._clock() - started
        if not self.guesser.knows_at_once:
            self.draft_s += seconds
            rounds = max(map(len, drafts), default=0)
            is_clean = self.guesser.num_computed - computed <= sum(map(len, drafts)) + 2 * len(asked)  # nobody caught up
            if rounds and is_clean:
                self.cost.observe_round(seconds / rounds)
        return drafts

    # ---- after the step --------------------------------------------------------------------------------------------

    def learn(self, sequence: Sequence, draft: tuple[int, ...], num_accepted: int, next_token: int) -> None:
        """num_accepted: of the draft's tokens. next_token: the first that came of the step. Before the sequence is appended to."""
        state = self._state(sequence)
        seen, state.seen = state.seen, None
        if draft:
            self.num_drafts += 1
            self.num_draft_tokens += len(draft)
            self.num_accepted += num_accepted
            state.acceptance.observe(len(draft), num_accepted)
            if self._trial == id(sequence):
                self._end_try(state, num_accepted == len(draft))
        elif seen is not None and seen[0] == len(sequence):
            state.acceptance.observe(1, int(seen[1] == next_token))

    def learn_step(self, num_sequences: int, num_draft: int, context: int, seconds: float) -> None:
        """What a step of decoding sequences alone took, drafting apart."""
        self.cost.observe(num_sequences, num_draft, context, seconds)

    def forget(self, sequence: Sequence) -> None:
        self._states.pop(id(sequence), None)
        if self._trial == id(sequence):
            self._trial = None
        self.guesser.forget(sequence)

    def __len__(self) -> int:
        return len(self._states)

    def _state(self, sequence: Sequence) -> _State:
        state = self._states.get(id(sequence))
        if state is None:
            state = self._states[id(sequence)] = _State(self.mean)
        return state
