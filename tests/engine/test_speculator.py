"""Whether drafts pay, under made-up costs: it gains where it can, and where it cannot it costs next to nothing."""

from __future__ import annotations

import random

import pytest

from engine.sequence import Sequence
from engine.speculation.pays import Acceptance, StepCost, can_pay, choose
from engine.speculation.speculator import CHECK_EVERY, Speculator
from protocol.request import Request, SamplingParams
from tests.prophet import Prophet

PLAIN = (0.030, 0.0, 0.001)  # a step, what any draft adds, what each token of it adds


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_sure_guesses_are_all_taken_and_hopeless_ones_none():
    assert choose([[0.95, 0.9, 0.86, 0.81]], 1, PLAIN, 0.0) == [4]
    assert choose([[0.02, 0.0004]], 1, PLAIN, 0.0) == [0]
    assert choose([[]], 1, PLAIN, 0.0) == [0]
    assert choose([], 3, PLAIN, 0.0) == []


def test_each_sequence_has_as_much_as_its_own_chances_are_worth():
    lengths = choose([[0.9, 0.81, 0.73], [0.03, 0.001, 0.0], []], 3, (0.04, 0.0, 0.001), 0.0)
    assert lengths == [3, 0, 0]


def test_the_choice_is_the_best_of_all_lengths():
    """Against every combination, where a draft's tokens cost rounds too."""
    rng = random.Random(1)
    for _ in range(200):
        chances = []
        for _ in range(rng.randint(1, 3)):
            first, following = rng.random(), rng.random()
            chances.append([first * following**k for k in range(3)])
        num_sequences = len(chances) + rng.randint(0, 2)
        parts = (0.03, rng.choice([0.0, 0.004]), rng.choice([0.0005, 0.003, 0.02]))
        round_s = rng.choice([0.0, 0.002, 0.01])

        def rate(lengths, parts=parts, round_s=round_s, chances=chances, num_sequences=num_sequences):
            seconds = parts[0] + (parts[1] if any(lengths) else 0) + sum(lengths) * parts[2] + max(lengths) * round_s
            return (num_sequences + sum(sum(own[:k]) for own, k in zip(chances, lengths, strict=True))) / seconds

        every = [[]]
        for _ in chances:
            every = [[*head, k] for head in every for k in range(4)]
        best = max(every, key=rate)
        found = choose(chances, num_sequences, parts, round_s)
        plain = rate([0] * len(chances))
        if rate(best) <= 1.03 * plain:
            assert rate(found) == plain
        else:
            assert rate(found) >= 0.999 * rate(best)


def test_nobody_guesses_where_a_row_costs_what_a_token_costs():
    assert can_pay(1, 4, PLAIN, 0.0)
    assert not can_pay(32, 4, (0.1, 0.0, 0.1 / 32), 0.0)
    assert can_pay(32, 4, (0.1, 0.0, 0.3 * 0.1 / 32), 0.0)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_acceptance_is_what_was_seen_and_begins_with_what_others_saw():
    mean = Acceptance()
    first = Acceptance(mean)
    for _ in range(50):
        first.observe(4, 4)
    assert first.first > 0.95
    assert first.following > 0.95
    assert Acceptance(mean).first > 0.9  # a newcomer
    for _ in range(12):
        first.observe(4, 0)
    assert first.first < 0.4


def test_chances_only_fall():
    own = Acceptance(Acceptance())
    chances = own.chances(6)
    assert chances == sorted(chances, reverse=True)
    assert all(0 < chance < 1 for chance in chances)


