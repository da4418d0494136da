"""Whole decode steps of models with random weights, one captured graph each. Called by bench/kernels.py where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench import kernel_cases
from bench.kernel_cases import BLOCK_SIZE, QWEN_06B, Case, Shape
from engine.decode_graph import DecodeGraph, Row
from models.config import ModelConfig
from models.llama import Llama


def config_of(shape: Shape, num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM" if shape is QWEN_06B else "LlamaForCausalLM",
        vocab_size=shape.vocab,
        num_layers=num_layers,
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.inner,
        max_position_embeddings=40960,
        tie_word_embeddings=shape is QWEN_06B,
        qk_norm=shape is QWEN_06B,
        dtype="bfloat16",
    )


def random_model(shape: Shape, num_layers: int) -> Llama:
    """Weights so small that no sum of them overflows."""
    model = Llama(config_of(shape, num_layers), kernel_cases.DTYPE, torch.device(kernel_cases.DEVICE))
    for slot in model.slots().values():
        slot.target.normal_(0.0, 0.02)
    return model


def steps() -> Iterator[Case]:
    for shape, layers, batches, context in kernel_cases.STEPS:
        model = random_model(shape, layers)
        weights = 2.0 * sum(out * inner * (1 if name == "head" else layers) for name, (out, inner) in shape.matrices.items())
        for batch in batches:
            blocks_each = context // BLOCK_SIZE + 8  # rows may go on
            pool = torch.randn(
                layers,
                batch * blocks_each,
                2,
                shape.kv_heads,
                BLOCK_SIZE,
                shape.head_dim,
                device=kernel_cases.DEVICE,
                dtype=kernel_cases.DTYPE,
            )
            kv_bytes = 2.0 * 2 * batch * context * layers * shape.kv_heads * shape.head_dim
            yield Case(
                f"decode step {shape.name} {batch} x {context}, {layers} layers",
                _calls(model, pool, batch, context, blocks_each),
                lambda model=model, pool=pool, batch=batch, blocks=blocks_each: _same_twice(model, pool, batch, blocks),
                weights + kv_bytes,
                weights * batch + kv_bytes * shape.heads / shape.kv_heads,
                tolerance=0.0,
            )
            del pool


def _graph(model: Llama, pool: torch.Tensor, batch: int, context: int, blocks_each: int) -> DecodeGraph:
    graph = DecodeGraph(model, pool, blocks_each, (batch,))
    order = torch.randperm(pool.shape[1]).view(batch, blocks_each).tolist()
    graph.set_rows([Row(index, index % 1000, context - 1, order[index], 0.7, 20, 0.95, seed=index) for index in range(batch)])
    return graph


def _calls(model: Llama, pool: torch.Tensor, batch: int, context: int, blocks_each: int) -> list[Callable[[], object]]:
    """One step; it is captured by the caller, so this graph's own capture() is not needed. What it advances is set back at
    its end, which costs two small kernels: every replay is the same step."""
    graph = _graph(model, pool, batch, context, blocks_each)
    before = graph.token_ids.clone()

    def call() -> object:
        graph._step(batch)
        graph.positions.fill_(context - 1)
        graph.token_ids.copy_(before)
        return graph.tokens.clone()

    return [call]


def _same_twice(model: Llama, pool: torch.Tensor, batch: int, blocks_each: int) -> float:
    """Share of rows whose token after four steps differs between a captured run and an eager one from the same KV."""
    found = []
    for captured in (False, True):
        torch.manual_seed(7)
        graph = _graph(model, pool, batch, 64, blocks_each)
        rows = graph.positions.clone(), graph.token_ids.clone()
        if captured:
            graph.positions.fill_(-1)
            graph.capture()
            graph.positions.copy_(rows[0])
            graph.token_ids.copy_(rows[1])
            for _ in range(4):
                pending = graph.launch(batch)
            found.append(torch.tensor(pending.tokens()))
        else:
            for _ in range(4):
                graph._step(batch)
            found.append(graph.tokens.cpu())
    if bool((found[0] < 0).any()):
        return 1.0
    return float((found[0] != found[1]).double().mean())
