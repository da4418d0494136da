"""Guesses from the text itself."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sequence import Sequence
from engine.speculation.lookup import History, Lookup
from protocol.request import Request, SamplingParams


def guess(tokens, count=4, shortest=2, longest=4):
    history = History()
    history.update(list(tokens))
    return history.guess(count, shortest, longest)


def slow_guess(tokens, count, shortest, longest):
    """The definition: the longest n-gram of the end that stood before, its latest place, copied on as LZ77 does."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == tokens[-length:]:
                out = list(tokens)
                for place in range(count):
                    out.append(out[begin + length + place])
                return out[len(tokens) :]
    return []


def test_what_followed_is_guessed():
    assert guess([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6, 7]


def test_the_latest_place_of_the_longest_match_counts():
    assert guess([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]) == [9, 2, 3, 8]  # three tokens match once, two match later too
    assert guess([5, 2, 3, 9, 5, 2, 3, 8, 5, 2, 3], count=1) == [8]


def test_a_cycle_is_guessed_to_any_length():
    assert guess([7, 1, 2, 1, 2], count=5) == [1, 2, 1, 2, 1]
    assert guess([4, 4, 4], count=6) == [4] * 6


def test_too_short_a_match_is_none():
    assert guess([1, 2, 9, 2]) == []
    assert guess([1, 2, 9, 2], shortest=1) == [9, 2, 9, 2]
    assert guess([3]) == []
    assert guess([3, 3], shortest=2) == []


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3))
def test_it_is_what_the_definition_says(tokens, count, shortest, more):
    assert guess(tokens, count, shortest, shortest + more) == slow_guess(tokens, count, shortest, shortest + more)


def test_it_follows_a_sequence_and_forgets_it():
    rng = random.Random(3)
    tokens = [rng.randrange(6) for _ in range(700)]
    sequence = Sequence(Request(request_id="a", model="", prompt_token_ids=tuple(tokens[:20]), sampling=SamplingParams()))
    lookup = Lookup(2, 4)
    for place in range(20, 700):
        assert list(lookup.guess(sequence, 3)) == slow_guess(tokens[:place], 3, 2, 4)
        sequence.append(tokens[place])
    assert len(lookup) == 1
    lookup.forget(sequence)
    assert len(lookup) == 0
