"""How long a step will take on so many threads, learnt from those that were: for cutting prompts so that a step is short enough.

Least squares over recent steps with forgetting (recursive, as in Ljung, "System Identification", 1999), one fit for each number of
threads: seconds = a + b * prefill tokens + c * pairs + d * decoding sequences + e * their context. Used by the loops of
prefill/worker.py and decode/worker.py; scheduler/ has models of its own, of whole workers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.stats import StepStats

FORGETTING = 0.98  # a step counts half after 34 others
SCALES = np.array([1.0, 100.0, 30_000.0, 10.0, 10_000.0])  # of the terms: what a usual step has of each
PRIOR = 0.05  # how little is known before the first step, in units of a usual step's seconds
MIN_STEPS = 3
SMALLEST = 64  # tokens; a chunk is never cut below it, for the weights are read once for each
STRIDE = 16
TRY_OTHER = 64  # so often the choice that looks worse is made, for what was true may have changed


class _Fit:
    def __init__(self) -> None:
        self.weights = np.zeros(len(SCALES))
        self.covariance = np.eye(len(SCALES)) * PRIOR
        self.num_steps = 0

    def learn(self, terms: np.ndarray, seconds: float) -> None:
        gain = self.covariance @ terms
        gain = gain / (FORGETTING * 0.01 + float(terms @ gain))
        self.weights = self.weights + gain * (seconds - float(terms @ self.weights))
        self.covariance = (self.covariance - np.outer(gain, terms @ self.covariance)) / FORGETTING
        self.covariance = np.clip(
            (self.covariance + self.covariance.T) / 2, -1.0, 1.0
        )  # what is never seen is not forgotten for ever
        self.num_steps += 1


class Load(NamedTuple):
    """What is to be computed: a prompt of which `first` tokens are done and at most `most` are next, beside sequences that decode,
    with their contexts together."""

    first: int
    most: int
    num_decode: int = 0
    context: int = 0


class Choice(NamedTuple):
    num_threads: int
    max_tokens: int  # of the prompt


class Pace:
    """Of one worker."""

    def __init__(self) -> None:
        self._fits: dict[int, _Fit] = {}
        self._num_choices = 0

    def learn(self, stats: StepStats, num_threads: int) -> None:
        fit = self._fits.setdefault(num_threads, _Fit())
        terms = _terms(stats.num_prefill_tokens, stats.prefill_pairs, stats.num_decode, stats.decode_context)
        fit.learn(terms, stats.seconds)

    def expect(self, num_threads: int, load: Load, num_tokens: int) -> float | None:
        """Seconds of a step with so many of the prompt's tokens; None before enough was seen on so many threads."""
        fit = self._fits.get(num_threads)
        if fit is None or fit.num_steps < MIN_STEPS:
            return None
        pairs = num_tokens * load.first + num_tokens * (num_tokens + 1) // 2
        return max(0.0, float(_terms(num_tokens, pairs, load.num_decode, load.context) @ np.maximum(fit.weights, 0.0)))

    def most_tokens(self, limit_s: float, num_threads: int, load: Load) -> int:
        """The largest chunk of the prompt, a multiple of 16 and not below SMALLEST, whose step stays within limit_s. Before anything
        is known, all."""
        low, high = SMALLEST, load.most
        whole = self.expect(num_threads, load, high)
        if whole is None or whole <= limit_s or high <= SMALLEST:
            return load.most
        while high - low > STRIDE:
            middle = (low + high) // 2
            seconds = self.expect(num_threads, load, middle)
            low, high = (middle, high) if seconds is not None and seconds <= limit_s else (low, middle)
        return low // STRIDE * STRIDE

    def choose(self, limit_s: float, num_own: int, num_offered: int, load: Load) -> Choice:
        """Whether to borrow: on num_offered threads within limit_s, or all on one's own. Where the other cores turn out to be busy
        with something that no ledger knows, borrowing loses, and is then left alone but for a try now and then."""
        if num_offered <= num_own:
            return Choice(num_own, load.most)
        cut = self.most_tokens(limit_s, num_offered, load)
        self._num_choices += 1
        if self._num_choices % TRY_OTHER == 0:
            return Choice(num_own, load.most)
        borrowed, own = self.expect(num_offered, load, cut), self.expect(num_own, load, load.most)
        if borrowed is None or own is None or self._num_choices % TRY_OTHER == TRY_OTHER // 2:
            return Choice(num_offered, cut)
        tokens_borrowed, tokens_own = (max(1, count + load.num_decode) for count in (cut, load.most))
        return Choice(num_offered, cut) if borrowed / tokens_borrowed < own / tokens_own else Choice(num_own, load.most)


def _terms(num_tokens: int, num_pairs: int, num_decode: int, context: int) -> np.ndarray:
    terms: np.ndarray = np.array([1.0, num_tokens, num_pairs, num_decode, context]) / SCALES
    return terms
