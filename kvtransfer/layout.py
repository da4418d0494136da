"""The geometry of KV in plain integers: which bytes are which layer, block, K/V, head and slot, and which part lies on
which rank.

Not here: memory (pool.py) and tensors. Used by the transports, by tests, and by whoever asks which rank talks to which.
Byte order of a pool: [num_layers, num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim], see protocol/kv.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from protocol.errors import Unsupported
from protocol.kv import DTYPE_NBYTES, KVLayout
from protocol.ticket import Grant

K, V = 0, 1


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [start, end)."""

    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def run_span(layout: KVLayout, num_blocks: int, layer: int, block: int) -> Span:
    """The bytes of one (layer, block) in a pool of `num_blocks`."""
    assert 0 <= layer < layout.num_layers, f"layer {layer} of {layout.num_layers}"
    assert 0 <= block < num_blocks, f"block {block} of {num_blocks}"
    start = (layer * num_blocks + block) * layout.run_nbytes
    return Span(start, start + layout.run_nbytes)


def slot_span(layout: KVLayout, kv: int, head: int, slot: int) -> Span:
    """The bytes of one token's key (kv = K) or value (kv = V) of one head, within a run."""
    row = layout.head_dim * DTYPE_NBYTES[layout.dtype]
    start = ((kv * layout.num_kv_heads + head) * layout.block_size + slot) * row
    return Span(start, start + row)


def num_used_slots(layout: KVLayout, num_tokens: int, index: int) -> int:
    """How many tokens block `index` of a sequence of `num_tokens` holds; 0 past its end."""
    return max(0, min(layout.block_size, num_tokens - index * layout.block_size))


def tail_spans(layout: KVLayout, num_used: int) -> list[Span]:
    """The bytes of a run that hold no token when only the first `num_used` slots are used: one span per K/V and
    head.
    """
    if num_used >= layout.block_size:
        return []
    return [
        Span(slot_span(layout, kv, head, num_used).start, slot_span(layout, kv, head, layout.block_size - 1).end)
        for kv in (K, V)
        for head in range(layout.num_kv_heads)
    ]


def partial_index(grant: Grant) -> int | None:
    """The index in block_ids of the written block that is only partly filled (the last one of most prompts); None: all
    are full.
    """
    index = grant.num_tokens // grant.layout.block_size
    if grant.num_tokens % grant.layout.block_size == 0 or not grant.num_cached_blocks <= index < len(grant.block_ids):
        return None
    return index


def contiguous(pairs: Sequence[tuple[int, int]], alone: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(source, target, count) of the longest stretches in which both numbers go up by one. `alone`: this target is
    never joined.

    >>> list(contiguous([(7, 0), (8, 1), (3, 2)]))
    [(7, 0, 2), (3, 2, 1)]
    """
    start = 0
    for i in range(1, len(pairs) + 1):
        if i < len(pairs):
            (source, target), (last_source, last_target) = pairs[i], pairs[i - 1]
            if source == last_source + 1 and target == last_target + 1 and alone not in (target, last_target):
                continue
        yield pairs[start][0], pairs[start][1], i - start
        start = i


class Parallel(msgspec.Struct, frozen=True):
    """How a worker splits its KV: layers over `pp_size` stages, heads over `tp_size` ranks."""

    tp_size: int = 1
    pp_size: int = 1


def part(total: int, size: int, rank: int) -> range:
    """The share of `rank` when `total` things are dealt to `size` ranks in order; the first ones get one more where it
    is uneven.
    """
    assert 0 <= rank < size, f"rank {rank} of {size}"
    quotient, rest = divmod(total, size)
    start = rank * quotient + min(rank, rest)
    return range(start, start + quotient + (rank < rest))


def layers_of(num_layers: int, parallel: Parallel, pp_rank: int) -> range:
    return part(num_layers, parallel.pp_size, pp_rank)


def heads_of(num_kv_heads: int, parallel: Parallel, tp_rank: int) -> range:
    """The KV heads on one rank. With fewer heads than ranks each head lies on several ranks."""
    if num_kv_heads >= parallel.tp_size:
        return part(num_kv_heads, parallel.tp_size, tp_rank)
    assert parallel.tp_size % num_kv_heads == 0, f"{num_kv_heads} heads cannot be copied evenly to {parallel.tp_size} ranks"
    head = tp_rank * num_kv_heads // parallel.tp_size
    return range(head, head + 1)


def peers_of(source: Parallel, target: Parallel, tp_rank: int, pp_rank: int) -> list[tuple[int, int]]:
    """The (tp_rank, pp_rank) of the target worker that this source rank writes to. Raises Unsupported for unequal
    splits.
    """
    if source != target:
        raise Unsupported(
            f"KV cannot be re-split yet: prefill has {source.tp_size} x {source.pp_size} (tp x pp) ranks, decode has "
            f"{target.tp_size} x {target.pp_size}; give both the same sizes"
        )
    return [(tp_rank, pp_rank)]
