"""The whole engine against transformers: every family, ragged prompts, chunks, batches, prefix hits, preemption, faults."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.batch import Chunk, build_batch, plan_step
from engine.sequence import Sequence
from models.load import LoadedModel, load_model
from protocol.request import Request, SamplingParams
from tests.offline import Offline, random_chunks
from tests.oracle import FAMILIES, Judge, first_divergence, make_checkpoint, ragged_prompts

BLOCK_SIZE = 8
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Judge]:
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return load_model(str(folder), device="cpu"), Judge(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    """Once alone in whole chunks, once all together in ragged chunks."""
    folder = make_checkpoint(family, tmp_path, seed=1)
    loaded, judge = load_model(str(folder), device="cpu"), Judge(folder)
    prompts = ragged_prompts(9, BLOCK_SIZE, longest=60)
    answers = [judge.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    alone = Offline(loaded, block_size=BLOCK_SIZE)
    together = Offline(loaded, block_size=BLOCK_SIZE, chunk_len=random_chunks(2, 1, 5, 8, 19))
    batch = [together.add(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts)]
    together.run()
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        single = alone.add(str(index), prompt, max_tokens=NUM_TOKENS)
        alone.run()
        for sequence in (single, batch[index]):
            story = first_divergence(answer, sequence.output_token_ids)
            assert story is None, f"{family}, prompt of {len(prompt)}: {story}"


def test_prefix_hits_and_preemption_change_nothing(llama: tuple[LoadedModel, Judge]) -> None:
    loaded, judge = llama
    stem = ragged_prompts(8, BLOCK_SIZE)[6]  # two blocks and one token
    prompts = [stem + tail for tail in ([5], [6, 7], [8] * 12, [9] * 30)] + [stem]
    engine = Offline(loaded, block_size=BLOCK_SIZE, num_blocks=20, chunk_len=random_chunks(3, 4, 8, 16))
    first = engine.add("first", prompts[0], max_tokens=NUM_TOKENS)
    engine.run()
    rest = [engine.add(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts)]
    engine.run()
    assert engine.num_cached_tokens >= 2 * BLOCK_SIZE * len(prompts)
    assert engine.num_preemptions > 0
    for sequence in [first, *rest]:
        answer = judge.greedy(list(sequence.request.prompt_token_ids), NUM_TOKENS)
        assert first_divergence(answer, sequence.output_token_ids) is None
    assert engine.pool.num_used == 0


def test_a_salt_hides_cached_blocks(llama: tuple[LoadedModel, Judge]) -> None:
    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    prompt = ragged_prompts(8, BLOCK_SIZE)[7]
    for name, salt in (("a", ""), ("b", "tenant"), ("c", "tenant")):
        engine.add(name, prompt, salt=salt)
        before = engine.num_cached_tokens
        engine.run()
        assert (engine.num_cached_tokens > before) == (name == "c")


def test_choices_share_the_prompt_and_copy_on_write(llama: tuple[LoadedModel, Judge]) -> None:
    loaded, _ = llama
    prompt = ragged_prompts(8, BLOCK_SIZE)[4]  # one block and one token: the last block is shared and partial
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    request = Request(request_id="n", model="", prompt_token_ids=tuple(prompt), sampling=params)
    engine = Offline(loaded, block_size=BLOCK_SIZE)
    first = Sequence(request)
    first.blocks = engine.pool.allocate(2)
    siblings = [first, first.fork(1), first.fork(2)]
    result = engine.runner.run([Chunk(first, len(prompt), tuple(siblings))])
    engine.pool.seal(first.blocks[0], None)
    for sibling in siblings[1:]:
        engine.pool.share(first.blocks[:1])
        (own,) = engine.pool.allocate(1)
        engine.runner.copy_block(first.blocks[1], own)
        sibling.blocks = [first.blocks[0], own]
    for sibling, sample in zip(siblings, result.samples, strict=True):
        assert sample.sequence is sibling
        sibling.num_computed = len(prompt)
        sibling.append(sample.token)
    engine.running = list(siblings)
    engine.run()
    outputs = [tuple(sibling.output_token_ids) for sibling in siblings]
    assert len(set(outputs)) == 3
    for choice in range(3):  # each choice alone, from the beginning, draws the same numbers
        lone = Offline(loaded, block_size=BLOCK_SIZE)
        sequence = Sequence(request, choice)
        lone.running.append(sequence)
        lone.run()
        assert tuple(sequence.output_token_ids) == outputs[choice]


def test_a_resumed_sequence_continues_as_if_nothing_had_happened(llama: tuple[LoadedModel, Judge]) -> None:
    loaded, _ = llama
    prompt = ragged_prompts(8, BLOCK_SIZE)[5]
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    engine = Offline(loaded, block_size=BLOCK_SIZE)
    whole = engine.add("whole", prompt, **sampling)
    engine.run()
    resumed = Sequence(whole.request, 0, whole.output_token_ids[:7])
    engine.running.append(resumed)
    engine.run()
    assert resumed.token_ids == whole.token_ids


def test_logprobs_of_output_and_prompt(llama: tuple[LoadedModel, Judge]) -> None:
    loaded, judge = llama
    prompt = ragged_prompts(8, BLOCK_SIZE)[7]
    engine = Offline(loaded, block_size=BLOCK_SIZE, chunk_len=random_chunks(1, 7, 30, 90))
    sequence = engine.add("x", prompt, logprobs=3, prompt_logprobs=2, max_tokens=6)
    other = engine.add("y", prompt[:5], max_tokens=6)
    engine.run()
    truth = judge.logprobs(sequence.token_ids)
    scored = engine.prompt_logprobs["x"]
    assert len(scored) == len(prompt)
    assert scored[0] is None
    assert "y" not in engine.prompt_logprobs
    assert len(other.output_token_ids) == 6
    for position, entry in enumerate([*scored, *engine.logprobs["x"]]):
        if entry is None:
            continue
        row = truth[position - 1]
        assert entry.token == sequence.token_ids[position]
        assert math.isclose(entry.logprob, row[entry.token], abs_tol=2e-4)
        assert entry.rank == int((row > row[entry.token]).sum()) + 1
        assert [token for token, _ in entry.top] == row.topk(len(entry.top)).indices.tolist()
        listed = dict(entry.top)
        assert listed.get(entry.token, entry.logprob) == entry.logprob  # to the bit
    assert len(engine.logprobs["x"][0].top) == 3


def test_damaged_kv_fails_one_request_only(llama: tuple[LoadedModel, Judge]) -> None:
    loaded, judge = llama
    prompts = ragged_prompts(8, BLOCK_SIZE)[4:7]
    engine = Offline(loaded, block_size=BLOCK_SIZE)
    sequences = [engine.add(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts)]
    engine.step()
    engine.runner.fill_block(sequences[1].blocks[0], float("nan"))
    engine.run()
    assert list(engine.failed) == ["1"]
    assert "not finite" in engine.failed["1"]
    for index in (0, 2):
        assert first_divergence(judge.greedy(prompts[index], NUM_TOKENS), sequences[index].output_token_ids) is None


def test_on_layer_sees_the_layers_kv_in_the_pool(llama: tuple[LoadedModel, Judge]) -> None:
    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    sequence = engine.add("x", ragged_prompts(8, BLOCK_SIZE)[3])
    sequence.blocks = engine.pool.allocate(1)
    seen: list[tuple[int, list[bool]]] = []

    def on_layer(layer: int) -> None:
        whole = [not bool(torch.isnan(engine.kv[other, sequence.blocks[0]]).any()) for other in range(3)]
        seen.append((layer, whole))

    result = engine.runner.run([Chunk(sequence, 8, (sequence,))], on_layer)
    assert seen == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]
    assert sequence.num_computed == 0  # the runner changes no sequence
    assert (result.stats.num_prefill_tokens, result.stats.prefill_pairs, result.stats.num_samples) == (8, 36, 1)


def test_stats_tell_decode_from_prefill(llama: tuple[LoadedModel, Judge]) -> None:
    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    old = engine.add("old", [5, 6, 7])
    engine.step()
    new = Sequence(old.request)
    new.blocks = engine.pool.allocate(1)
    stats = engine.runner.run([Chunk(old, 1, (old,)), Chunk(new, 1)]).stats
    assert (stats.num_decode, stats.decode_context, stats.num_prefill_tokens, stats.prefill_pairs) == (1, 4, 1, 1)
    assert stats.num_tokens == 2
    assert stats.seconds >= stats.forward_s > 0


def test_num_threads_is_set_in_the_running_thread(llama: tuple[LoadedModel, Judge]) -> None:
    import threading

    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    engine.runner.num_threads = 2
    engine.add("x", [5, 6, 7])
    counts: list[int] = []
    thread = threading.Thread(target=lambda: (engine.run(), counts.append(torch.get_num_threads())))
    thread.start()
    thread.join()
    assert counts == [2]


def test_batch_puts_single_tokens_first_and_positions_right(llama: tuple[LoadedModel, Judge]) -> None:
    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    long, short = (engine.add(name, list(range(3, 3 + n))) for name, n in (("long", 12), ("short", 9)))
    long.blocks, short.blocks = [4, 9], [2, 7]
    short.num_computed = 8
    step, wanted = plan_step([Chunk(long, 12, (long,)), Chunk(short, 1, (short,))], BLOCK_SIZE)
    batch = build_batch(step, engine.layout, torch.device("cpu"))
    assert batch.token_ids.tolist() == [11, *range(3, 15)]
    assert batch.positions.tolist() == [8, *range(12)]
    assert batch.attention.num_single == 1
    assert [sequence for sequence, _ in wanted.samples] == [short, long]
    assert batch.logit_rows.tolist() == [0, 12]
    with pytest.raises(AssertionError, match="no block"):
        plan_step([Chunk(engine.add("none", [5, 6]), 2)], BLOCK_SIZE)


def test_warm_up_and_poison_leave_the_pool_as_asked(llama: tuple[LoadedModel, Judge]) -> None:
    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    engine.runner.warm_up()
    assert not engine.kv[:, 0].any()
    assert bool(engine.kv[:, 1:].isnan().all())
    engine.runner.fill_block(2, 7.0)
    engine.runner.copy_block(2, 1)
    assert bool((engine.kv[:, 1] == 7.0).all())
    assert bool(engine.kv[:, 3].isnan().all())


def test_a_step_that_only_decodes_is_planned_the_same_in_one_go(llama: tuple[LoadedModel, Judge]) -> None:
    engine = Offline(llama[0], block_size=BLOCK_SIZE)
    chunks = []
    for i, number in enumerate((1, 7, 8, 9, 30)):
        sequence = engine.add(str(i), list(range(5, 5 + number)))
        sequence.blocks = engine.pool.allocate(sequence.num_blocks_for(number + 2 * BLOCK_SIZE, BLOCK_SIZE))  # more than it needs
        sequence.num_computed = number - 1
        chunks.append(Chunk(sequence, 1, (sequence,)))
    general = plan_step(chunks, BLOCK_SIZE)
    for chunk in chunks:
        chunk.sequence.chunk = chunk
    at_once = plan_step(chunks, BLOCK_SIZE)
    assert at_once == general or (at_once[0] == general[0] and at_once[1].samples == general[1].samples)
    assert (at_once[1].scored, at_once[1].scoring) == ((), ())
