"""How long a step will take on so many threads, learnt from those that were: for cutting prompts so that a step is short enough.

Least squares over recent steps with forgetting (recursive, as in Ljung, "System Identification", 1999), one fit for each number of
threads: seconds = a + b * prefill tokens + c * pairs + d * decoding sequences + e * their context. Used by the loops of
prefill/worker.py and decode/worker.py; scheduler/ has models of its own, of whole workers.
"""

from __future__ import annotations

import numpy as np

from engine.stats import StepStats

FORGETTING = 0.98  # a step counts half after 34 others
SCALES = np.array([1.0, 100.0, 30_000.0, 10.0, 10_000.0])  # of the terms: what a usual step has of each
PRIOR = 0.05  # how little is known before the first step, in units of a usual step's seconds
MIN_STEPS = 3
SMALLEST = 16  # tokens; a chunk is never cut below it
STRIDE = 16


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


class Pace:
    """Of one worker."""

    def __init__(self) -> None:
        self._fits: dict[int, _Fit] = {}

    def learn(self, stats: StepStats, num_threads: int) -> None:
        fit = self._fits.setdefault(num_threads, _Fit())
        terms = _terms(stats.num_prefill_tokens, stats.prefill_pairs, stats.num_decode, stats.decode_context)
        fit.learn(terms, stats.seconds)

    def expect(self, num_threads: int, num_tokens: int, num_pairs: int, num_decode: int = 0, context: int = 0) -> float | None:
        """Seconds; None before enough was seen on so many threads."""
        fit = self._fits.get(num_threads)
        if fit is None or fit.num_steps < MIN_STEPS:
            return None
        return max(0.0, float(_terms(num_tokens, num_pairs, num_decode, context) @ np.maximum(fit.weights, 0.0)))

    def most_tokens(self, limit_s: float, num_threads: int, most: int, first: int, num_decode: int = 0, context: int = 0) -> int:
        """The largest chunk, a multiple of 16 up to `most`, whose step stays within limit_s. first: tokens of the prompt that are
        computed already. Before anything is known, `most`."""
        low, high = SMALLEST, max(SMALLEST, most)
        whole = self.expect(num_threads, high, _pairs(first, high), num_decode, context)
        if whole is None or whole <= limit_s:
            return most
        while high - low > STRIDE:
            middle = (low + high) // 2
            seconds = self.expect(num_threads, middle, _pairs(first, middle), num_decode, context)
            low, high = (middle, high) if seconds is not None and seconds <= limit_s else (low, middle)
        return min(most, max(SMALLEST, low // STRIDE * STRIDE))


def _pairs(first: int, length: int) -> int:
    return length * first + length * (length + 1) // 2


def _terms(num_tokens: int, num_pairs: int, num_decode: int, context: int) -> np.ndarray:
    terms: np.ndarray = np.array([1.0, num_tokens, num_pairs, num_decode, context]) / SCALES
    return terms
