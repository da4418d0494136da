"""Philox against its published answers; the sampler against small obvious twins and against statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sampler
from engine.philox import philox4x32, uniforms
from engine.sampler import sample, score
from engine.sequence import Sequence
from protocol.request import Request, SamplingParams

VOCAB_SIZE = 50


def make(prompt: tuple[int, ...] = (5, 6, 7), output: tuple[int, ...] = (), choice: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"seed": 3, "max_tokens": 99, **sampling})
    request = Request(request_id="r", model="m", prompt_token_ids=prompt, sampling=params, eos_token_ids=(2,))
    return Sequence(request, choice, output)


def one(logits: torch.Tensor, sequence: Sequence) -> int:
    return sample(logits[None], [sequence])[0].token


def kept(logits: torch.Tensor, **sampling: Any) -> set[int]:
    """Every token that many draws can reach."""
    count = 600
    sequences = [make(output=(1,) * (i % 30), choice=i // 30, **sampling) for i in range(count)]
    return {entry.token for entry in sample(logits.expand(count, -1), sequences)}


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    """The kat_vectors of Random123."""
    assert tuple(philox4x32(np.array(counter, np.uint64), np.array(key, np.uint64)).tolist()) == answer


def test_uniforms_depend_on_every_part_of_the_key_and_on_nothing_else() -> None:
    base = uniforms([2**63 + 5], [0], [7])[0]
    others = [uniforms([5], [0], [7]), uniforms([2**63 + 5], [1], [7]), uniforms([2**63 + 5], [0], [8])]
    assert base not in [float(other[0]) for other in others]
    assert uniforms([1, 2**63 + 5], [4, 0], [0, 7])[1] == base
    many = uniforms([9] * 20_000, [0] * 20_000, list(range(20_000)))
    assert 0.0 <= many.min() < 0.001
    assert 0.999 < many.max() < 1.0
    assert abs(many.mean() - 0.5) < 0.01


def test_greedy_is_argmax_and_leaves_the_logits_alone() -> None:
    logits = torch.randn(4, VOCAB_SIZE)
    before = logits.clone()
    rows = [make(temperature=0.0), make(temperature=1.0), make(temperature=0.0, repetition_penalty=1.3), make(temperature=0.0)]
    entries = sample(logits, rows)
    assert entries[0].token == int(logits[0].argmax())
    assert entries[3].token == int(logits[3].argmax())
    assert torch.equal(logits, before)
    assert [entry.sequence for entry in entries] == rows


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    logits = torch.randn(5, VOCAB_SIZE)
    rows = [
        make(choice=0, temperature=0.7),
        make(choice=1, temperature=1.3, top_k=5),
        make(choice=2, top_p=0.6),
        make(choice=3, min_p=0.1),
        make(choice=4, temperature=0.0),
    ]
    together = [entry.token for entry in sample(logits, rows)]
    assert together == [one(logits[i], row) for i, row in enumerate(rows)]
    assert together[::-1] == [entry.token for entry in sample(logits.flip(0), rows[::-1])]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 20_000
    sequences = [make(output=(1,) * (i % 50), choice=i // 50, temperature=1.5) for i in range(count)]
    tokens = torch.tensor([entry.token for entry in sample(logits.expand(count, -1), sequences)])
    found = torch.bincount(tokens, minlength=4) / count
    assert torch.allclose(found, torch.softmax(logits / 1.5, -1), atol=0.015)


def test_top_k_top_p_min_p() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))
    assert kept(logits, top_k=2) == {1, 3}
    assert kept(logits, top_k=-1) == kept(logits, top_k=0) == kept(logits, top_k=5) == {0, 1, 2, 3, 4}
    assert kept(logits, top_p=0.39) == {1}
    assert kept(logits, top_p=0.5) == {1, 3}  # 3 crosses the line and stays
    assert kept(logits, top_p=0.8) == {1, 3, 4}
    assert kept(logits, min_p=0.3) == {1, 3, 4}  # at least 0.3 * 0.4
    assert kept(logits, top_k=3, top_p=0.5) == {1, 3}  # the nucleus of the three that are left
    assert kept(logits, temperature=0.01) == {1}


def test_a_nucleus_wider_than_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 2)
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))
    assert kept(logits, top_p=0.8) == {1, 3, 4}
    assert kept(logits, top_p=0.6) == {1, 3}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.99), st.integers(0, 12), st.floats(0.0, 0.5), st.floats(0.2, 2.0))
def test_filters_keep_what_the_definition_keeps(seed: int, top_p: float, top_k: int, min_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
    probs = torch.softmax(logits.double() / temperature, -1)
    allowed = {i for i in range(VOCAB_SIZE) if probs[i] >= min_p * probs.max() * (1 - 1e-5)}
    ordered = sorted(allowed, key=lambda i: -float(probs[i]))
    ordered = ordered[:top_k] if top_k else ordered
    goal, total, nucleus = top_p * sum(float(probs[i]) for i in ordered), 0.0, set()
    for i in ordered:
        if total < goal * (1 + 1e-5):
            nucleus.add(i)
        total += float(probs[i])
    sequences = [make(choice=c, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p) for c in range(50)]
    assert {entry.token for entry in sample(logits.expand(50, -1), sequences)} <= nucleus


def test_penalties_follow_their_definition() -> None:
    logits = torch.linspace(-2, 2, VOCAB_SIZE)
    prompt, output = (40, 3), (41, 41, 4)
    row = logits.clone()
    sequence = make(prompt, output, temperature=0.0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
    sampler._adjust(row, sequence)
    expected = logits.clone()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.25 + 0.5 * output.count(token)
    assert torch.allclose(row, expected, atol=1e-6)
    sequence.append(7)  # the counts follow the sequence
    row = logits.clone()
    sampler._adjust(row, sequence)
    value = float(logits[7])
    assert abs(float(row[7]) - ((value / 1.5 if value > 0 else value * 1.5) - 0.75)) < 1e-6


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[2], logits[9], logits[11] = 5.0, 4.0, 3.0
    assert one(logits, make(temperature=0.0)) == 2
    assert one(logits, make(temperature=0.0, min_tokens=1)) == 9
    assert one(logits, make(temperature=0.0, min_tokens=1, ignore_eos=True)) == 2
    assert one(logits, make(temperature=0.0, min_tokens=1, stop_token_ids=(9,))) == 11
    assert one(logits, make(output=(1,), temperature=0.0, min_tokens=1)) == 2
    assert one(logits, make(temperature=0.0, logit_bias={30: 100.0})) == 30
    assert kept(logits, logit_bias={2: -100.0, 9: -100.0, 11: 100.0}) == {11}


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(1, VOCAB_SIZE)
    sequence = make(temperature=0.5, top_k=3, logit_bias={4: 10.0}, logprobs=5)
    (entry,) = sample(logits, [sequence])
    assert entry.logprobs is not None
    truth = logits.log_softmax(-1)[0]
    assert entry.logprobs.token == entry.token
    assert abs(entry.logprobs.logprob - float(truth[entry.token])) < 1e-5
    assert [token for token, _ in entry.logprobs.top] == truth.topk(5).indices.tolist()
    (plain,) = score(logits, [entry.token], 0)
    assert (plain.logprob, plain.top) == (entry.logprobs.logprob, ())
    (whole,) = score(logits, [entry.token], VOCAB_SIZE)
    assert dict(whole.top)[entry.token] == whole.logprob  # to the bit
    assert whole.top[whole.rank - 1][0] == entry.token


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "presence_penalty": 1.0}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_fails_alone(sampling: dict[str, Any], poison: float) -> None:
    logits = torch.randn(3, VOCAB_SIZE)
    healthy = [entry.token for entry in sample(logits, [make(**sampling, choice=i, logprobs=1) for i in range(3)])]
    logits[1, 17] = poison
    entries = sample(logits, [make(**sampling, choice=i, logprobs=1) for i in range(3)])
    assert [entry.error is None for entry in entries] == [True, False, True]
    assert (entries[1].token, entries[1].logprobs) == (-1, None)
    assert [entries[0].token, entries[2].token] == [healthy[0], healthy[2]]
