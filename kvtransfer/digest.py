"""xxh3-128 of every run, at both ends: what makes a wrong byte visible before decode reads it (truth rule R4).

The manifest's MAC covers the digests, so whoever changes bytes on the way must also find a collision; xxh3 is no
barrier to somebody who can choose the bytes, it is one to hardware, software and mix-ups. Called by receiving.py, `verify` in a
thread: it reads whatever was not hashed before.
"""

from __future__ import annotations

from kvtransfer.arrivals import Arrivals
from kvtransfer.handoff import DIGEST_NBYTES, written_blocks
from kvtransfer.layout import Place, num_rows
from kvtransfer.pool import KVPool
from kvtransfer.view import run_digest, view_of
from protocol.errors import TransferFailed
from protocol.ticket import Grant, Landed, Manifest

__all__ = ["hash_landed", "is_known_good", "run_digest", "verify"]


def hash_landed(pool: KVPool, arrivals: Arrivals, landed: Landed) -> None:
    """Hash the runs of a rectangle that lie on this rank, ahead of the seal."""
    blocks = arrivals.grant.block_ids[landed.first : landed.first + landed.count]
    for row in range(landed.row, landed.row + landed.num_rows):
        found = arrivals.place_of(row)
        if found is not None:
            route, layer = found
            view = view_of(pool, route.target_area, landed.digest)
            arrivals.put(arrivals.first_row(route.source) + layer, landed.first, view.digests(layer, blocks))


def is_known_good(arrivals: Arrivals, manifest: Manifest) -> bool:
    """Every run was hashed before, and each digest is the manifest's. Cheap: no run is read."""
    return arrivals.is_complete and arrivals.digests == _expected(arrivals, manifest)


def verify(
    pool: KVPool, grant: Grant, manifest: Manifest, place: Place | None = None, arrivals: Arrivals | None = None
) -> list[tuple[int, int]]:
    """Compare every digest of this rank's rows with our pool. -> the bad ones as (layer of the model, index into
    grant.block_ids); empty means: good.

    arrivals: digests computed since each run was last stored; where one is missing or another than the manifest's the run is
    read again. Whole runs are hashed, the unused end of a partly filled last block included: the sender zeroes it (outgoing.py).
    Raises TransferFailed when manifest and grant do not even have the same shape, so that "not checked" never looks good.
    """
    place = place or Place(pool.layout)
    blocks = written_blocks(grant)
    expected = num_rows(grant.layout, grant.source, grant.target) * len(blocks) * DIGEST_NBYTES
    is_ours = (grant.layout, grant.target) == (place.layout, place.parallel)
    if manifest.num_written != len(blocks) or len(manifest.digests) != expected or not is_ours:
        raise TransferFailed(
            f"grant {grant.grant_id}: {manifest.num_written} blocks and {len(manifest.digests)} bytes of digests do not "
            f"fit {len(blocks)} blocks and {expected} bytes"
        )
    bad: list[tuple[int, int]] = []
    known = arrivals or Arrivals(grant, place)
    width = len(blocks) * DIGEST_NBYTES
    for route, first_row, own_row in Arrivals(grant, place).routes:
        view = view_of(pool, route.target_area, manifest.digest)
        if not known.is_complete:
            view.prefetch(blocks)
        for layer in range(route.num_layers):
            wanted = manifest.digests[(first_row + layer) * width :][:width]
            doubtful = [i for i in range(len(blocks)) if _is_doubtful(known, own_row + layer, grant, i, wanted)]
            found = view.digests(layer, [blocks[i] for i in doubtful])
            for position, i in enumerate(doubtful):
                if _at(found, position) != _at(wanted, i):
                    bad.append((route.layer + layer, grant.num_cached_blocks + i))
    return bad


def _is_doubtful(known: Arrivals, row: int, grant: Grant, i: int, wanted: bytes) -> bool:
    return known.digest(row, grant.num_cached_blocks + i) != _at(wanted, i)


def _at(digests: bytes, i: int) -> bytes:
    return digests[i * DIGEST_NBYTES : (i + 1) * DIGEST_NBYTES]


def _expected(arrivals: Arrivals, manifest: Manifest) -> bytes:
    """The part of a manifest that arrivals speak of."""
    width = arrivals.num_written * DIGEST_NBYTES
    if len(arrivals.digests) == len(manifest.digests):
        return manifest.digests
    return b"".join(manifest.digests[first * width : (first + route.num_layers) * width] for route, first, _ in arrivals.routes)
