"""What the card at hand can do at best, and how a call is timed on it. Called by bench/kernels.py on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

STREAM_BYTES = 4 << 30
MATRIX = 8192
NUM_GAPS = 500
READ_TILE = 4096  # 8-byte numbers per step of a reading program
READ_STEPS = 16


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second, operations per second, seconds. None: did not run here."""

    read: float
    copy: float  # bytes read and written
    bf16: float
    fp8: float | None
    gap_s: float
    from_host: float
    to_host: float

    def floor_s(self, nbytes: float, flops: float, fp8: bool = False) -> float:
        return max(nbytes / self.read, flops / (self.fp8 if fp8 and self.fp8 else self.bf16))

    def rows(self) -> Iterator[tuple[str, str]]:
        yield "read", f"{self.read / 1e12:.2f} TB/s"
        yield "copy (read + written)", f"{self.copy / 1e12:.2f} TB/s"
        yield f"bf16 product {MATRIX}^3", f"{self.bf16 / 1e12:.0f} TFLOP/s"
        yield f"fp8 product {MATRIX}^3", "does not run here" if self.fp8 is None else f"{self.fp8 / 1e12:.0f} TFLOP/s"
        yield "gap in a captured graph", f"{1e6 * self.gap_s:.2f} us"
        yield "pinned host to device", f"{self.from_host / 1e9:.1f} GB/s"
        yield "device to pinned host", f"{self.to_host / 1e9:.1f} GB/s"

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def graph_times(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds per call, `repeats` samples: all calls, one after the other, captured once and replayed.

    Each call brings its own inputs, so that together they do not fit into the cache. Their results must live as long as the graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return samples


def measure_ceilings(repeats: int) -> Ceilings:
    def best(calls: Sequence[Callable[[], object]]) -> float:
        samples = sorted(graph_times(calls, repeats))
        return samples[len(samples) // 2]

    read, copy = _streams(best)
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * MATRIX**3 / best([lambda: a @ b])
    fp8 = None
    try:
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        fp8 = 2 * MATRIX**3 / best([lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)])
    except RuntimeError as error:
        print(f"no fp8 ceiling: {str(error).splitlines()[0]}")
    x = torch.zeros(1, device="cuda")
    gap_s = best([lambda: x.add_(1.0)] * NUM_GAPS)
    host, device = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True), torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    from_host = host.nbytes / best([lambda: device.copy_(host, non_blocking=True)])
    to_host = host.nbytes / best([lambda: host.copy_(device, non_blocking=True)])
    return Ceilings(read, copy, bf16, fp8, gap_s, from_host, to_host)


def _streams(best: Callable[[Sequence[Callable[[], object]]], float]) -> tuple[float, float]:
    """Bytes per second of reading alone, and of copying with both sides counted."""
    source = torch.randint(-(2**31), 2**31, (STREAM_BYTES // 8,), device="cuda")
    sums = torch.empty(source.numel() // (READ_TILE * READ_STEPS), dtype=torch.int64, device="cuda")

    def read_all() -> None:
        _read[(len(sums),)](source, sums, TILE=READ_TILE, STEPS=READ_STEPS, num_warps=8)

    read_all()
    assert torch.equal(sums, source.view(len(sums), -1).sum(1)), "the reading kernel is wrong; no ceiling can be believed"
    target = torch.empty_like(source)
    return STREAM_BYTES / best([read_all]), 2 * STREAM_BYTES / best([lambda: target.copy_(source)])


@triton.jit
def _read(source_ptr, sums_ptr, TILE: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """grid (numbers / (TILE * STEPS),)"""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], tl.int64)
    for step in tl.static_range(STEPS):
        total += tl.load(source_ptr + (program * STEPS + step) * TILE + tl.arange(0, TILE))
    tl.store(sums_ptr + program, tl.sum(total, 0))
