"""What the paged attention kernels share: one step of a walk over keys with an online softmax, in Triton.

Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022. Inlined by paged_decode.py and paged_prefill.py, called by nobody
else. The multiplication and the subtraction in front of exp2 are one explicit fma on masked products, so that a row gets the
same bits whether or not its tile needed a mask: chunking a prompt otherwise must not change them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is the hardware's own
TWO_LOG2_E = tl.constexpr(2 * LOG2_E)


def factors(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """(inner, outer): a product d of q and k has the exponent, to base 2, d * outer; under a cap tanh(d * inner) * outer."""
    return (1.0, scale * LOG2_E) if soft_cap is None else (scale / soft_cap, soft_cap * LOG2_E)


@triton.jit
def capped(products, inner):  # type: ignore[no-untyped-def]
    """tanh(products * inner), from exp2 alone: no library call, and the interpreter knows it."""
    x = products * inner
    e = tl.exp2(-tl.abs(x) * TWO_LOG2_E)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def absorb(products, outer, maximum, normaliser):  # type: ignore[no-untyped-def]
    """One tile of products [rows, keys], -inf where hidden -> (weights, shrink of what was summed so far, maximum, normaliser).

    A row that has seen nothing yet keeps the maximum -inf, weights 0 and its zeros.
    """
    new_maximum = tl.maximum(maximum, tl.max(products, 1) * outer)
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(tl.fma(products, tl.full(products.shape, outer, tl.float32), tl.broadcast_to(-base[:, None], products.shape)))
    shrink = tl.exp2(maximum - base)
    return weights, shrink, new_maximum, normaliser * shrink + tl.sum(weights, 1)
