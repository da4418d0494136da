"""The merge of token updates: whatever workers repeat, reorder or cut, a choice's indexes come out contiguous, each once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.walk import Attempt, Walk
from protocol.events import Tokens
from protocol.lifecycle import ALLOWED, TERMINAL, Phase, move
from protocol.messages import TokenUpdate
from protocol.request import Request, SamplingParams
from protocol.ticket import Ticket, WorkerRef


class Letters:
    """Token i is the i-th letter; "x" stops."""

    def __init__(self, stop: str | None = None) -> None:
        self.stop = stop

    def feed(self, token_ids):
        text = "".join(chr(97 + t) for t in token_ids)
        if self.stop is not None and self.stop in text:
            return text[: text.index(self.stop)], self.stop
        return text, None

    def flush(self) -> str:
        return ""


def a_walk(n: int = 1, stop: str | None = None) -> Walk:
    request = Request(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams(n=n, seed=1))
    walk = Walk(request, lambda _: Letters(stop), 0.0)
    begin(walk, 1)
    return walk


def begin(walk: Walk, epoch: int) -> None:
    walk.move(Phase.QUEUED)
    walk.begin(Attempt(Ticket("r", epoch, WorkerRef("d", "decode", "d:1"), WorkerRef("p", "prefill", "p:1"))), 1.0)
    walk.move(Phase.RESERVED)
    walk.move(Phase.PREFILLING)


def update(index: int, tokens: list[int], choice: int = 0, finish: str | None = None, from_prefill: bool = False) -> TokenUpdate:
    return TokenUpdate("r", 1, choice, index, tuple(tokens), finish_reason=finish, from_prefill=from_prefill)


def text_of(events) -> str:
    return "".join(e.text for e in events if isinstance(e, Tokens))


def test_decode_repeats_token_one_and_the_client_sees_it_once():
    walk = a_walk()
    events = walk.absorb(update(0, [0], from_prefill=True), 2.0)
    events += walk.absorb(update(0, [0, 1]), 3.0)
    events += walk.absorb(update(2, [2], finish="length"), 4.0)
    assert text_of(events) == "abc"
    assert [e.index for e in events] == [0, 1, 2]
    assert walk.is_complete
    assert walk.timing(4.0).transfer_s == 1.0


def test_decodes_frame_may_overtake_prefills():
    walk = a_walk()
    events = walk.absorb(update(0, [0, 1]), 2.0)
    events += walk.absorb(update(0, [0], from_prefill=True), 3.0)
    assert text_of(events) == "ab"


def test_a_gap_is_held_until_it_is_filled():
    walk = a_walk()
    assert walk.absorb(update(2, [2]), 2.0) == []
    assert walk.absorb(update(1, [1]), 2.0) == []
    assert text_of(walk.absorb(update(0, [0], from_prefill=True), 2.0)) == "abc"


def test_a_gap_has_an_age_until_it_is_filled():
    walk = a_walk(n=2)
    walk.absorb(update(0, [0]), 2.0)
    assert walk.gap_at is None
    walk.absorb(update(2, [2]), 3.0)
    walk.absorb(update(0, [0, 1], choice=1), 3.5)
    walk.absorb(update(4, [4]), 4.0)
    assert walk.gap_at == 3.0, "what comes behind it does not make it younger"
    walk.absorb(update(1, [1]), 5.0)
    assert walk.gap_at == 5.0, "there is a second one"
    walk.absorb(update(3, [3]), 6.0)
    assert walk.gap_at is None


def test_what_an_attempt_left_is_not_merged_with_the_next_one():
    request = Request(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams(prompt_logprobs=0, seed=1))
    walk = Walk(request, lambda _: Letters(), 0.0)
    begin(walk, 1)
    assert walk.absorb(update(0, [7]), 2.0) == [], "the prompt's log-probabilities come first"
    begin(walk, 2)
    scored = TokenUpdate("r", 2, 0, 0, (1,), prompt_logprobs=(None,))
    assert text_of(walk.absorb(scored, 3.0)) == "b"


def test_a_stop_string_ends_the_choice_here_and_names_it():
    walk = a_walk(stop="c")
    events = walk.absorb(update(0, [0, 1, 2, 3]), 2.0)
    assert text_of(events) == "ab"
    assert events[-1].finish_reason == "stop"
    assert events[-1].stop_reason == "c"
    assert events[-1].token_ids == (0, 1, 2)
    assert walk.is_complete
    assert walk.absorb(update(4, [4]), 3.0) == []  # what decode still sent


def test_a_stopped_choice_is_told_to_its_worker_while_others_go_on():
    walk = a_walk(n=2, stop="c")
    walk.absorb(update(0, [2], choice=0), 2.0)
    assert walk.newly_stopped() == [0]
    assert walk.newly_stopped() == []
    walk.absorb(update(0, [2], choice=1), 2.0)
    assert walk.newly_stopped() == []  # complete: the whole request is cancelled instead


def test_after_a_resumption_delivered_tokens_are_not_repeated():
    walk = a_walk()
    events = walk.absorb(update(0, [0, 1]), 2.0)
    begin(walk, 2)
    assert walk.delivered_token_ids() == ((0, 1),)
    assert walk.num_resumptions == 1
    events += walk.absorb(TokenUpdate("r", 2, 0, 2, (2,), finish_reason="length"), 3.0)
    assert text_of(events) == "abc"
    assert walk.usage().completion_tokens == 3


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_any_slicing_order_and_duplication_gives_the_same_tokens(length, seed):
    rng = random.Random(seed)
    walk = a_walk()
    pieces = []
    start = 0
    while start < length:
        end = min(length, start + rng.randint(1, 4))
        back = rng.randint(0, start)  # a repeat of what came before
        pieces.append(update(back, [t % 26 for t in range(back, end)], finish="length" if end == length else None))
        start = end
    pieces += rng.sample(pieces, rng.randint(0, len(pieces)))
    rng.shuffle(pieces)
    events = [event for piece in pieces for event in walk.absorb(piece, 2.0)]
    tokens = [token for event in events for token in event.token_ids]
    assert tokens == [t % 26 for t in range(length)]
    assert [e.index for e in events] == [sum(len(p.token_ids) for p in events[:i]) for i in range(len(events))]
    assert walk.is_complete


def test_every_phase_is_in_the_table_and_terminal_ones_go_nowhere():
    assert set(ALLOWED) == set(Phase)
    assert all(not ALLOWED[phase] for phase in TERMINAL)
    with pytest.raises(AssertionError, match="finished to queued"):
        move(Phase.FINISHED, Phase.QUEUED)


def test_attempts_are_in_vain_until_one_brings_a_new_token():
    """A long stream may be resumed as often as it takes; only attempts that get nowhere are counted against it."""
    walk = a_walk()
    for epoch in (2, 3):
        begin(walk, epoch)
    assert (walk.num_attempts, walk.num_vain_attempts) == (3, 3)
    walk.absorb(update(0, [0]), 2.0)
    assert walk.num_vain_attempts == 0
    begin(walk, 4)
    walk.absorb(update(0, [0]), 3.0)  # a repeat
    assert (walk.num_attempts, walk.num_vain_attempts) == (4, 1)
