"""The geometry of KV in plain integers: which bytes are which layer, block, K/V, head and slot, and which part lies on
which rank.

Not here: memory (pool.py) and tensors. Used by the transports, by tests, and by whoever asks which rank talks to which.
Byte order of a pool: [num_layers, num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim], see protocol/kv.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import msgspec

from protocol.errors import Unsupported
from protocol.kv import DTYPE_NBYTES, KVLayout
from protocol.parallel import ALONE, Parallel, heads_of, layers_of
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
    num_joined = len(pairs) - (alone is not None and len(pairs) > 0 and pairs[-1][1] == alone)
    if num_joined > 1 and _is_one_stretch(pairs[:num_joined], alone):  # nearly all of what is asked
        yield *pairs[0], num_joined
        for source, target in pairs[num_joined:]:
            yield source, target, 1
        return
    start = 0
    for i in range(1, len(pairs) + 1):
        if i < len(pairs):
            (source, target), (last_source, last_target) = pairs[i], pairs[i - 1]
            if source == last_source + 1 and target == last_target + 1 and alone not in (target, last_target):
                continue
        yield pairs[start][0], pairs[start][1], i - start
        start = i


def _is_one_stretch(pairs: Sequence[tuple[int, int]], alone: int | None) -> bool:
    """At C speed."""
    (source, target), count = pairs[0], len(pairs)
    if alone is not None and target <= alone < target + count:
        return False
    return list(pairs) == list(zip(range(source, source + count), range(target, target + count), strict=True))


def rank_layout(layout: KVLayout, parallel: Parallel, rank: int) -> KVLayout:
    """The layout of one rank's pool: its layers, its heads. Raises Unsupported when the model cannot be split so."""
    check_split(layout, parallel)
    return msgspec.structs.replace(
        layout,
        num_layers=len(layers_of(layout.num_layers, parallel, parallel.pp_rank(rank))),
        num_kv_heads=len(heads_of(layout.num_kv_heads, parallel, parallel.tp_rank(rank))),
    )


def check_split(layout: KVLayout, parallel: Parallel) -> None:
    """Raises Unsupported, naming the sizes, when layers or heads cannot be dealt to so many ranks."""
    if parallel.pp_size > layout.num_layers:
        raise Unsupported(f"{layout.num_layers} layers cannot be dealt to {parallel.pp_size} pipeline stages")
    if layout.num_kv_heads < parallel.tp_size and parallel.tp_size % layout.num_kv_heads:
        raise Unsupported(f"{layout.num_kv_heads} KV heads cannot be copied evenly to {parallel.tp_size} tensor ranks")


class Place(msgspec.Struct, frozen=True):
    """One rank of a worker: the whole model's layout, the sizes of its group, and which of its ranks."""

    layout: KVLayout
    parallel: Parallel = ALONE
    rank: int = 0

    def check_pool(self, layout: KVLayout) -> None:
        """A pool of this layout is the one of this place."""
        expected = rank_layout(self.layout, self.parallel, self.rank)
        assert layout == expected, f"rank {self.rank} of {self.parallel} has a pool of {layout}, expected {expected}"


class Area(msgspec.Struct, frozen=True):
    """A rectangle of layers and heads of one rank's pool, in that pool's own numbers."""

    layer: int
    num_layers: int
    head: int
    num_heads: int


class Route(msgspec.Struct, frozen=True):
    """What one rank of a prefill worker writes to one rank of a decode worker: a rectangle of layers and heads.

    Layers [layer, layer + num_layers) and KV heads [head, head + num_heads) of the model; source_* and target_* say where the
    rectangle begins in each rank's own pool. Seen by itself it is a pool of a smaller model: `layout`.
    """

    source: int
    target: int
    layer: int
    num_layers: int
    head: int
    num_heads: int
    source_layer: int
    source_head: int
    target_layer: int
    target_head: int

    @property
    def source_area(self) -> Area:
        return Area(self.source_layer, self.num_layers, self.source_head, self.num_heads)

    @property
    def target_area(self) -> Area:
        return Area(self.target_layer, self.num_layers, self.target_head, self.num_heads)

    def layout(self, whole: KVLayout) -> KVLayout:
        return msgspec.structs.replace(whole, num_layers=self.num_layers, num_kv_heads=self.num_heads)


@functools.lru_cache(maxsize=256)
def plan_routes(layout: KVLayout, source: Parallel, target: Parallel) -> tuple[Route, ...]:
    """All routes between two groups, ordered by (target, source). Every (target rank, layer, head) is written exactly once.

    Where a head lies on several source ranks, the target ranks that want it are dealt over them. Raises Unsupported.
    """
    check_split(layout, source)
    check_split(layout, target)
    routes = []
    for target_rank in range(target.num_ranks):
        layers = layers_of(layout.num_layers, target, target.pp_rank(target_rank))
        heads = heads_of(layout.num_kv_heads, target, target.tp_rank(target_rank))
        for source_rank in _writers(layout, source, target, target_rank):
            own_layers = layers_of(layout.num_layers, source, source.pp_rank(source_rank))
            own_heads = heads_of(layout.num_kv_heads, source, source.tp_rank(source_rank))
            first_layer, end_layer = max(layers.start, own_layers.start), min(layers.stop, own_layers.stop)
            first_head, end_head = max(heads.start, own_heads.start), min(heads.stop, own_heads.stop)
            if first_layer < end_layer and first_head < end_head:
                routes.append(
                    Route(
                        source=source_rank,
                        target=target_rank,
                        layer=first_layer,
                        num_layers=end_layer - first_layer,
                        head=first_head,
                        num_heads=end_head - first_head,
                        source_layer=first_layer - own_layers.start,
                        source_head=first_head - own_heads.start,
                        target_layer=first_layer - layers.start,
                        target_head=first_head - heads.start,
                    )
                )
    return tuple(routes)


@functools.lru_cache(maxsize=256)
def rows_of(layout: KVLayout, source: Parallel, target: Parallel) -> tuple[tuple[Route, int], ...]:
    """Each route with the number of its first row in manifests (protocol/ticket.py): one row per layer of each route."""
    first, placed = 0, []
    for route in plan_routes(layout, source, target):
        placed.append((route, first))
        first += route.num_layers
    return tuple(placed)


def num_rows(layout: KVLayout, source: Parallel, target: Parallel) -> int:
    route, first = rows_of(layout, source, target)[-1]
    return first + route.num_layers


def route_between(layout: KVLayout, source: Parallel, source_rank: int, target: Parallel, target_rank: int) -> Route | None:
    """The one route from one rank to another; None: these two have nothing to say to each other."""
    ends = (source_rank, target_rank)
    return next((route for route in plan_routes(layout, source, target) if (route.source, route.target) == ends), None)


def _writers(layout: KVLayout, source: Parallel, target: Parallel, target_rank: int) -> Iterator[int]:
    """The source ranks that may write to one target rank: all, or of ranks that hold the same head only one."""
    num_copies = max(1, source.tp_size // layout.num_kv_heads)
    wanted = target.tp_rank(target_rank) % num_copies
    for rank in range(source.num_ranks):
        if source.tp_rank(rank) % num_copies == wanted:
            yield rank
