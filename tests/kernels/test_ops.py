"""Every operation behind the door against its twin: odd shapes, ragged spans, scattered blocks, poisoned memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import ops, reference


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16, 33])
@pytest.mark.parametrize(("out_width", "in_width"), [(7, 5), (64, 48), (129, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_linear(rows: int, out_width: int, in_width: int, bias: bool, packed: bool) -> None:
    x, weight = random(rows, in_width), random(out_width, in_width, seed=1)
    b = random(out_width, seed=2) if bias else None
    wanted = reference.linear(x, weight, b)
    matrix = ops.pack(weight) if packed else weight
    found = ops.linear(x, matrix, b)
    assert found.is_contiguous()
    assert relative_error(found, wanted) < 1e-6
    residual = random(rows, out_width, seed=3)
    assert relative_error(ops.linear(x, matrix, b, residual.clone()), wanted + residual) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = random(5, 3, 33).to(dtype), random(33, seed=1).to(dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert relative_error(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < tolerance


def test_silu_mul() -> None:
    x = random(5, 34)
    wanted = reference.silu_mul(x)
    assert relative_error(ops.silu_mul(x), wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 500, 7])
    inv_freq = 10_000.0 ** (-torch.arange(4) / 4)
    wide = random(4, 9, 8).to(dtype)
    x = wide[:, 2:7]  # heads inside a wider row, as q and k lie in qkv
    wanted = reference.rotate(x, positions, inv_freq)
    before = wide.clone()
    ops.rotate(x, ops.rotation(positions, inv_freq))
    assert relative_error(x, wanted) < (1e-6 if dtype is torch.float32 else 1e-2)
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, 7:], before[:, 7:])


class Case(NamedTuple):
    """A batch over a poisoned pool, with each sequence's whole K and V beside it."""

    plan: ops.AttentionPlan
    kv_layer: Tensor
    rows: Tensor
    q: Tensor
    full: list[Tensor]  # [tokens, 2, num_kv_heads, head_dim]

    def wanted(self, scale: float, window: int | None) -> Tensor:
        parts = []
        for span, full in zip(self.plan.spans, self.full, strict=True):
            q = self.q[span.start : span.start + span.length]
            parts.append(reference.attend(q, full[:, 0], full[:, 1], scale, window).flatten(1))
        return torch.cat(parts)


def make_case(
    lengths: list[tuple[int, int]],
    scattered: bool,
    *,
    block_size: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    seed: int = 0,
) -> Case:
    """lengths: (context_len, length) per sequence. Blocks are neighbours, or scattered over the pool."""
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(lengths, key=lambda pair: pair[1] > 1)
    counts = [-(-(context + length) // block_size) for context, length in lengths]
    ids = torch.randperm(sum(counts) + 3, generator=generator).tolist() if scattered else list(range(sum(counts) + 3))
    kv_layer = torch.full((len(ids), 2, num_kv_heads, block_size, head_dim), float("nan"))
    spans, slots, full, rows = [], [], [], []
    start = 0
    for (context, length), count in zip(lengths, counts, strict=True):
        blocks, ids = ids[:count], ids[count:]
        tokens = torch.randn(context + length, 2, num_kv_heads, head_dim, generator=generator)
        for token in range(context):
            kv_layer[blocks[token // block_size], :, :, token % block_size] = tokens[token]
        for token in range(context, context + length):
            first = blocks[token // block_size] * 2 * num_kv_heads * block_size + token % block_size
            lanes = [[first + (kind * num_kv_heads + head) * block_size for head in range(num_kv_heads)] for kind in (0, 1)]
            slots.append(lanes)
        spans.append(ops.Span(start, length, context, blocks, torch.tensor(blocks)))
        full.append(tokens)
        rows.append(tokens[context:])
        start += length
    plan = ops.AttentionPlan(tuple(spans), sum(length == 1 for _, length in lengths), torch.tensor(slots))
    q = torch.randn(start, num_kv_heads * group, head_dim, generator=generator)
    return Case(plan, kv_layer, torch.cat(rows), q, full)


LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    LENGTHS,
    st.booleans(),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 1, 6, 30]),
    st.sampled_from([5, 16, 4096]),
    st.integers(0, 99),
)
def test_attention(
    lengths: list[tuple[int, int]], scattered: bool, block_size: int, num_kv_heads: int, group: int, window: int | None,
    piece_len: int, seed: int,
) -> None:  # fmt: skip
    case = make_case(lengths, scattered, block_size=block_size, num_kv_heads=num_kv_heads, group=group, head_dim=16, seed=seed)
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    for span, full in zip(case.plan.spans, case.full, strict=True):
        k, v = reference.read_kv(case.kv_layer, list(span.blocks), len(full))
        assert torch.equal(k, full[:, 0])
        assert torch.equal(v, full[:, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "PIECE_LEN", piece_len)
        patch.setattr(ops, "WINDOW_QUERIES", piece_len)
        found = ops.attention(case.q, case.rows, case.kv_layer, case.plan, 0.25, window)
    assert relative_error(found, case.wanted(0.25, window)) < 1e-5


def test_attention_with_extreme_scores() -> None:
    """Contexts whose scores differ by hundreds: joining two parts by their logsumexps neither overflows nor forgets one."""
    case = make_case([(9, 4), (30, 1)], False, block_size=4, num_kv_heads=1, group=2, head_dim=8)
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    found = ops.attention(case.q, case.rows, case.kv_layer, case.plan, 60.0)
    assert relative_error(found, case.wanted(60.0, None)) < 1e-4


def test_write_kv_touches_nothing_else() -> None:
    case = make_case([(3, 6), (5, 1)], True, block_size=4, num_kv_heads=2, group=1, head_dim=8)
    case.kv_layer.nan_to_num_(nan=-7.0)
    before = case.kv_layer.clone()
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    changed = (case.kv_layer != before).any(-1)
    assert int(changed.sum()) == case.plan.slots.numel()
