"""The path of a step on a GPU, on any machine: inputs in one copy, the fused kernels and paged attention behind the door.

Without a GPU the door is told that the CPU is one, and the kernels run in Triton's interpreter: the same answers as
transformers. With one, `pytest -m gpu` runs the engine there in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

import engine.batch
from engine.device_inputs import MAX_SHORT_LEN, block_tables, device_inputs, upload
from engine.step import Step
from kernels import cuda_ops, ops
from models.load import load_model
from tests.offline import Offline, random_chunks
from tests.oracle import Judge, first_divergence, make_checkpoint, ragged_prompts

CPU = torch.device("cpu")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is a GPU, weights stay as they are, and attention and the rest are the kernels."""
    for module in (ops, engine.batch):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(ops, "pack", lambda weight: weight)
    yield
    cuda_ops.choices.deterministic = False


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.usefixtures("pretended")
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    """Ragged prompts in ragged chunks, all together: singles, chunks and short chunks in one batch."""
    folder = make_checkpoint(family, tmp_path, seed=1)
    loaded, judge = load_model(str(folder), device="cpu"), Judge(folder)
    prompts = [ragged_prompts(9, 8, longest=40)[index] for index in (1, 4, 7)]
    together = Offline(loaded, block_size=8, chunk_len=random_chunks(2, 1, 5, 8, 19))
    batch = [together.add(str(i), prompt, max_tokens=6) for i, prompt in enumerate(prompts)]
    together.run()
    for prompt, sequence in zip(prompts, batch, strict=True):
        story = first_divergence(judge.greedy(prompt, 6), sequence.output_token_ids)
        assert story is None, f"{family}, prompt of {len(prompt)}: {story}"


@pytest.mark.usefixtures("pretended")
def test_the_deterministic_choice_answers_alike(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3", tmp_path, seed=1)
    loaded, judge = load_model(str(folder), device="cpu"), Judge(folder)
    cuda_ops.choices.deterministic = True
    engine_ = Offline(loaded, block_size=8, chunk_len=random_chunks(2, 1, 5))
    prompts = [ragged_prompts(9, 8, longest=20)[index] for index in (2, 5)]
    batch = [engine_.add(str(i), prompt, max_tokens=3) for i, prompt in enumerate(prompts)]
    engine_.run()
    for prompt, sequence in zip(prompts, batch, strict=True):
        assert first_divergence(judge.greedy(prompt, 3), sequence.output_token_ids) is None
    assert "fixed form" in cuda_ops.backends()["linear"]


def step(lengths: list[int], contexts: list[int], blocks: list[list[int]]) -> Step:
    return Step(list(range(100, 100 + sum(lengths))), lengths, contexts, blocks, [0, sum(lengths) - 1], [[0, 1]])


def test_inputs_of_a_step() -> None:
    ids, positions, plan, rows = device_inputs(step([1, 1, 3], [4, 0, 2], [[7, 3], [9], [1, 5]]), 4, CPU)
    assert ids.tolist() == [100, 101, 102, 103, 104]
    assert positions.tolist() == [4, 0, 2, 3, 4]
    assert rows.tolist() == [0, 4]
    assert plan.num_single == 2
    assert plan.short_len == 3
    assert plan.token_slots is not None
    assert plan.token_slots.tolist() == [3 * 4, 9 * 4, 1 * 4 + 2, 1 * 4 + 3, 5 * 4]
    assert plan.block_tables is not None
    assert plan.block_tables.tolist() == [[7, 3], [9, 0], [1, 5]]
    assert plan.block_tables.dtype is torch.int32
    assert plan.seq_lens is not None
    assert plan.seq_lens.tolist() == [5, 1, 5]
    assert plan.query_starts is not None
    assert plan.query_starts.tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("lengths", "short_len"), [([1, 1], 0), ([2, 2], 2), ([1, 2, 3], 0), ([MAX_SHORT_LEN], MAX_SHORT_LEN), ([MAX_SHORT_LEN + 1], 0)]
)
def test_short_chunks_of_one_length_are_told(lengths: list[int], short_len: int) -> None:
    _, _, plan, _ = device_inputs(step(lengths, [3] * len(lengths), [[1, 2, 3]] * len(lengths)), 8, CPU)
    assert plan.short_len == short_len


def test_an_upload_keeps_every_array() -> None:
    arrays = [
        np.arange(3, dtype=np.int32),
        np.arange(6).reshape(2, 3),
        np.array([], dtype=np.int32),
        np.array([1.5], dtype=np.float32),
    ]
    for array, tensor in zip(arrays, upload(arrays, CPU), strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.data_ptr() % 16 == 0


def test_tables_of_unequal_rows() -> None:
    assert block_tables([[1], [], [2, 3, 4]]).tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4]]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_on_a_gpu(family: str, deterministic: bool, tmp_path: Path) -> None:
    """float32, so that transformers' greedy tokens are the answer; chunked and batched at random."""
    folder = make_checkpoint(family, tmp_path, seed=1)
    loaded, judge = load_model(str(folder), device="cuda", dtype="float32"), Judge(folder)
    cuda_ops.setup(torch.device("cuda"), deterministic)
    prompts = ragged_prompts(9, 16, longest=60)
    together = Offline(loaded, block_size=16, chunk_len=random_chunks(2, 1, 5, 8, 19))
    batch = [together.add(str(i), prompt, max_tokens=24) for i, prompt in enumerate(prompts)]
    together.run()
    cuda_ops.setup(torch.device("cuda"))
    for prompt, sequence in zip(prompts, batch, strict=True):
        story = first_divergence(judge.greedy(prompt, 24), sequence.output_token_ids)
        assert story is None, f"{family}, prompt of {len(prompt)}: {story}"
