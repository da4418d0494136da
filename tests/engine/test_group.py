"""Groups of ranks, as threads: what any number of tensor ranks and stages says is what one rank says; and how a group ends."""

from __future__ import annotations

import functools
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

import engine.runner
from engine.batch import Chunk
from engine.group import STEP_NBYTES, Group
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.step import Extras, Step, decode, encode
from models.load import LoadedModel, load_model
from models.toy import VOCAB_SIZE, toy_next_token
from protocol.errors import ConfigError, GroupBroken
from protocol.parallel import Parallel, layers_of
from protocol.request import Request, SamplingParams
from tests.offline import Offline, random_chunks
from tests.oracle import Judge, first_divergence, make_checkpoint
from tests.ranks import Ranks

BLOCK_SIZE = 8
NUM_TOKENS = 8
SIZES = [Parallel(tp, pp) for tp in (1, 2, 4) for pp in (1, 2) if tp * pp > 1]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral-window")  # plain; bias and tied; norms of q and k; a window of 24 tokens

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """family -> (folder, prompts, the judge's answers, one rank's prompt_logprobs of the longest prompt). Made once."""

    @functools.cache
    def make(family: str) -> tuple[Path, list[list[int]], list[Any], list[Any]]:
        folder = make_checkpoint(family, tmp_path_factory.mktemp(family), seed=3)
        rng = random.Random(7)
        stem = [rng.randrange(3, 199) for _ in range(2 * BLOCK_SIZE)]
        tails = ([5], [6, 7, 8], [9] * 21)
        prompts = [[11], *([*stem, *tail] for tail in tails)]
        judge = Judge(folder)
        alone = Offline(load_model(str(folder), device="cpu"), block_size=BLOCK_SIZE)
        alone.add("scored", prompts[-1], prompt_logprobs=2)
        alone.run()
        return folder, prompts, [judge.greedy(prompt, NUM_TOKENS) for prompt in prompts], alone.prompt_logprobs["scored"]

    return make


def check_scores(found: list[Any], wanted: list[Any]) -> None:
    assert [e and (e.token, e.rank, [t for t, _ in e.top]) for e in found] == [
        e and (e.token, e.rank, [t for t, _ in e.top]) for e in wanted
    ]
    assert all(math.isclose(a.logprob, b.logprob, abs_tol=2e-4) for a, b in zip(found, wanted, strict=True) if a and b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_says_what_transformers_says(known: Callable[[str], Any], size: Parallel, family: str) -> None:
    """In ragged chunks, with prefix hits and preemption, and scoring a prompt. 6 query heads and 2 KV heads: on 4 tensor ranks
    each KV head lies twice, with 2 and with 1 of its query heads; 199 tokens and 80 inner columns are dealt unevenly."""
    folder, prompts, answers, scores = known(family)
    with Ranks(str(folder), size, block_size=BLOCK_SIZE, num_blocks=12, chunk_len=random_chunks(5, 1, 6, 13)) as ranks:
        sequences = [ranks.engine.add(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts)]
        ranks.engine.run()
        scored = ranks.engine.add("scored", prompts[-1], prompt_logprobs=2, max_tokens=NUM_TOKENS)
        again = ranks.engine.add("again", prompts[1], max_tokens=NUM_TOKENS)
        ranks.engine.run()
        assert ranks.engine.num_cached_tokens > 0
        assert ranks.engine.num_preemptions > 0
        check_scores(ranks.engine.prompt_logprobs["scored"], scores)
        for sequence, answer in zip([*sequences, scored, again], [*answers, answers[-1], answers[1]], strict=True):
            story = first_divergence(answer, sequence.output_token_ids)
            assert story is None, f"{family} on {size}: {story}"
    assert not ranks.errors


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (Parallel(2, 1), {"num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True}),
        (Parallel(4, 1), {"num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True}),
        (Parallel(1, 3), {}),
    ],
    ids=["3 KV heads on 2 ranks, all biases", "6 KV heads on 4 ranks, tied", "a layer per stage"],
)
def test_uneven_parts(tmp_path: Path, size: Parallel, changes: dict[str, Any]) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=4, **changes)
    prompt = list(range(20, 45))
    with Ranks(str(folder), size, block_size=BLOCK_SIZE, chunk_len=random_chunks(1, 3, 9)) as ranks:
        sequence = ranks.engine.add("x", prompt, max_tokens=NUM_TOKENS)
        ranks.engine.run()
    assert first_divergence(Judge(folder).greedy(prompt, NUM_TOKENS), sequence.output_token_ids) is None


# ---- the toy: exact -----------------------------------------------------------------------------------------------------


def expected(sequence: Sequence) -> list[int]:
    tokens = list(sequence.request.prompt_token_ids)
    while len(tokens) < len(sequence):
        tokens.append(toy_next_token(tokens))
    return tokens


@pytest.mark.parametrize("size", [*SIZES, Parallel(8, 1), Parallel(2, 4)], ids=str)
def test_the_toy_is_its_oracle_on_any_size(size: Parallel) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 4, 33, 60)]
    with Ranks("toy", size, block_size=4, num_blocks=50, chunk_len=random_chunks(2, 1, 6, 17)) as ranks:
        sequences = [ranks.engine.add(str(i), prompt) for i, prompt in enumerate(prompts * 2)]
        ranks.engine.run()
    assert ranks.engine.num_cached_tokens > 0
    assert ranks.engine.num_preemptions > 0
    for sequence in sequences:
        assert sequence.token_ids == expected(sequence)


