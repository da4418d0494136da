"""The toy model: equal to its oracle whatever the chunks, blocks and batches, and different as soon as one byte is."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer

from engine.batch import Chunk
from models.load import LoadedModel, load_model
from models.locate import locate
from models.toy import SAYABLE, VOCAB_SIZE, toy_answer, toy_next_token
from tests.offline import Offline, random_chunks


@pytest.fixture(scope="module")
def toy() -> LoadedModel:
    return load_model("toy")


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(toy_next_token(tokens))
    return tokens[len(prompt) :]


def test_the_oracle_is_pinned() -> None:
    """Another answer here makes workers of two versions disagree: then toy_hash must change as well."""
    assert expected([1, 2, 3], 6) == PINNED


PINNED = [57, 458, 335, 287, 494, 431]


@pytest.mark.parametrize("block_size", [4, 16])
def test_output_depends_on_tokens_only(toy: LoadedModel, block_size: int) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 3, 4, 5, 33, 60)]
    engine = Offline(toy, block_size=block_size, num_blocks=200 // block_size, chunk_len=random_chunks(2, 1, 6, 17))
    sequences = [engine.add(str(i), prompt) for i, prompt in enumerate(prompts * 2)]
    engine.run()
    assert engine.num_cached_tokens > 0 or engine.num_preemptions > 0
    for sequence in sequences:
        assert sequence.output_token_ids == expected(list(sequence.request.prompt_token_ids), 16)


def test_one_wrong_byte_anywhere_changes_what_is_said(toy: LoadedModel) -> None:
    engine = Offline(toy, block_size=4)
    sequence = engine.add("x", list(range(50, 59)), max_tokens=99)
    engine.step()
    chunk = Chunk(sequence, 1, (sequence,))
    logits = []
    real = toy.model.logits

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        logits.append(int(hidden[0, 0]))
        return real(hidden)

    engine.runner.loaded = LoadedModel(
        _With(toy.model, spy), toy.config, toy.model_hash, toy.dtype, toy.device, toy.path, toy.progress
    )
    engine.runner.run([chunk])
    rng = random.Random(3)
    for _ in range(200):
        token = rng.randrange(9)
        place = (rng.randrange(4), sequence.blocks[token // 4], rng.randrange(2), rng.randrange(2), token % 4, rng.randrange(8))
        engine.kv[place] ^= 1 << rng.randrange(8)
        engine.runner.run([chunk])
        assert logits[-1] not in logits[:-1]


class _With:
    """A model with other logits."""

    def __init__(self, model: object, logits: object) -> None:
        self.embed = model.embed  # type: ignore[attr-defined]
        self.forward = model.forward  # type: ignore[attr-defined]
        self.logits = logits


def test_sampling_and_logprobs_work(toy: LoadedModel) -> None:
    engine = Offline(toy)
    engine.add("a", [1, 2, 3], temperature=1.0, seed=1, logprobs=2, max_tokens=40)
    engine.add("b", [1, 2, 3], temperature=1.0, seed=2, max_tokens=40)
    engine.add("c", [1, 2, 3], prompt_logprobs=1)
    sequences = list(engine.running)
    engine.run()
    assert sequences[0].output_token_ids != sequences[1].output_token_ids
    assert len(engine.logprobs["a"]) == 40
    assert len(engine.prompt_logprobs["c"]) == 3
    assert not engine.failed


def test_its_tokenizer_knows_every_token_and_any_text() -> None:
    tokenizer = Tokenizer.from_file(str(locate("toy") / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    text = "Grüße, the cat 42 \U0001f600\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode([int(token) for token in SAYABLE]).isprintable()


def test_a_whole_answer_is_one_token_after_the_other():
    rng = random.Random(3)
    for length in (1, 7, 40):
        token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        answer = toy_answer(token_ids, 20)
        assert answer == [toy_next_token([*token_ids, *answer[:i]]) for i in range(20)]
