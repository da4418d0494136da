"""The prefill planner: chunks in order of arrival, as large as the budget, nobody overtaken."""

from __future__ import annotations

from engine.sequence import Sequence
from prefill.planner import num_admissible, place_in, plan
from protocol.request import Request, SamplingParams


def prompt(name: str, num_tokens: int, num_computed: int = 0) -> Sequence:
    request = Request(request_id=name, model="m", prompt_token_ids=(1,) * num_tokens, sampling=SamplingParams(seed=1))
    made = Sequence(request)
    made.num_computed = num_computed
    return made


def test_the_oldest_takes_what_it_can_and_the_rest_goes_on():
    chunks = plan([prompt("a", 10, 4), prompt("b", 20), prompt("c", 5)], 16)
    assert [(c.sequence.request.request_id, c.num_tokens) for c in chunks] == [("a", 6), ("b", 10)]


def test_a_long_prompt_comes_in_chunks_of_the_budget():
    sequence = prompt("a", 40)
    sizes = []
    while sequence.num_uncomputed:
        (chunk,) = plan([sequence], 16)
        sizes.append(chunk.num_tokens)
        sequence.num_computed += chunk.num_tokens
    assert sizes == [16, 16, 8]


def test_admission_stops_at_the_first_that_does_not_fit():
    assert num_admissible([3, 5, 1], 0, 8, 7) == 1
    assert num_admissible([3, 4, 1], 0, 8, 8) == 3
    assert num_admissible([1, 1, 1], 6, 8, 100) == 2


def test_who_goes_first_stands_before_the_others_and_behind_its_like() -> None:
    assert place_in([False, False], goes_first=False) == 2
    assert place_in([False, False], goes_first=True) == 0
    assert place_in([True, False], goes_first=True) == 1
    assert place_in([True, True], goes_first=True) == 2
