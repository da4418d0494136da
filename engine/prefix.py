"""Joining a sequence to the block pool: cached prefix first, fresh blocks for the rest, and sealing what becomes full.

The same few rules for both roles, so they stand here once. Called by the loops of prefill/ and decode/.
"""

from __future__ import annotations

from engine.blocks import BlockPool, BlockState, OutOfBlocks
from engine.sequence import Sequence
from protocol.kv import KVLayout
from protocol.request import Request


def cache_salt(layout: KVLayout, request: Request) -> bytes:
    """Neither two models nor two tenants share a block."""
    return f"{layout.model_hash}/{request.cache_salt}".encode()


def full_block_hashes(sequence: Sequence, layout: KVLayout) -> list[bytes]:
    """The hashes of all whole blocks of the sequence's present tokens."""
    sequence.extend_hashes(layout.block_size, cache_salt(layout, sequence.request))
    return sequence.block_hashes


def attach_prefix(pool: BlockPool, sequence: Sequence, layout: KVLayout, headroom: int) -> None:
    """Blocks for all present tokens of a sequence that holds none: what the cache knows is computed already.

    The last token is always left to compute, because its logits are wanted; a prompt whose own logits are wanted uses no
    cache. Raises OutOfBlocks, and then nothing has changed, unless `headroom` blocks remain free.
    """
    assert not sequence.blocks, f"{sequence} holds blocks already"
    block_size = layout.block_size
    num_tokens = len(sequence.token_ids)
    usable = 0 if sequence.request.sampling.prompt_logprobs is not None else (num_tokens - 1) // block_size
    cached = pool.match(full_block_hashes(sequence, layout)[:usable])
    missing = layout.num_blocks_for(num_tokens) - len(cached)
    if missing + headroom > pool.num_free:
        pool.release(cached)
        raise OutOfBlocks
    sequence.blocks = [*cached, *pool.allocate(missing, after=cached[-1] if cached else None)]
    sequence.num_computed = len(cached) * block_size


def seal_full_blocks(pool: BlockPool, sequence: Sequence, layout: KVLayout) -> None:
    """Blocks whose every token is computed become immutable and findable. Cheap when there is none."""
    num_full = sequence.num_computed // layout.block_size
    first = num_full
    while first > 0 and pool.state(sequence.blocks[first - 1]) is BlockState.FILLING:
        first -= 1
    if first == num_full:
        return
    hashes = full_block_hashes(sequence, layout)
    for i in range(first, num_full):
        pool.seal(sequence.blocks[i], hashes[i])


def forget_prefix(pool: BlockPool, sequence: Sequence, layout: KVLayout) -> None:
    """Its logits were not finite, so some of its KV, or what was computed from it, is damaged: no prompt may begin with it."""
    pool.forget(full_block_hashes(sequence, layout))
