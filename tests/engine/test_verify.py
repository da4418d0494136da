"""Which guesses stand, and that what comes of any drafts is what comes of none: the runner itself, over many seeds."""

from __future__ import annotations

import collections
import random
from pathlib import Path

import pytest
import torch

from engine.batch import Chunk
from engine.sampler import NOT_FINITE, Sample
from engine.sequence import Ahead, Sequence
from engine.verify import verified
from models.load import LoadedModel, load_model
from protocol.request import Request, SamplingParams
from tests.offline import Offline
from tests.oracle import Judge, first_divergence, make_checkpoint, ragged_prompts

BLOCK_SIZE = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return load_model(str(folder), device="cpu"), folder


def sequence_of(prompt, **sampling) -> Sequence:
    return Sequence(Request(request_id="r", model="", prompt_token_ids=tuple(prompt), sampling=SamplingParams(**sampling)))


def test_right_guesses_stand_up_to_the_first_wrong_one():
    one, other = sequence_of([1]), sequence_of([2])
    ahead = [Ahead(one, (5,)), Ahead(one, (5, 6)), Ahead(one, (5, 6, 7))]
    samples = [Sample(one, 5), Sample(ahead[0], 6), Sample(ahead[1], 9), Sample(ahead[2], 7), Sample(other, 3)]
    kept = verified(samples)
    assert [(sample.sequence, sample.token) for sample in kept] == [(one, 5), (one, 6), (one, 9), (other, 3)]


def test_a_row_that_could_not_be_sampled_ends_the_draft_and_no_more():
    one, other = sequence_of([1]), sequence_of([2])
    ahead = [Ahead(one, (5,)), Ahead(one, (5, 6))]
    bad = Sample(ahead[0], -1, None, NOT_FINITE)
    assert [s.token for s in verified([Sample(one, 5), bad, Sample(ahead[1], 1), Sample(other, 3)])] == [5, 3]
    assert [s.error for s in verified([Sample(one, -1, None, NOT_FINITE), Sample(ahead[0], 5)])] == [NOT_FINITE]


def with_guesses(engine: Offline, sequence: Sequence, answer, share_right: float, rng: random.Random) -> int:
    """Run it to its end with drafts of random lengths, cut from `answer` and spoilt; -> guesses that stood."""
    stood = 0
    sequence.blocks = engine.pool.allocate(-(-(len(sequence) + len(answer) + 8) // BLOCK_SIZE))
    vocab_size = engine.loaded.config.vocab_size
    while sequence.output_len < len(answer):
        draft: list[int] = []
        if sequence.output_len:
            coming = answer[sequence.output_len : sequence.output_len + rng.randrange(6)]
            draft = [t if rng.random() < share_right else rng.randrange(vocab_size) for t in coming][: len(answer) - 1]
            draft = draft[: len(answer) - sequence.output_len - 1]
        chunk = Chunk(sequence, sequence.num_uncomputed, (sequence,), tuple(draft))
        samples = engine.runner.run([chunk]).samples
        assert all(sample.sequence is sequence and sample.error is None for sample in samples)
        stood += len(samples) - 1
        for sample in samples:
            sequence.append(sample.token)
        sequence.num_computed = len(sequence) - 1
    engine.pool.release(sequence.forget_blocks())
    return stood


SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "min_tokens": 12, "logit_bias": {7: 3.0, 9: -4.0}},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: ",".join(s))
def test_any_drafts_leave_the_answer_as_it_is(llama, sampling):
    """Sampled answers too: not their distribution, they themselves."""
    loaded, _ = llama
    rng = random.Random(5)
    stood = 0
    for seed in range(12):
        prompt = ragged_prompts(9, BLOCK_SIZE, seed=seed)[rng.randrange(9)]
        params = {"max_tokens": 24, "seed": seed, "ignore_eos": True, **sampling}
        plain = Offline(loaded, block_size=BLOCK_SIZE)
        answer = plain.add("plain", prompt, **params)
        plain.run()
        again = sequence_of(prompt, **params)
        stood += with_guesses(Offline(loaded, block_size=BLOCK_SIZE), again, answer.output_token_ids, 0.75, rng)
        assert again.output_token_ids == answer.output_token_ids
    assert stood > 60