@pytest.mark.parametrize("size", [Parallel(2, 2), Parallel(4, 1), Parallel(8, 1)], ids=str)
def test_one_wrong_byte_on_any_rank_changes_what_is_said(size: Parallel) -> None:
    """Also where a head lies on several ranks: each copy counts."""
    seen: list[int] = []

    def spy(loaded: LoadedModel, rank: int) -> None:
        if rank == 0:
            real = loaded.model.logits

            def logits(hidden: torch.Tensor) -> torch.Tensor | None:
                seen.append(int(hidden[0, 0]))
                return real(hidden)

            loaded.model.logits = logits  # type: ignore[method-assign]

    rng = random.Random(3)
    with Ranks("toy", size, block_size=4, change=spy) as ranks:
        sequence = ranks.engine.add("x", list(range(50, 59)), max_tokens=99)
        ranks.engine.step()
        chunk = Chunk(sequence, 1, (sequence,))
        for step in range(12 * size.num_ranks):
            kv = ranks.kv(step % size.num_ranks)
            token = rng.randrange(9)
            place = (rng.randrange(kv.shape[0]), sequence.blocks[token // 4], rng.randrange(2), rng.randrange(kv.shape[3]))
            kv[(*place, token % 4, rng.randrange(8))] ^= 1 << rng.randrange(8)
            ranks.engine.runner.run([chunk])
            assert seen[-1] not in seen[:-1], f"rank {step % size.num_ranks}"


@pytest.mark.parametrize("size", [Parallel(2, 1), Parallel(1, 2), Parallel(4, 2)], ids=str)
def test_choices_share_the_prompt_and_copy_on_write(size: Parallel) -> None:
    """The copies come with the step that needs them, and every rank makes them in its own pool."""
    prompt = list(range(40, 46))  # one block and a half
    params = SamplingParams(n=2, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    request = Request(request_id="n", model="", prompt_token_ids=tuple(prompt), sampling=params)
    outputs = []
    for group in (size, Parallel()):
        with Ranks("toy", group, block_size=4) as ranks:
            engine, first = ranks.engine, Sequence(request)
            first.blocks = engine.pool.allocate(2)
            second = first.fork(1)
            result = engine.runner.run([Chunk(first, len(prompt), (first, second))])
            engine.pool.seal(first.blocks[0], None)
            engine.pool.share(first.blocks[:1])
            (own,) = engine.pool.allocate(1)
            second.blocks = [first.blocks[0], own]
            for sequence, sample in zip((first, second), result.samples, strict=True):
                sequence.num_computed = len(prompt)
                sequence.append(sample.token)
            chunks = [Chunk(first, 1, (first,)), Chunk(second, 1, (second,))]
            result = engine.runner.run(chunks, extras=Extras(copies=((first.blocks[1], own),)))
            for sequence, sample in zip((first, second), result.samples, strict=True):
                sequence.num_computed += 1
                sequence.append(sample.token)
            engine.running = [first, second]
            engine.run()
            outputs.append((first.token_ids, second.token_ids))
        assert not ranks.errors
    assert outputs[0] == outputs[1]
    assert outputs[0][0] != outputs[0][1]


def test_every_rank_pushes_its_own_layers() -> None:
    size = Parallel(2, 2)
    pushed: dict[int, list[tuple[int, Any]]] = {rank: [] for rank in range(size.num_ranks)}

    def make_on_layer(rank: int, runner: ModelRunner) -> Callable[[Any], Callable[[int], None]]:
        return lambda pushes: lambda layer: pushed[rank].append((layer, pushes))

    pushes = (("grant", ((0, 0), (1, 1))),)
    with Ranks("toy", size, make_on_layer=make_on_layer) as ranks:
        sequence = ranks.engine.add("x", list(range(16)))
        sequence.blocks = ranks.engine.pool.allocate(2)
        own = make_on_layer(0, ranks.engine.runner)(pushes)
        ranks.engine.runner.run([Chunk(sequence, 16)], own, Extras(pushes=pushes))
        ranks.engine.runner.run([Chunk(sequence, 16)])
    for rank, calls in pushed.items():
        assert calls == [(layer, pushes) for layer in range(len(layers_of(4, size, size.pp_rank(rank))))]


@pytest.mark.parametrize("size", [Parallel(1, 2), Parallel(2, 2)], ids=str)
@pytest.mark.parametrize("overlaps", [False, True])
def test_chunks_of_a_prompt_overlap_on_the_stages(size: Parallel, overlaps: bool) -> None:
    """The last rank holds each chunk until the first stage has begun with the next one: it does where they overlap, and never
    where run() waits for all stages. The tokens are right."""
    num_chunks, patience = 5, 10.0 if overlaps else 0.1
    begun = [threading.Event() for _ in range(num_chunks + 3)]
    met: list[bool] = []

    def watch(loaded: LoadedModel, rank: int) -> None:
        real, count = loaded.model.forward, iter(range(1000))

        def forward(*args: Any) -> torch.Tensor:
            step = next(count)
            if rank == 0:
                begun[step].set()
            if rank == size.num_ranks - 1 and step < num_chunks - 1:
                met.append(begun[step + 1].wait(patience))
            return real(*args)

        loaded.model.forward = forward  # type: ignore[method-assign]

    with Ranks("toy", size, block_size=4, change=watch) as ranks:
        engine = ranks.engine
        sequence = engine.add("x", list(range(4 * num_chunks + 2)), max_tokens=2)
        sequence.blocks = engine.pool.allocate(num_chunks + 1)
        for _ in range(num_chunks):
            engine.runner.run([Chunk(sequence, 4)], extras=Extras(overlaps=overlaps))
            sequence.num_computed += 4
        engine.run()
        assert sequence.token_ids == expected(sequence)
    assert not ranks.errors
    assert met == [overlaps] * (num_chunks - 1)


def test_two_groups_in_one_process() -> None:
    with Ranks("toy", Parallel(2, 1)) as one, Ranks("toy", Parallel(1, 2)) as two:
        sequences = [ranks.engine.add("x", [1, 2, 3, 4], max_tokens=5) for ranks in (one, two)]
        for _ in range(5):
            one.engine.step()
            two.engine.step()
    assert sequences[0].token_ids == sequences[1].token_ids == expected(sequences[0])


def test_a_step_of_any_length_arrives_whole() -> None:
    """One that fits into the first buffer to the byte, its neighbours, and one that does not fit by far."""
    steps = []
    for nbytes in (STEP_NBYTES - 9, STEP_NBYTES - 8, STEP_NBYTES - 7, 5 * STEP_NBYTES):
        step = Step([], [], [], [], [], [])
        while len(encode(step)) < nbytes:
            step.token_ids.extend([1] * (nbytes - len(encode(step))))
            while len(encode(step)) > nbytes:
                step.token_ids.pop()
        assert len(encode(step)) == nbytes
        steps.append(step)
    store, got = HashStore(), []

    def follow() -> None:
        group = Group(store, 1, Parallel(2, 1), timeout_s=10)
        got.extend(group.receive() for _ in steps)

    thread = threading.Thread(target=follow)
    thread.start()
    group = Group(store, 0, Parallel(2, 1), timeout_s=10)
    for step in steps:
        group.broadcast(step)
    thread.join(10)
    assert got == steps
    assert decode(encode(steps[0])) == steps[0]


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"no address 192\.0\.2\.1"):
        Group(HashStore(), 0, Parallel(2, 1), timeout_s=1, hostname="192.0.2.1")
    with pytest.raises(ConfigError, match="no address nosuch0"):
        Group(HashStore(), 0, Parallel(2, 1), timeout_s=1, interface="nosuch0")


# ---- what goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [1, 3])
def test_damaged_kv_fails_one_request_only(known: Callable[[str], Any], victim: int) -> None:
    """Not a number in the pool of one rank, whichever stage it is in."""
    folder, prompts, answers, _ = known("llama")
    with Ranks(str(folder), Parallel(2, 2), block_size=BLOCK_SIZE) as ranks:
        sequences = [ranks.engine.add(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts)]
        ranks.engine.step()
        ranks.kv(victim)[:, sequences[2].blocks[-1]] = float("nan")
        ranks.engine.run()
    assert list(ranks.engine.failed) == ["2"]
    for index in (0, 1, 3):
        assert first_divergence(answers[index], sequences[index].output_token_ids) is None


def failing(victim: int, act: Callable[[], None]) -> Callable[[LoadedModel, int], None]:
    """The victim's third forward pass does something else first."""

    def change(loaded: LoadedModel, rank: int) -> None:
        if rank != victim:
            return
        real, count = loaded.model.forward, iter(range(1000))

        def forward(*args: Any) -> torch.Tensor:
            if next(count) == 2:
                act()
            return real(*args)

        loaded.model.forward = forward  # type: ignore[method-assign]

    return change


def explode() -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("size", [Parallel(2, 1), Parallel(1, 2), Parallel(2, 2)], ids=str)
@pytest.mark.parametrize("who", ["leader", "last"])
def test_a_rank_that_raises_ends_every_rank_at_once(size: Parallel, who: str) -> None:
    victim = 0 if who == "leader" else size.num_ranks - 1
    with Ranks("toy", size, timeout_s=30, change=failing(victim, explode)) as ranks:
        ranks.engine.add("x", [1, 2, 3])
        started = time.monotonic()
        with pytest.raises(GroupBroken, match="boom" if victim == 0 else "lost its group"):
            ranks.engine.run()
        assert ranks.engine.num_steps == 3
        with pytest.raises(GroupBroken, match="its group is over"):
            ranks.engine.step()
    assert time.monotonic() - started < 15  # the deadline is 30 s: the closed connection is what was seen
    assert set(ranks.errors) == set(range(1, size.num_ranks))
    assert all(isinstance(error, GroupBroken) for error in ranks.errors.values())


@pytest.mark.parametrize("size", [Parallel(2, 1), Parallel(1, 2)], ids=str)
def test_a_silent_rank_is_waited_for_until_the_deadline(size: Parallel) -> None:
    awake = threading.Event()
    with Ranks("toy", size, timeout_s=1, change=failing(size.num_ranks - 1, lambda: awake.wait(20) and None)) as ranks:
        ranks.engine.add("x", [1, 2, 3])
        started = time.monotonic()
        with pytest.raises(GroupBroken, match="deadline 1 s"):
            ranks.engine.run()
        assert 0.9 < time.monotonic() - started < 8
        awake.set()


def test_idle_steps_keep_a_group_that_has_no_work() -> None:
    with Ranks("toy", Parallel(2, 1), timeout_s=1.5) as ranks:
        sequence = ranks.engine.add("x", [1, 2, 3], max_tokens=3)
        for _ in range(4):
            time.sleep(0.5)
            assert ranks.engine.runner.idle()
        ranks.engine.run()
        assert sequence.token_ids == expected(sequence)
        assert not ranks.errors
        time.sleep(2)
        with pytest.raises(GroupBroken):
            ranks.engine.runner.idle()
    assert isinstance(ranks.errors[1], GroupBroken)


def test_an_idle_step_never_comes_between() -> None:
    """From another thread amid a step it does nothing."""
    with Ranks("toy", Parallel(2, 1), timeout_s=10) as ranks:
        sequence = ranks.engine.add("x", [1, 2, 3], max_tokens=40)
        stop, counts = threading.Event(), {True: 0, False: 0}

        def nag() -> None:
            while not stop.is_set():
                counts[ranks.engine.runner.idle()] += 1
                time.sleep(0.0003)

        thread = threading.Thread(target=nag)
        thread.start()
        ranks.engine.run()
        stop.set()
        thread.join()
        assert sequence.token_ids == expected(sequence)
    assert not ranks.errors
    assert counts[True]


@pytest.mark.parametrize("what", ["hook", "sampler", "plan"])
def test_an_error_of_the_leader_alone_ends_no_group(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """on_layer, sampling and a chunk without blocks: the other ranks do their part to the end, and the next step is right."""
    with Ranks("toy", Parallel(2, 2)) as ranks:
        sequence = ranks.engine.add("x", [1, 2, 3], prompt_logprobs=1, max_tokens=4)
        sequence.blocks = ranks.engine.pool.allocate(1)
        chunk = Chunk(sequence, 3, (sequence,))
        with monkeypatch.context() as patch:
            if what == "sampler":
                patch.setattr(engine.runner, "sample", lambda *_: explode())
            if what == "plan":
                sequence.blocks = []
            with pytest.raises((ValueError, AssertionError), match="boom|has no block"):
                ranks.engine.runner.run([chunk], (lambda layer: explode()) if what == "hook" else None)
        ranks.engine.run()
        assert sequence.token_ids == expected(sequence)
    assert not ranks.errors
