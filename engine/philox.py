"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The same (seed, choice, position, stream) gives the same number on every worker, in every batch, at every attempt. Called by
engine/sampler.py.
"""

from __future__ import annotations

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
STREAM_TOKEN = 0  # which token; later streams: draft tokens, acceptance


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """counter [..., 4] and key [..., 2], 32-bit words in uint64 -> four random 32-bit words in uint64."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for number in range(10):
        if number:
            k0, k1 = (k0 + np.uint64(_W0)) & _LOW, (k1 + np.uint64(_W1)) & _LOW
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1)


def uniforms(seeds: list[int], choices: list[int], positions: list[int], stream: int = STREAM_TOKEN) -> np.ndarray:
    """float64 in [0, 1) with 53 random bits, one per row. seeds are 64 bits, the others 32."""
    seed = np.array(seeds, dtype=np.uint64)
    key = np.stack((seed & _LOW, seed >> _32), axis=-1)
    counter = np.empty((len(seeds), 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2], counter[:, 3] = positions, choices, stream, 0
    words = philox4x32(counter, key)
    bits = (words[:, 0] << _32 | words[:, 1]) >> np.uint64(11)
    result: np.ndarray = bits.astype(np.float64) * 2.0**-53
    return result
