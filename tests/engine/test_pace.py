"""The model of a step's time, and what is chosen by it."""

from __future__ import annotations

import random

import pytest

from engine.pace import SMALLEST, Load, Pace
from engine.stats import StepStats


def stats(tokens: int, first: int, num_decode: int, context: int, seconds: float) -> StepStats:
    pairs = tokens * first + tokens * (tokens + 1) // 2
    return StepStats(tokens, num_decode, pairs, context, 1, seconds, seconds, 0.0)


def seconds_of(load: Load, tokens: int, speed: float) -> float:
    pairs = tokens * load.first + tokens * (tokens + 1) // 2
    return (0.015 + 1e-3 * tokens + 4e-7 * pairs + 2e-3 * load.num_decode + 1e-6 * load.context) / speed


def taught(speeds: dict[int, float], noise: float = 0.0, steps: int = 60) -> Pace:
    pace, draw = Pace(), random.Random(1)
    for _ in range(steps):
        for threads, speed in speeds.items():
            load = Load(draw.randrange(1500), 0, draw.randrange(9), draw.randrange(8000))
            tokens = draw.choice([0, 64, 100, 256, 512])
            seconds = seconds_of(load, tokens, speed) * (1 + noise * draw.random())
            pace.learn(stats(tokens, load.first, load.num_decode, load.context, seconds), threads)
    return pace


def test_nothing_is_cut_before_anything_is_known() -> None:
    assert Pace().most_tokens(0.1, 2, Load(0, 512)) == 512
    assert Pace().choose(0.1, 1, 2, Load(0, 512)) == (2, 512)


@pytest.mark.parametrize("load", [Load(0, 512), Load(1024, 512), Load(300, 256, 6, 4000)])
def test_the_largest_chunk_that_ends_in_time(load: Load) -> None:
    pace = taught({1: 1.0, 2: 1.8}, noise=0.05)
    for threads, speed in ((1, 1.0), (2, 1.8)):
        expected = pace.expect(threads, load, 200)
        assert expected == pytest.approx(seconds_of(load, 200, speed), rel=0.1)
        most = pace.most_tokens(0.15, threads, load)
        assert most % 16 == 0
        assert seconds_of(load, most, speed) < 0.15 * 1.1
        assert most == load.most or seconds_of(load, most + 48, speed) > 0.15


def test_a_chunk_is_never_cut_to_crumbs() -> None:
    assert taught({2: 0.1}).most_tokens(0.01, 2, Load(0, 512)) == SMALLEST
    assert taught({2: 0.1}).most_tokens(0.01, 2, Load(0, 20)) == 20


def test_cores_are_borrowed_where_that_is_quicker_and_not_where_it_loses() -> None:
    load = Load(0, 512)
    wins, loses = taught({1: 1.0, 2: 1.8}), taught({1: 1.0, 2: 0.7})
    assert sum(wins.choose(0.1, 1, 2, load).num_threads == 2 for _ in range(640)) == 630
    assert sum(loses.choose(0.1, 1, 2, load).num_threads == 2 for _ in range(640)) == 10
    assert loses.choose(0.1, 1, 1, load) == (1, 512)


def test_it_follows_a_machine_that_changes() -> None:
    pace = taught({1: 1.0, 2: 1.8})
    load = Load(0, 512)
    for _ in range(150):
        pace.learn(stats(256, 0, 0, 0, seconds_of(load, 256, 0.6)), 2)
    assert pace.expect(2, load, 256) == pytest.approx(seconds_of(load, 256, 0.6), rel=0.05)
    assert pace.choose(0.1, 1, 2, load).num_threads == 1
