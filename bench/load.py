"""What to send and when: arrivals by a law (Poisson, gamma, bursts) or out of a trace, and prompts of the wanted lengths.

Pure: a seed decides everything. Sending is `client.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.traces import Arrival


class Lengths(NamedTuple):
    """Uniform between two numbers, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ "256" or "64:512". Raises ValueError."""
        low, _, high = text.partition(":")
        found = cls(int(low), int(high or low))
        if not 1 <= found.low <= found.high:
            raise ValueError(f"{text}: wanted N or LOW:HIGH with 1 <= LOW <= HIGH")
        return found

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def gaps(rate: float, cv: float, burst: int, rng: random.Random) -> Iterator[float]:
    """Seconds between arrivals, `rate` per second in the mean. cv: 1 is Poisson, 0 a metronome, above 1 bursty (gamma).
    burst: so many come at once, and the groups follow that law."""
    mean = burst / rate
    while True:
        gap = mean if cv == 0 else rng.gammavariate(1 / cv**2, mean * cv**2)
        yield gap
        yield from (0.0 for _ in range(burst - 1))


def synthetic(
    number: int, rate: float, cv: float, burst: int, prompt: Lengths, output: Lengths, tenants: Sequence[str], rng: random.Random
) -> list[Arrival]:
    """`number` requests by the law above; tenants in equal shares."""
    at, arrivals = 0.0, []
    for _, gap in zip(range(number), gaps(rate, cv, burst, rng), strict=False):
        at += gap
        arrivals.append(Arrival(at, rng.choice(tenants) if tenants else "", prompt.draw(rng), output.draw(rng)))
    return arrivals


def fitted(arrivals: Sequence[Arrival], scale: float, max_prompt: int, max_output: int) -> list[Arrival]:
    """The same trace for a smaller model: lengths times `scale`, then cut. Shared prefixes shrink with it."""
    out = []
    for arrival in arrivals:
        prompt = max(1, min(max_prompt, round(arrival.prompt_tokens * scale)))
        output = max(1, min(max_output, round(arrival.output_tokens * scale)))
        out.append(arrival._replace(prompt_tokens=prompt, output_tokens=output, block=max(1, round(arrival.block * scale))))
    return out


def faster(arrivals: Sequence[Arrival], speed: float) -> list[Arrival]:
    """The same arrivals in 1/speed of the time."""
    return [arrival._replace(at_s=arrival.at_s / speed) for arrival in arrivals]


def prompt_tokens(arrival: Arrival, index: int, seed: int, vocab: int) -> list[int]:
    """Token ids: the blocks that the trace names are the same in every prompt that shares them, the rest is this one's own."""
    ids: list[int] = []
    for block in arrival.prefix[: arrival.prompt_tokens // arrival.block]:
        ids += _tokens(f"{seed} block {block}", arrival.block, vocab)
    return ids + _tokens(f"{seed} request {index}", arrival.prompt_tokens - len(ids), vocab)


def _tokens(key: str, number: int, vocab: int) -> list[int]:
    rng = random.Random(key)
    return [rng.randrange(10, vocab) for _ in range(number)]  # below 10 lie a tokenizer's special tokens
