"""xxh3-128 of every run, at both ends: what makes a wrong byte visible before decode reads it (truth rule R4).

The manifest's MAC covers the digests, so whoever changes bytes on the way must also find a collision; xxh3 is no
barrier to somebody who can choose the bytes, it is one to hardware, software and mix-ups. Called by outgoing.py
(prefill side) and by decode/worker.py, there in a thread: `verify` reads all the bytes.
"""

from __future__ import annotations

import xxhash

from kvtransfer.handoff import DIGEST_NBYTES, written_blocks
from kvtransfer.pool import KVPool
from protocol.errors import TransferFailed
from protocol.ticket import Grant, Manifest

run_digest = xxhash.xxh3_128_digest  # of any contiguous buffer -> 16 bytes; lets the GIL go while it reads a large one


def verify(pool: KVPool, grant: Grant, manifest: Manifest) -> list[tuple[int, int]]:
    """Recompute every digest over our pool. -> the bad ones as (layer, index into grant.block_ids); empty means: good.

    Whole runs are hashed, the unused end of a partly filled last block included: the sender zeroes it (outgoing.py).
    Raises TransferFailed when manifest and grant do not even have the same shape, so that "not checked" never looks
    good.
    """
    blocks = written_blocks(grant)
    num_layers = pool.layout.num_layers
    expected = num_layers * len(blocks) * DIGEST_NBYTES
    if manifest.num_written != len(blocks) or len(manifest.digests) != expected or grant.layout != pool.layout:
        raise TransferFailed(
            f"grant {grant.grant_id}: {manifest.num_written} blocks and {len(manifest.digests)} bytes of digests do not "
            f"fit {len(blocks)} blocks and {expected} bytes"
        )
    digests = memoryview(manifest.digests)
    bad: list[tuple[int, int]] = []
    position = 0
    for layer in range(num_layers):
        flat = pool.runs[layer].reshape(-1).data  # [num_blocks * run_nbytes]
        for i, block in enumerate(blocks):
            start = block * pool.layout.run_nbytes
            if run_digest(flat[start : start + pool.layout.run_nbytes]) != digests[position : position + DIGEST_NBYTES]:
                bad.append((layer, grant.num_cached_blocks + i))
            position += DIGEST_NBYTES
    return bad
