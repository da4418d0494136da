"""Whether a draft pays, and of which length: acceptance as it was measured, and what a longer step was measured to cost.

A step of B sequences yields one token each. Drafts add to sequence i the tokens that are right, in expectation the sum of its
chances, and make the step longer. `choose` takes the lengths under which the worker makes most tokens a second, none where that is
not at least MIN_GAIN more than without. So speculation ends by itself where guesses are bad, and where the batch is so large that
a row more costs what a token costs. Pure; called by `speculator.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

MIN_GAIN = 1.03
FORGETTING = 0.98  # of what steps cost, each step
PARENT_WEIGHT = 2.0  # tries that the worker's mean counts for in a sequence's own
OWN_MEMORY, PARENT_MEMORY = 0.9, 0.99  # kept of earlier tries at each new one
HOPE = 0.6  # acceptance before anything was tried
SOLVE_EVERY = 4  # steps


class Acceptance:
    """How often the first token of a draft was right, and how often each next one after a right one. parent: the worker's mean."""

    __slots__ = ("_first", "_first_tries", "_next", "_next_tries", "_parent")

    def __init__(self, parent: Acceptance | None = None) -> None:
        self._first = self._first_tries = self._next = self._next_tries = 0.0
        self._parent = parent

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        memory = OWN_MEMORY if self._parent is not None else PARENT_MEMORY
        self._first = memory * self._first + (num_accepted > 0)
        self._first_tries = memory * self._first_tries + 1
        tries = min(num_accepted, num_drafted - 1)  # places after a right one that were guessed
        if tries > 0:
            fade = memory**tries
            self._next = fade * self._next + num_accepted - 1
            self._next_tries = fade * self._next_tries + tries
        if self._parent is not None:
            self._parent.observe(num_drafted, num_accepted)

    @property
    def first(self) -> float:
        prior = self._parent.first if self._parent is not None else HOPE
        return (self._first + PARENT_WEIGHT * prior) / (self._first_tries + PARENT_WEIGHT)

    @property
    def following(self) -> float:
        prior = self._parent.following if self._parent is not None else HOPE
        return (self._next + PARENT_WEIGHT * prior) / (self._next_tries + PARENT_WEIGHT)

    def chances(self, count: int) -> list[float]:
        """That the first 1, 2, ... count tokens of a draft are right."""
        chances, following = [], self.following
        chance = self.first
        for _ in range(count):
            chances.append(chance)
            chance *= following
        return chances


class StepCost:
    """Seconds of a decode step: a + b * sequences + c * (any drafts?) + d * draft tokens + e * context, least squares over
    discounted, relative residuals; no part is ever negative. What is not known yet is taken to be cheap, so that it is tried."""

    def __init__(self) -> None:
        self._theta: np.ndarray | None = None
        self._prior = np.zeros(5)
        self._a = np.zeros((5, 5))
        self._b = np.zeros(5)
        self._num_seen = 0
        self.round_s = 0.0  # of one token of every draft, where a model makes them

    @property
    def is_known(self) -> bool:
        return self._theta is not None

    def observe(self, num_sequences: int, num_draft: int, context: int, seconds: float) -> None:
        x = _features(num_sequences, num_draft, context)
        if self._theta is None:
            self._prior = np.array([0.5 * seconds, 0.3 * seconds / num_sequences, 0.0, 0.05 * seconds / num_sequences, 0.0])
            self._theta = self._prior
        seconds = min(seconds, 3.0 * float(x @ self._theta)) if self._num_seen > 8 else seconds  # somebody else had the core
        x = x / seconds
        self._a = FORGETTING * self._a + np.outer(x, x)
        self._b = FORGETTING * self._b + x
        self._num_seen += 1
        if self._num_seen % SOLVE_EVERY == 0:
            self._solve()

    def _solve(self) -> None:
        """The prior pulls at every part with a small weight in that part's own units, so the system is never singular."""
        scale = np.array([1.0, 1.0, 1.0, 1.0, 1e-3]) / max(1e-9, float(self._prior[0] + self._prior[1]))
        weight = np.diag(0.02 * scale**2)
        free = list(range(5))
        a, b = self._a + weight, self._b + weight @ self._prior
        theta = np.zeros(5)
        for _ in range(4):
            theta = np.zeros(5)
            theta[free] = np.linalg.solve(a[np.ix_(free, free)], b[free])
            below = [i for i in free if theta[i] < 0]
            if not below:
                break
            free = [i for i in free if i not in below]
        self._theta = np.maximum(theta, 0.0)
        self._theta[0] = max(self._theta[0], 1e-6)

    def observe_round(self, seconds: float) -> None:
        self.round_s = seconds if self.round_s == 0 else 0.9 * self.round_s + 0.1 * min(seconds, 3 * self.round_s)

    def step_s(self, num_sequences: int, num_draft: int, context: int) -> float:
        assert self._theta is not None
        return float(_features(num_sequences, num_draft, context) @ self._theta)

    def parts(self, num_sequences: int, context: int) -> tuple[float, float, float]:
        """(a step without drafts, what any drafts add, what each of their tokens adds)."""
        assert self._theta is not None
        return self.step_s(num_sequences, 0, context), float(self._theta[2]), float(self._theta[3])


def _features(num_sequences: int, num_draft: int, context: int) -> np.ndarray:
    return np.array([1.0, num_sequences, num_draft > 0, num_draft, context], dtype=np.float64)


def choose(
    chances: SequenceOf[SequenceOf[float]], num_sequences: int, parts: tuple[float, float, float], round_s: float
) -> list[int]:
    """How long the draft of each sequence is to be. chances[i]: that its first 1, 2, ... tokens are right, as many as it may have.
    num_sequences: of the whole step, those without a draft included. parts: StepCost.parts(). round_s: of a draft model, for one
    token of all drafts.

    Tokens are taken in the order of their chances; a draft's own tokens come in order, as chances only fall.
    """
    plain_s, any_s, each_s = parts
    plain_rate = num_sequences / plain_s
    best, best_rate = [0] * len(chances), plain_rate * MIN_GAIN
    deepest = max((len(own) for own in chances), default=0)
    for depth in range(1, deepest + 1) if round_s > 0 else ([deepest] if deepest else []):
        order = sorted(((c, i) for i, own in enumerate(chances) for c in own[:depth]), reverse=True)
        lengths, tokens, seconds = [0] * len(chances), float(num_sequences), plain_s + any_s + depth * round_s
        for chance, i in order:
            tokens += chance
            seconds += each_s
            lengths[i] += 1
            if tokens / seconds > best_rate:
                best, best_rate = list(lengths), tokens / seconds
    return best


def can_pay(num_sequences: int, longest: int, parts: tuple[float, float, float], round_s: float) -> bool:
    """Whether it would, if every guess were right: where not, nobody need guess."""
    plain_s, any_s, each_s = parts
    return any(
        num_sequences * (1 + k) / (plain_s + any_s + k * (round_s + num_sequences * each_s)) > MIN_GAIN * num_sequences / plain_s
        for k in range(1, longest + 1)
    )
