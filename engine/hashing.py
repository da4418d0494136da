"""Chained hashes of whole blocks: the names under which the prefix cache knows their KV.

Not an integrity check of KV bytes (that is kvtransfer/digest.py). Called by sequences, block pools and, because it needs
no torch, by the gateway. blake2b and not a faster hash: a client chooses the tokens, and a constructed collision would
give it the KV of somebody else's prompt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

HASH_NBYTES = 16


def root_hash(salt: bytes) -> bytes:
    """The parent of every first block. salt: model hash + cache salt, so that neither models nor tenants share blocks."""
    return hashlib.blake2b(salt, digest_size=HASH_NBYTES).digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of one whole block whose predecessors have the hash `parent`."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=HASH_NBYTES).digest()


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: bytes) -> None:
    """Append the hashes of the whole blocks of token_ids that `hashes` does not cover yet."""
    parent = hashes[-1] if hashes else root_hash(salt)
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = next_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)


def block_hashes(token_ids: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """One hash for each whole block of token_ids; a last partial block has none."""
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, block_size, salt)
    return hashes
