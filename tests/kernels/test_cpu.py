"""The compiled kernels beyond what test_ops.py asks of every implementation: threads, damage, big batches, and what is done without
them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import cpu, ops, reference, threads
from tests.kernels.test_ops import make_case, relative_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def compiled(kernels: str) -> None:
    if kernels != "compiled":
        pytest.skip("about the compiled kernels")


def test_float32_rows_of_whole_vectors_are_taken_and_nothing_else() -> None:
    x = torch.randn(3, 64)
    assert cpu.takes(x)
    assert cpu.takes(torch.randn(3, 96)[:, :64])
    assert not cpu.takes(x.bfloat16())
    assert not cpu.takes(x.double())
    assert not cpu.takes(torch.randn(3, 40))
    assert not cpu.takes(torch.randn(64, 3).t())


SHAPES = [(1, 1, 64), (3, 3, 64), (8, 2, 128), (2, 8, 96), (1, 9, 32), (1, 40, 16)]  # KV heads, group, head_dim


@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), SHAPES)
@pytest.mark.parametrize("window", [None, 33])
def test_attention_of_real_shapes(num_kv_heads: int, group: int, head_dim: int, window: int | None) -> None:
    lengths = [(0, 1), (1, 1), (63, 1), (64, 1), (200, 1), (130, 5), (0, 70), (95, 33)]
    case = make_case(lengths, True, block_size=32, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim)
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    assert cpu.takes_attention(case.q, case.kv_layer)
    found = ops.attention(case.q, case.rows, case.kv_layer, case.plan, head_dim**-0.5, window)
    assert relative_error(found, case.wanted(head_dim**-0.5, window)) < 2e-6


def test_extreme_scores_neither_overflow_nor_vanish() -> None:
    case = make_case([(300, 40), (150, 1)], True, block_size=32, num_kv_heads=2, group=2, head_dim=32)
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    for scale in (0.0, 60.0):
        found = ops.attention(case.q, case.rows, case.kv_layer, case.plan, scale)
        assert relative_error(found, case.wanted(scale, None)) < 1e-4


def layer(rows: int) -> list[Tensor]:
    """Every kernel once, on `rows` sequences."""
    generator = torch.Generator().manual_seed(3)
    case = make_case([(90, 1)] * rows + [(40, 60)], True, block_size=16, num_kv_heads=2, group=3, head_dim=64)
    num_tokens = len(case.q)
    qkv = torch.randn(num_tokens, 10 * 64, generator=generator)
    turn = ops.rotation(torch.arange(num_tokens), torch.rand(32, generator=generator))
    ops.rotate_and_write(qkv, 6, 2, turn, (torch.rand(64) * 0 + 1.1, torch.rand(64) * 0 + 0.9), 1e-6, case.kv_layer, case.plan)
    q, own = qkv[:, : 6 * 64].view(num_tokens, 6, 64), qkv[:, 6 * 64 :].view(num_tokens, 2, 2, 64)
    wide = torch.randn(num_tokens, 1536, generator=generator)
    attended = ops.attention(q, own, case.kv_layer, case.plan, 0.125)
    return [qkv, attended, ops.silu_mul(wide.clone()), ops.rms_norm(wide, torch.ones(1536), 1e-5)]


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORTH_THREADS", 0)
    assert threads._region() is not None, "torch's OpenMP was not found, so nothing runs on several threads"
    one = layer(5)
    try:
        for number in (2, 5):
            torch.set_num_threads(number)
            assert all(torch.equal(a, b) for a, b in zip(one, layer(5), strict=True))
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_region", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(one, layer(5), strict=True))


def test_what_else_is_in_the_batch_changes_no_bit() -> None:
    few, many = layer(1), layer(1)
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))
    case = make_case([(90, 1), (10, 1), (300, 1)], True, block_size=16, num_kv_heads=2, group=3, head_dim=64)
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    together = ops.attention(case.q, case.rows, case.kv_layer, case.plan, 0.125)
    for i, span in enumerate(case.plan.spans):
        alone = ops.AttentionPlan((ops.Span(0, 1, span.context_len, span.blocks, span.index),), 1, case.plan.slots[i : i + 1])
        q, rows = case.q[i : i + 1], case.rows[i : i + 1]
        assert torch.equal(ops.attention(q, rows, case.kv_layer, alone, 0.125)[0], together[i])


def test_workers_in_one_process_do_not_share_scratch() -> None:
    wanted, wrong = layer(7), []

    def again() -> None:
        torch.set_num_threads(2)
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(wanted, layer(7), strict=True)):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("kind", [0, 1])
def test_damage_is_seen_in_the_result_of_its_sequence_alone(length: int, kind: int) -> None:
    """A NaN in one key or value is a NaN in what comes out, so that the sampler can refuse it."""
    case = make_case([(50, length), (50, length)], False, block_size=16, num_kv_heads=1, group=2, head_dim=32)
    ops.write_kv(case.kv_layer, case.rows, case.plan)
    case.kv_layer[case.plan.spans[0].blocks[1], kind, 0, 3, 5] = float("nan")
    found = ops.attention(case.q, case.rows, case.kv_layer, case.plan, 0.2)
    assert found[:length].isnan().any(dim=1).all()
    assert found[length:].isfinite().all()


@pytest.mark.parametrize("norms", [False, True])
def test_rotate_and_write(norms: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    case = make_case([(3, 9), (20, 1), (0, 1)], True, block_size=8, num_kv_heads=2, group=3, head_dim=32)
    num_tokens = len(case.q)
    wide = torch.randn(num_tokens, 400, generator=generator)
    qkv = wide[:, : 10 * 32]
    weights = (torch.rand(32, generator=generator), torch.rand(32, generator=generator)) if norms else None
    positions, inv_freq = torch.randint(0, 5000, (num_tokens,), generator=generator), torch.rand(16, generator=generator)
    heads = qkv.clone().view(num_tokens, 10, 32)
    q, k, v = heads[:, :6], heads[:, 6:8], heads[:, 8:]
    if weights is not None:
        q, k = (reference.rms_norm(x, weight, 1e-6) for x, weight in zip((q, k), weights, strict=True))
    q, k = (reference.rotate(x, positions, inv_freq) for x in (q, k))
    before = case.kv_layer.clone()
    ops.rotate_and_write(qkv, 6, 2, ops.rotation(positions, inv_freq), weights, 1e-6, case.kv_layer, case.plan)
    found = qkv.view(num_tokens, 10, 32)
    assert relative_error(found[:, :6], q) < 1e-5
    written = case.kv_layer.view(-1, 32)[case.plan.slots]
    assert relative_error(written[:, 0], k) < 1e-5
    assert torch.equal(written[:, 1], v)
    untouched = torch.ones(case.kv_layer.view(-1, 32).shape[0], dtype=torch.bool)
    untouched[case.plan.slots.flatten()] = False
    assert torch.equal(case.kv_layer.view(-1, 32)[untouched].nan_to_num(), before.view(-1, 32)[untouched].nan_to_num())


def in_a_fresh_process(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_numba_torch_does_the_work() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from kernels import cpu, threads, ops\n"
        "assert not cpu.load() and not cpu.is_ready()\n"
        "print(ops.rms_norm(torch.ones(2, 64), torch.ones(64), 0.0).sum().item())"
    )
    assert float(in_a_fresh_process(code)) == 128.0


def test_the_door_is_light_until_the_kernels_are_wanted() -> None:
    assert in_a_fresh_process("import sys; from kernels import ops; print('numba' in sys.modules)").strip() == "False"


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    """numba raises where it finds no folder for what it compiled."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch; from kernels import cpu, threads, ops\n"
        "assert cpu.load()\n"
        "print(ops.rms_norm(torch.ones(2, 64), torch.ones(64), 0.0).sum().item())"
    )
    assert float(in_a_fresh_process(code, NUMBA_OPT="0")) == 128.0