def test_greedy_equals_transformers_with_drafts(llama):
    loaded, folder = llama
    judge = Judge(folder)
    rng = random.Random(1)
    for prompt in ragged_prompts(8, BLOCK_SIZE):
        answer = judge.greedy(prompt, 32)
        sequence = sequence_of(prompt, temperature=0.0, max_tokens=32, ignore_eos=True)
        stood = with_guesses(Offline(loaded, block_size=BLOCK_SIZE), sequence, answer.token_ids, 0.8, rng)
        assert first_divergence(answer, sequence.output_token_ids) is None
        assert stood > 5


@pytest.mark.parametrize("share_right", [0.0, 0.5, 1.0])
def test_what_is_sampled_is_distributed_as_the_model_says(llama, share_right):
    """Chi-square of the token after a draft's second guess, over seeds, against the model's own probabilities for it."""
    loaded, folder = llama
    prompt, draws = [9, 8, 7, 6, 5], 1500
    engine = Offline(loaded, block_size=BLOCK_SIZE)
    rng = random.Random(2)
    base = sequence_of(prompt, temperature=0.7, seed=0)
    base.blocks = engine.pool.allocate(2)
    engine.runner.run([Chunk(base, 5)])
    truth = (Judge(folder).logprobs([*prompt, 11])[-1] / 0.7).softmax(-1)
    seen: collections.Counter[int] = collections.Counter()
    favourite = int(truth.argmax())
    for first in range(0, draws, 50):  # the second output token, after a first one that is the same for all
        chunks = []
        for seed in range(first, first + 50):
            sequence = sequence_of(prompt, temperature=0.7, seed=seed, max_tokens=9)
            sequence.append(11)
            sequence.blocks, sequence.num_computed = base.blocks, 5
            guess = favourite if rng.random() < share_right else rng.randrange(199)
            chunks.append(Chunk(sequence, 1, (sequence,), (guess,)))
        for chunk in chunks:  # they share blocks, so one after the other
            seen[engine.runner.run([chunk]).samples[0].token] += 1
    expected = truth * draws
    common = [t for t in range(199) if expected[t] >= 5]
    rest = draws - sum(seen[t] for t in common)
    rest_expected = draws - float(expected[common].sum())
    chi2 = sum((seen[t] - float(expected[t])) ** 2 / float(expected[t]) for t in common)
    chi2 += (rest - rest_expected) ** 2 / max(rest_expected, 1e-9)
    degrees = len(common)
    limit = degrees + 4 * (2 * degrees) ** 0.5  # four deviations of chi-square
    assert chi2 < limit, (chi2, degrees)


def test_logprobs_of_verified_tokens_are_the_rows_own(llama):
    loaded, folder = llama
    prompt = ragged_prompts(8, BLOCK_SIZE)[5]
    plain = Offline(loaded, block_size=BLOCK_SIZE)
    answer = plain.add("a", prompt, max_tokens=6, logprobs=2)
    plain.run()
    engine = Offline(loaded, block_size=BLOCK_SIZE)
    sequence = sequence_of(prompt, temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True)
    sequence.blocks = engine.pool.allocate(4)
    tokens = answer.output_token_ids
    sequence.append(tokens[0])
    got = engine.runner.run([Chunk(sequence, sequence.num_uncomputed, (sequence,), tuple(tokens[1:4]))]).samples
    assert [sample.token for sample in got] == tokens[1:5]
    for sample, entry in zip(got, plain.logprobs["a"][1:5], strict=True):
        assert sample.logprobs is not None
        assert abs(sample.logprobs.logprob - entry.logprob) < 1e-4
        assert [token for token, _ in sample.logprobs.top] == [token for token, _ in entry.top]


def test_the_stats_tell_what_was_computed(llama):
    loaded, _ = llama
    engine = Offline(loaded, block_size=BLOCK_SIZE)
    sequence = engine.add("a", [5, 6, 7])
    engine.step()
    stats = engine.runner.run([Chunk(sequence, 1, (sequence,), (3, 4, 5))]).stats
    assert (stats.num_decode, stats.num_draft, stats.num_prefill_tokens, stats.num_tokens) == (1, 3, 0, 4)
    assert 1 <= stats.num_samples <= 4
    assert torch.is_inference_mode_enabled() is False
