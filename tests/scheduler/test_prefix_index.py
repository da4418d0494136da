"""The prefix index against a slow obvious twin, its bound, and that nobody inherits a dead worker's prefixes."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefix_index import SWEEP_AFTER, PrefixIndex


def chain(tokens: list[int]) -> list[bytes]:
    """A hash per prefix, as long as it is unique."""
    return [repr(tokens[: i + 1]).encode() for i in range(len(tokens))]


@given(
    inserts=st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 1), min_size=1, max_size=6), st.booleans()), max_size=40),
    query=st.lists(st.integers(0, 1), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_it_says_what_its_twin_says(inserts: list[tuple[int, list[int], bool]], query: list[int]) -> None:
    index, twin = PrefixIndex(), dict[str, set[bytes]]()
    for number, tokens, forget in inserts:
        name = f"w{number}"
        if forget:
            index.forget(name)
            twin.pop(name, None)
        else:
            index.insert([name], chain(tokens))
            twin.setdefault(name, set()).update(chain(tokens))
    expected = {}
    for name, held in twin.items():
        length = next((i for i, h in enumerate(chain(query)) if h not in held), len(query))
        if length:
            expected[name] = length
    assert index.match(chain(query)) == expected


def test_it_is_bounded_and_keeps_the_beginnings() -> None:
    index = PrefixIndex(max_hashes=100)
    for i in range(50):
        index.insert(["w"], chain([i, 1, 2, 3, 4]))
        assert len(index) <= 100
    newest, oldest = chain([49, 1, 2, 3, 4]), chain([0, 1, 2, 3, 4])
    assert index.match(newest) == {"w": 5}
    assert index.match(oldest) == {}
    index.insert(["w"], chain(list(range(1000))))
    assert len(index) == 100
    assert index.match(chain(list(range(1000)))) == {"w": 100}


def test_nobody_inherits_what_a_dead_worker_held() -> None:
    index = PrefixIndex()
    for life in range(5 * SWEEP_AFTER):
        assert index.match(chain([1, 2, 3])) == {}
        index.insert([f"w{life}"], chain([1, 2, 3]))
        assert index.match(chain([1, 2, 3, 4])) == {f"w{life}": 3}
        index.forget(f"w{life}")
    assert index._num_bits <= SWEEP_AFTER + 1, "bits are given away again"
    assert len(index) <= 3


def test_a_walk_costs_about_the_same_with_a_thousand_workers() -> None:
    index = PrefixIndex()
    prompt = chain(list(range(24)))
    for i in range(1000):
        index.insert([f"w{i}"], prompt[: 1 + i % 24])
    began = time.process_time()
    for _ in range(100):
        found = index.match(prompt)
    assert len(found) == 1000
    assert max(found.values()) == 24
    assert (time.process_time() - began) / 100 < 0.02
