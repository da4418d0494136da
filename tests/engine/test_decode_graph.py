"""The decode step with static buffers: the same tokens as the runner, step by step, with rows that come, grow and go.

Without a GPU the step runs eagerly, with the kernels in Triton's interpreter; with one, `pytest -m gpu` captures and replays it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

import engine.batch
from engine.batch import Chunk
from engine.decode_graph import FAILED, DecodeGraph, Row
from engine.sequence import Sequence
from kernels import cuda_ops, ops
from models.load import LoadedModel, load_model
from protocol.request import Request, SamplingParams
from tests.offline import Offline
from tests.oracle import make_checkpoint, ragged_prompts

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 12}


def new_sequence(name: str, prompt: list[int], **sampling: object) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 50, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Sequence(Request(request_id=name, model="", prompt_token_ids=tuple(prompt), sampling=params))


def row_of(index: int, sequence: Sequence) -> Row:
    p = sequence.request.sampling
    return Row(
        index, sequence.token_ids[-1], len(sequence) - 1, sequence.blocks, p.temperature, p.top_k, p.top_p, p.min_p, p.seed or 0
    )


def expected_tokens(loaded: LoadedModel, prompt: list[int], count: int, **sampling: object) -> list[int]:
    engine_ = Offline(loaded, block_size=8)
    sequence = engine_.add("one", prompt, max_tokens=count, **sampling)
    engine_.run()
    return sequence.output_token_ids


def begin(engine_: Offline, sequence: Sequence) -> None:
    """Its prompt, by the runner."""
    length = len(sequence)
    sequence.blocks = engine_.pool.allocate(-(-(length + 1) // 8))
    result = engine_.runner.run([Chunk(sequence, length, (sequence,))])
    sequence.num_computed = length
    sequence.append(result.samples[0].token)


def grow(engine_: Offline, graph: DecodeGraph, running: dict[int, Sequence]) -> None:
    """Blocks for what the next launch writes."""
    short = {index: sequence for index, sequence in running.items() if len(sequence) > 8 * len(sequence.blocks)}
    for sequence in short.values():
        sequence.blocks += engine_.pool.allocate(1)
    graph.set_blocks({index: sequence.blocks for index, sequence in short.items()})


def check_rows_that_come_grow_and_go(loaded: LoadedModel, sizes: tuple[int, ...]) -> None:
    prompts = [ragged_prompts(9, 8, longest=30)[index] for index in (2, 5)]
    wanted = [expected_tokens(loaded, prompts[0], 9), expected_tokens(loaded, prompts[1], 6, **SAMPLED)]
    engine_ = Offline(loaded, block_size=8)
    first, second = new_sequence("first", prompts[0]), new_sequence("second", prompts[1], **SAMPLED)
    graph = DecodeGraph(loaded.model, engine_.kv, max_blocks=6, sizes=sizes)
    if graph.device.type == "cuda":
        graph.capture()
    begin(engine_, first)
    graph.set_rows([row_of(2, first)])
    for _ in range(2):
        grow(engine_, graph, {2: first})
        first.append(graph.launch(3).tokens()[2])
    begin(engine_, second)
    graph.set_rows([row_of(0, second)])
    running = {2: first, 0: second}
    for _ in range(5):
        grow(engine_, graph, running)
        tokens = graph.launch(3).tokens()
        assert tokens[1] == FAILED, "a row of padding has no token"
        for index, sequence in running.items():
            sequence.append(tokens[index])
    assert second.output_token_ids == wanted[1]
    graph.clear_rows([0])
    grow(engine_, graph, {2: first})
    tokens = graph.launch(3).tokens()
    first.append(tokens[2])
    assert first.output_token_ids == wanted[0]
    assert tokens[0] == FAILED


@pytest.mark.parametrize("family", ["qwen3"])
def test_rows_come_grow_and_go(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ops, engine.batch):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(ops, "pack", lambda weight: weight)
    folder = make_checkpoint(family, tmp_path, seed=1)
    check_rows_that_come_grow_and_go(load_model(str(folder), device="cpu"), (4,))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_captured_rows_come_grow_and_go(family: str, tmp_path: Path) -> None:
    cuda_ops.setup(torch.device("cuda"))
    folder = make_checkpoint(family, tmp_path, seed=1)
    check_rows_that_come_grow_and_go(load_model(str(folder), device="cuda", dtype="float32"), (1, 2, 4))


def test_a_graph_needs_a_gpu_to_be_captured() -> None:
    graph = DecodeGraph(None, torch.zeros(1, 2, 2, 1, 8, 4), 4, (2,))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="a graph is captured on a GPU"):
        graph.capture()
    with pytest.raises(AssertionError, match="3 rows, the largest graph has 2"):
        graph.launch(3)
    with pytest.raises(AssertionError, match="5 blocks, the graph has room for 4"):
        graph.set_rows([Row(0, 1, 1, [1, 2, 3, 4, 5])])