def test_the_step_cost_is_found_in_noise():
    rng = random.Random(2)
    cost = StepCost()
    for i in range(300):
        num_sequences, context = rng.choice([1, 2, 4, 8]), 100 * (1 + i // 10)
        num_draft = rng.choice([0, 0, 4, 8])
        seconds = 0.02 + 0.002 * num_sequences + 0.0005 * num_draft + (num_draft > 0) * 0.001 + 1e-6 * context
        cost.observe(num_sequences, num_draft, context, seconds * rng.uniform(0.9, 1.1) * (20 if i % 97 == 96 else 1))
    for num_sequences, num_draft in ((1, 0), (8, 0), (4, 8)):
        truth = 0.02 + 0.002 * num_sequences + 0.0005 * num_draft + (num_draft > 0) * 0.001 + 1e-6 * 3000
        assert cost.step_s(num_sequences, num_draft, 3000) == pytest.approx(truth, rel=0.12)


# ---- the whole, under a virtual clock --------------------------------------------------------------------------------


class World:
    """A worker of B sequences whose answers are known, with costs as given. Seconds pass only where something is computed."""

    def __init__(self, batch: int, any_s: float, each_s: float, round_s: float | None, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.parts = (0.020 + 0.001 * batch, any_s, each_s)
        self.round_s = round_s
        answers = {}
        self.sequences = []
        for number in range(batch):
            prompt = (number, 1, 2)
            answers[prompt, 0] = [self.rng.randrange(512) for _ in range(6000)]
            request = Request(request_id=str(number), model="", prompt_token_ids=prompt, sampling=SamplingParams())
            sequence = Sequence(request)
            sequence.append(answers[prompt, 0][0])
            self.sequences.append(sequence)
        self.answers = answers
        self.prophet = Prophet(answers, 0.0, seed, knows_at_once=round_s is None)
        self.speculator = Speculator(self.prophet, 4, clock=lambda: self.now)
        draft = self.prophet.draft

        def timed(asked):
            drafts = draft(asked)
            if round_s is not None:
                self.now += round_s * max(map(len, drafts), default=0)
            return drafts

        self.prophet.draft = timed

    def run(self, num_steps: int, share_right: float) -> float:
        """-> tokens a second, over those of plain decoding."""
        self.prophet._share_right = share_right
        began, tokens, plain_s = self.now, 0, 0.0
        for _ in range(num_steps):
            batch = len(self.sequences)
            lengths = self.speculator.plan(self.sequences, [4] * batch, batch, 100 * batch)
            asked = [(s, k) for s, k in zip(self.sequences, lengths, strict=True) if k]
            drafts = dict(zip([id(s) for s, _ in asked], self.speculator.draft(asked), strict=True)) if asked else {}
            num_draft = sum(map(len, drafts.values()))
            seconds = self.parts[0] + (self.parts[1] if num_draft else 0.0) + num_draft * self.parts[2]
            seconds *= self.rng.uniform(0.93, 1.07)
            self.now += seconds
            self.speculator.learn_step(batch, num_draft, 100 * batch, seconds)
            for sequence in self.sequences:
                answer = self.answers[tuple(sequence.request.prompt_token_ids), 0]
                draft = drafts.get(id(sequence), ())
                truth = answer[sequence.output_len : sequence.output_len + len(draft) + 1]
                right = next((i for i, (a, b) in enumerate(zip(draft, truth, strict=False)) if a != b), len(draft))
                self.speculator.learn(sequence, tuple(draft), right, truth[0])
                for token in truth[: right + 1]:
                    sequence.append(token)
                tokens += right + 1
            plain_s += self.parts[0]
        return (tokens / (self.now - began)) / (num_steps * len(self.sequences) / plain_s)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("batch", "any_s", "each_s", "round_s", "share_right", "least"),
    [
        (1, 0.001, 0.0005, None, 0.95, 3.2),  # copying, alone
        (8, 0.001, 0.0005, None, 0.9, 1.9),
        (8, 0.001, 0.0005, None, 0.5, 1.15),
        (1, 0.0, 0.0005, 0.003, 0.8, 1.7),  # a good draft model
        (8, 0.0, 0.0005, 0.004, 0.9, 1.5),
    ],
)
def test_it_pays_where_it_can(batch, any_s, each_s, round_s, share_right, least, seed):
    world = World(batch, any_s, each_s, round_s, seed)
    world.run(40, share_right)
    assert world.run(400, share_right) >= least


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("batch", "any_s", "each_s", "round_s", "share_right"),
    [
        (1, 0.004, 0.002, None, 0.05),  # nothing repeats
        (8, 0.004, 0.002, None, 0.02),
        (64, 0.004, 0.0012, None, 0.6),  # a large batch: a row costs what a token costs
        (32, 0.002, 0.002, 0.006, 0.7),
        (1, 0.001, 0.001, 0.006, 0.05),  # a draft model that is no good
        (8, 0.001, 0.001, 0.010, 0.1),
    ],
)
def test_it_ends_by_itself_where_it_loses(batch, any_s, each_s, round_s, share_right, seed):
    """At most three hundredths, the first steps, in which it finds out, aside."""
    world = World(batch, any_s, each_s, round_s, seed)
    world.run(40, share_right)
    assert world.run(600, share_right) >= 0.97


@pytest.mark.parametrize("round_s", [None, 0.003])
def test_it_comes_back_when_text_begins_to_repeat(round_s):
    world = World(2, 0.001, 0.0005, round_s)
    world.run(200, 0.02)
    world.run(300, 0.95)
    assert world.run(200, 0.95) > 1.5


def test_drafts_of_a_large_batch_are_not_even_looked_for():
    world = World(64, 0.002, 0.0015, None)
    world.run(2 * CHECK_EVERY, 0.9)
    before = world.prophet.asked
    world.run(4 * CHECK_EVERY, 0.9)
    assert world.prophet.asked - before <= 5 * 64 + 10


def test_one_way_is_tried_now_and_then_while_the_other_is_taken():
    world = World(1, 0.001, 0.0005, None)
    world.run(100, 0.95)
    lengths = [world.speculator.plan(world.sequences, [4], 1, 100) for _ in range(CHECK_EVERY)]
    assert lengths.count([0]) == 1


def test_limits_hold():
    world = World(3, 0.0, 0.0001, None)
    world.run(50, 1.0)
    for _ in range(3 * CHECK_EVERY):
        lengths = world.speculator.plan(world.sequences, [0, 1, 9], 3, 100)
        assert lengths[0] == 0
        assert lengths[1] <= 1
        assert lengths[2] <= 4


def test_sequences_are_forgotten():
    world = World(3, 0.0, 0.0001, None)
    world.run(5, 1.0)
    for sequence in world.sequences:
        world.speculator.forget(sequence)
    assert len(world.speculator) == 0
