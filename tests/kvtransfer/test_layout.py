"""Geometry in integers, against numpy's own idea of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import (
    Parallel,
    contiguous,
    heads_of,
    layers_of,
    num_used_slots,
    part,
    partial_index,
    peers_of,
    run_span,
    slot_span,
    tail_spans,
)
from protocol.errors import Unsupported
from protocol.kv import KVLayout
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


def test_equal_splits_pair_up_and_unequal_ones_are_refused():
    assert peers_of(Parallel(2, 2), Parallel(2, 2), tp_rank=1, pp_rank=0) == [(1, 0)]
    with pytest.raises(Unsupported, match="prefill has 2 x 1 .* decode has 1 x 1"):
        peers_of(Parallel(2), Parallel(1), 0, 0)
