"""Twin of sampling.py: one row, float64, numpy, everything sorted. Tests compare with it; nothing else calls it."""

from __future__ import annotations

import numpy as np

from kernels.sampling import IN_PROMPT


def sample_row(
    logits: np.ndarray,
    uniform: float,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    counts: np.ndarray | None = None,
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
    bias: dict[int, float] | None = None,
) -> int:
    """A token; -1 where the best logit is not finite. penalties: repetition, frequency, presence."""
    x = logits.astype(np.float64)
    for token, value in (bias or {}).items():
        x[token] += value
    if counts is not None:
        repetition, frequency, presence = penalties
        times = counts % IN_PROMPT
        x = np.where(counts != 0, np.where(x > 0, x / repetition, x * repetition), x)
        x = np.where(times > 0, x - frequency * times - presence, x)
    if np.isnan(x).any() or not np.isfinite(x.max()):
        return -1
    if temperature == 0.0:
        return int(x.argmax())
    weights = np.exp((x - x.max()) / max(temperature, 1e-6))
    weights[weights < np.float32(min_p)] = 0.0
    if 0 < top_k < len(weights):
        weights[weights < np.sort(weights)[-top_k]] = 0.0
    if top_p < 1.0:
        ordered = np.sort(weights)[::-1]
        before = np.cumsum(ordered) - ordered
        inside = before < np.float32(top_p) * weights.sum()
        weights[weights < ordered[max(int(inside.sum()) - 1, 0)]] = 0.0
    cdf = np.cumsum(weights)
    return min(int(np.searchsorted(cdf, uniform * cdf[-1], side="right")), len(weights) - 1)
