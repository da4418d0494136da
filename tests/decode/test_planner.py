"""The decode planner: who is in the step, who gives way, who returns. Pure, so every case is a few lines."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from decode.planner import Budget, plan, steady
from engine.sequence import Sequence
from protocol.request import Request, SamplingParams

BLOCK = 4
BUDGET = Budget(max_num_seqs=8, max_num_batched_tokens=16)


def sequence(
    name: str, num_tokens: int, num_computed: int | None = None, num_blocks: int | None = None, priority: int = 0
) -> Sequence:
    request = Request(
        request_id=name,
        model="m",
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(seed=1),
        priority=priority,
    )
    made = Sequence(request)
    made.num_computed = num_tokens - 1 if num_computed is None else num_computed
    made.blocks = list(range(-(-num_tokens // BLOCK) if num_blocks is None else num_blocks))
    return made


def names(sequences) -> list[str]:
    return [s.request.request_id for s in sequences]


def test_every_decoding_sequence_is_in_the_step():
    running = [sequence("a", 3), sequence("b", 6)]
    decided = plan(running, [], 0, BLOCK, BUDGET)
    assert [(s.request.request_id, n) for s, n in decided.chunks] == [("a", 1), ("b", 1)]
    assert decided.grow == ()


def test_a_full_last_block_grows():
    decided = plan([sequence("a", 5, num_blocks=1)], [], 1, BLOCK, BUDGET)
    assert names(decided.grow) == ["a"]


def test_without_blocks_the_newest_of_the_lowest_band_is_preempted():
    old, new, urgent = sequence("old", 5, num_blocks=1), sequence("new", 6), sequence("urgent", 6, priority=-1)
    decided = plan([old, new, urgent], [], 0, BLOCK, BUDGET)
    assert names(decided.preempt) == ["new"]
    assert names(decided.grow) == ["old"]
    assert names(s for s, _ in decided.chunks) == ["old", "urgent"]


def test_the_last_one_left_waits_for_blocks_instead_of_losing_its_own():
    decided = plan([sequence("a", 5, num_blocks=1)], [], 0, BLOCK, BUDGET)
    assert decided.preempt == ()
    assert decided.chunks == ()


def test_prompts_share_what_the_decodes_leave_of_the_budget():
    running = [sequence("a", 3), sequence("p", 40, num_computed=0), sequence("q", 40, num_computed=0)]
    decided = plan(running, [], 0, BLOCK, BUDGET)
    assert [(s.request.request_id, n) for s, n in decided.chunks] == [("a", 1), ("p", 15)]


def test_without_chunking_a_prompt_waits_for_a_step_it_fits_into_or_runs_alone():
    whole = Budget(8, 16, enable_chunked_prefill=False)
    assert [n for _, n in plan([sequence("a", 3), sequence("p", 40, num_computed=0)], [], 0, BLOCK, whole).chunks] == [1]
    assert [n for _, n in plan([sequence("p", 40, num_computed=0)], [], 0, BLOCK, whole).chunks] == [40]


def test_the_preempted_return_in_order_and_with_headroom():
    waiting = [sequence("x", 8, num_computed=0, num_blocks=0), sequence("y", 4, num_computed=0, num_blocks=0)]
    assert names(plan([sequence("a", 3)], waiting, 2, BLOCK, BUDGET).restart) == []  # 2 blocks and 1 of headroom
    assert names(plan([sequence("a", 3)], waiting, 3, BLOCK, BUDGET).restart) == ["x"]
    assert names(plan([], waiting, 2, BLOCK, BUDGET).restart) == ["x"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.integers(-1, 1)), min_size=1, max_size=12),
    st.integers(0, 6),
    st.booleans(),
)
def test_no_plan_uses_more_than_there_is_and_somebody_moves(shapes, free, chunked):
    budget = Budget(8, 16, chunked)
    running = [
        sequence(
            str(i),
            n,
            num_computed=None if decoding else 0,
            num_blocks=max(1, (n - 1) // BLOCK) if decoding else None,
            priority=p,
        )
        for i, (n, decoding, p) in enumerate(shapes)
    ]
    decided = plan(running, [], free, BLOCK, budget)
    freed = sum(len(s.blocks) for s in decided.preempt)
    assert len(decided.grow) <= free + freed
    assert not set(names(decided.preempt)) & set(names(s for s, _ in decided.chunks))
    assert not set(names(decided.preempt)) & set(names(decided.grow))
    planned = sum(n for _, n in decided.chunks)
    assert planned <= 16 or len(decided.chunks) == 1
    grown = {id(s) for s in decided.grow}
    for s, _ in decided.chunks:
        assert s.num_uncomputed > 1 or not s.last_block_is_full(BLOCK) or id(s) in grown
    if len(running) > 1 or free > 0:
        assert decided.chunks


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3), st.integers(0, 1)), max_size=10), st.integers(0, 6))
def test_a_steady_step_is_what_the_plan_would_be(made: list[tuple[int, int, int]], free: int):
    """(tokens, how many are not computed beside the newest, blocks too few) of each."""
    running = [
        sequence(str(i), tokens, max(0, tokens - 1 - late), max(1, -(-tokens // BLOCK) - lacking))
        for i, (tokens, late, lacking) in enumerate(made)
        if lacking == 0 or late == 0
    ]
    grow = steady(running, free, BLOCK, BUDGET)
    decided = plan(running, [], free, BLOCK, BUDGET)
    is_steady = all(s.num_uncomputed == 1 for s in running) and len(running) <= BUDGET.max_num_seqs and not decided.preempt
    if grow is None:
        assert not is_steady or len(decided.chunks) < len(running)
    else:
        assert [(s, 1) for s in running] == [tuple(chunk) for chunk in decided.chunks]
        assert names(grow) == names(decided.grow)
        assert (decided.preempt, decided.restart) == ((), ())
