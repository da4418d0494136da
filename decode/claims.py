"""What signed `Landed` papers have said of one grant's blocks, for the case that its writer never gets to seal them.

A claim is the writer's word and no more: what of it is worth keeping is read again, once nobody can store there any more
(`handover.py`). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvtransfer.handoff import DIGEST_NBYTES, written_blocks
from kvtransfer.layout import num_rows
from protocol.kv import XXH3
from protocol.ticket import Grant, Landed, Manifest


class Claims:
    """block_hashes: of the prompt's full blocks, in their order; only those can be found again."""

    def __init__(self, grant: Grant, block_hashes: Sequence[bytes]) -> None:
        self.grant = grant
        self.block_hashes = block_hashes
        self._num_written = len(written_blocks(grant))
        self._num_rows = num_rows(grant.layout, grant.source, grant.target)
        self._digests = bytearray()
        self._is_claimed = bytearray()
        self._num_claimed: list[int] = []  # rows, by written block
        self._digest = XXH3  # the kind

    def put(self, landed: Landed) -> None:
        """A paper that the state machine has checked. A run that was stored again is claimed again."""
        if not self._num_claimed:
            self._digests = bytearray(self._num_rows * self._num_written * DIGEST_NBYTES)
            self._is_claimed = bytearray(self._num_rows * self._num_written)
            self._num_claimed = [0] * self._num_written
            self._digest = landed.digest
        first = landed.first - self.grant.num_cached_blocks
        width = landed.count * DIGEST_NBYTES
        for i in range(landed.num_rows):
            start = (landed.row + i) * self._num_written + first
            at = start * DIGEST_NBYTES
            self._digests[at : at + width] = landed.digests[i * width : (i + 1) * width]
            for block in range(first, first + landed.count):
                place = start - first + block
                self._num_claimed[block] += not self._is_claimed[place]
                self._is_claimed[place] = 1

    def num_leading(self) -> int:
        """How many of the first written blocks are full and claimed in all their rows."""
        num_full = min(len(self.block_hashes), self.grant.num_tokens // self.grant.layout.block_size) - self.grant.num_cached_blocks
        most = min(num_full, len(self._num_claimed))
        return next((i for i in range(most) if self._num_claimed[i] != self._num_rows), max(0, most))

    def part(self, max_nbytes: int) -> tuple[Grant, Manifest] | None:
        """The leading blocks, as papers of a grant of just those; None: there are none."""
        grant, layout = self.grant, self.grant.layout
        count = min(self.num_leading(), max_nbytes // layout.block_nbytes)
        if count == 0:
            return None
        blocks = grant.block_ids[: grant.num_cached_blocks + count]
        part = msgspec.structs.replace(
            grant, grant_id=f"{grant.grant_id}/kept", block_ids=blocks, num_tokens=len(blocks) * layout.block_size
        )
        width = self._num_written * DIGEST_NBYTES
        rows = [bytes(self._digests[row * width : row * width + count * DIGEST_NBYTES]) for row in range(self._num_rows)]
        manifest = Manifest(
            grant_id=part.grant_id,
            request_id=grant.request_id,
            epoch=grant.epoch,
            decode_incarnation=grant.decode_incarnation,
            prefill_incarnation=grant.prefill_incarnation,
            num_written=count,
            layout=layout,
            digests=b"".join(rows),
            first_tokens=(),
            digest=self._digest,
        )
        return part, manifest
