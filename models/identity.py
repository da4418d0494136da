"""The hash that names a checkpoint's weights and configuration, the same on every rank of every group of any size.

Workers exchange KV only where these hashes agree, so it must be the same function of the files for a prefill worker of four
tensor ranks and a decode worker of two. A hash over all bytes would make each rank read the whole checkpoint, of which it needs
a fraction; one over a rank's own parts would differ between sizes. So it is taken from samples: tensors of up to WHOLE_NBYTES
whole, larger ones by SAMPLE_NBYTES out of every STRIDE_NBYTES, their beginning and their end. Training, merging, quantising or
converting changes nearly all of a matrix's numbers, and then the samples too. It is no check for damaged files: one flipped bit
in a large tensor is found once in STRIDE_NBYTES / SAMPLE_NBYTES times. Called by models/load.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import xxhash

from models.config import ModelConfig
from models.weights import SafetensorsFile

WHOLE_NBYTES = 4 << 20
STRIDE_NBYTES = 1 << 20
SAMPLE_NBYTES = 4096
PIECE_NBYTES = 256 << 10  # of what is hashed whole, is in memory at a time
NUM_THREADS = 8  # small reads far apart: a disk answers several as quickly as one


def model_hash(config: ModelConfig, where: dict[str, SafetensorsFile], rounding: str = "") -> str:
    """where: the tensors of the whole model. It does not matter how they are dealt to files. rounding: what becomes of the weights
    as they are loaded ("int8"), for other weights compute other KV. Raises ModelError."""
    with ThreadPoolExecutor(min(NUM_THREADS, len(where))) as pool:
        digests = dict(pool.map(lambda item: (item[0], _tensor_digest(*item)), where.items()))
    total = xxhash.xxh3_128(f"{config!r}{rounding}".encode())
    for name in sorted(digests):
        total.update(digests[name])
    return total.hexdigest()


def _tensor_digest(name: str, file: SafetensorsFile) -> bytes:
    hasher = xxhash.xxh3_128(f"{name} {file.dtype(name)} {file.shape(name)} ".encode())
    start, end = file.span(name)
    for offset, length in sampled(end - start):
        hasher.update(file.read(start + offset, length))
    return hasher.digest()


def sampled(nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is hashed of a tensor of so many bytes."""
    if nbytes <= WHOLE_NBYTES:
        yield from ((offset, min(PIECE_NBYTES, nbytes - offset)) for offset in range(0, nbytes, PIECE_NBYTES))
        return
    yield from ((offset, SAMPLE_NBYTES) for offset in range(0, nbytes - SAMPLE_NBYTES, STRIDE_NBYTES))
    yield nbytes - SAMPLE_NBYTES, SAMPLE_NBYTES
