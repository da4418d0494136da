"""Geometry in integers, against numpy's own idea of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import (
    check_split,
    contiguous,
    num_used_slots,
    partial_index,
    plan_routes,
    rank_layout,
    run_span,
    slot_span,
    tail_spans,
)
from protocol.errors import Unsupported
from protocol.kv import KVLayout
from protocol.parallel import Parallel, heads_of, layers_of, part
from protocol.ticket import Grant

layouts = st.builds(
    KVLayout,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(["float32", "bfloat16", "uint8"]),
    st.just("m"),
)


@given(layouts, st.integers(1, 5), st.data())
def test_runs_tile_a_pool(layout, num_blocks, data):
    spans = [run_span(layout, num_blocks, layer, block) for layer in range(layout.num_layers) for block in range(num_blocks)]
    assert spans[0].start == 0
    assert all(one.end == other.start for one, other in zip(spans, spans[1:], strict=False))
    assert spans[-1].end == num_blocks * layout.block_nbytes
    assert {span.nbytes for span in spans} == {layout.run_nbytes}


@given(layouts, st.integers(0, 7))
def test_the_unused_end_of_a_run(layout, num_used):
    row = slot_span(layout, 0, 0, 0).nbytes
    run = np.zeros((2, layout.num_kv_heads, layout.block_size, row), np.uint8)
    run[:, :, num_used:] = 1
    marked = np.zeros(layout.run_nbytes, np.uint8)
    for span in tail_spans(layout, num_used):
        assert not marked[span.start : span.end].any(), "no byte twice"
        marked[span.start : span.end] = 1
    assert np.array_equal(marked, run.reshape(-1))


@given(layouts, st.integers(1, 30), st.integers(0, 30))
def test_the_partial_block(layout, num_tokens, num_cached):
    num_blocks = layout.num_blocks_for(num_tokens)
    num_cached = min(num_cached, num_blocks - 1)
    grant = Grant("g", "r", 1, "D", "P", tuple(range(num_blocks)), num_cached, num_tokens, layout, 1.0, (), "")
    used = [num_used_slots(layout, num_tokens, index) for index in range(num_blocks)]
    assert sum(used) == num_tokens
    partial = [index for index, count in enumerate(used) if count < layout.block_size]
    assert partial_index(grant) == (partial[0] if partial else None)
    assert len(partial) <= 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1), st.none() | st.integers(0, 9))
def test_stretches_are_the_pairs(pairs, alone):
    stretches = list(contiguous(pairs, alone))
    assert [(s + i, t + i) for s, t, count in stretches for i in range(count)] == pairs
    assert all(count == 1 for _, t, count in stretches if alone is not None and t <= alone < t + count)
    for (s, t, count), (s2, t2, _) in zip(stretches, stretches[1:], strict=False):
        joins = s + count == s2 and t + count == t2
        assert not joins or alone in (t + count - 1, t2), "as long as can be"


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_cover_everything_once(total, size):
    shares = [part(total, size, rank) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_heads_and_layers_of_ranks():
    four = Parallel(tp_size=4, pp_size=3)
    assert [layers_of(8, four, rank) for rank in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert [heads_of(8, four, rank) for rank in range(4)] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert [heads_of(2, four, rank) for rank in range(4)] == [range(1), range(1), range(1, 2), range(1, 2)]
    with pytest.raises(AssertionError):
        heads_of(3, four, 0)


sizes = st.builds(Parallel, st.sampled_from([1, 2, 4]), st.integers(1, 3))


@given(layouts, sizes, sizes)
def test_routes_move_what_a_naive_permutation_moves(layout, source, target):
    """Every (layer, head) of a made-up model, numbered; each source rank holds its part; after all routes each target rank
    holds its own, and nothing was written twice."""
    try:
        check_split(layout, source)
        check_split(layout, target)
    except Unsupported:
        with pytest.raises(Unsupported):
            plan_routes(layout, source, target)
        return
    whole = np.arange(layout.num_layers * layout.num_kv_heads).reshape(layout.num_layers, layout.num_kv_heads)

    def share(parallel: Parallel, rank: int) -> np.ndarray:
        layers = layers_of(layout.num_layers, parallel, parallel.pp_rank(rank))
        heads = heads_of(layout.num_kv_heads, parallel, parallel.tp_rank(rank))
        return whole[layers.start : layers.stop, heads.start : heads.stop]

    pools = [np.full_like(share(target, rank), -1) for rank in range(target.num_ranks)]
    for route in plan_routes(layout, source, target):
        own = share(source, route.source)
        assert own.shape == (rank_layout(layout, source, route.source).num_layers, own.shape[1])
        sent = own[route.source_layer :, route.source_head :][: route.num_layers, : route.num_heads]
        place = pools[route.target][route.target_layer :, route.target_head :][: route.num_layers, : route.num_heads]
        assert sent.shape == place.shape == (route.num_layers, route.num_heads)
        assert (place == -1).all(), "written twice"
        place[:] = sent
        assert (sent == whole[route.layer :, route.head :][: route.num_layers, : route.num_heads]).all()
    for rank, pool in enumerate(pools):
        assert (pool == share(target, rank)).all()


def test_copies_of_a_head_share_the_work():
    one_head = KVLayout(2, 1, 8, 8, "float32", "m")
    assert {route.source for route in plan_routes(one_head, Parallel(4), Parallel(4))} == {0, 1, 2, 3}


def test_a_split_that_cannot_be_is_refused():
    three_heads = KVLayout(2, 3, 8, 8, "float32", "m")
    with pytest.raises(Unsupported, match="3 KV heads .* 4 tensor ranks"):
        check_split(three_heads, Parallel(4))
    with pytest.raises(Unsupported, match="2 layers .* 3 pipeline stages"):
        check_split(three_heads, Parallel(1, 3))
