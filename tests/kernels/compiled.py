"""Runs the doors of Triton kernels down to machine code for a GPU that is not there, and tells what came out.

`python -m tests.kernels.compiled CAPABILITY NAME...` (never under TRITON_INTERPRET) calls the functions of `CALLS` with tensors
of the CPU; every launch inside is compiled for sm_CAPABILITY by Triton's real compiler and then left out. One line of JSON for
each launch: kernel, shared bytes, registers, bytes of stack (spills), which matrix instructions, cp.async.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32


class _NoDevice:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """From here on a launch in this process compiles for sm_<capability>, tells about it and launches nothing."""
    driver.set_active(_NoDevice(capability))
    seen: set[int] = set()

    def launch(self: JITFunction, grid: Any) -> Callable[..., None]:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if id(kernel) not in seen:
                seen.add(id(kernel))
                tell(describe(kernel))

        return compile_it

    JITFunction.__getitem__ = launch  # type: ignore[method-assign]


def describe(kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "warps": kernel.metadata.num_warps,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
        "tcgen05": "tcgen05.mma" in ptx,
        "async": "cp.async" in ptx,
    }


def _pool(dtype: torch.dtype, num_kv_heads: int = 8, head_dim: int = 128, num_blocks: int = 4) -> torch.Tensor:
    return torch.zeros(num_blocks, 2, num_kv_heads, 16, head_dim).to(dtype)


def _tables(rows: int, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, width, dtype=i32), torch.full((rows,), 16, dtype=i32)


def decode(dtype: torch.dtype = bf16, num_queries: int = 1, **more: Any) -> None:
    from kernels.paged_decode import paged_decode_attention

    tables, lens = _tables(4)
    pool = _pool(torch.float8_e4m3fn if "kv_scales" in more else dtype)
    q = torch.zeros(4 * num_queries, 32, 128, dtype=dtype)
    paged_decode_attention(q, pool, tables, lens, 0.1, num_queries=num_queries, **more)


def prefill(dtype: torch.dtype = bf16, **more: Any) -> None:
    from kernels.paged_prefill import paged_prefill_attention

    tables, lens = _tables(4)
    pool = _pool(torch.float8_e4m3fn if "kv_scales" in more else dtype)
    starts = torch.tensor([0, 16, 32, 48, 64], dtype=i32)
    paged_prefill_attention(torch.zeros(64, 32, 128, dtype=dtype), pool, tables, starts, lens, 0.1, **more)


def rotate(norms: bool, **more: Any) -> None:
    from kernels.fused import rotate_and_write

    norm = torch.ones(128, dtype=bf16) if norms else None
    pool = _pool(torch.float8_e4m3fn if "kv_scales" in more else bf16)
    turn = torch.zeros(16, 1, 64, dtype=torch.complex64)
    slots = torch.zeros(16, dtype=torch.int64)
    rotate_and_write(torch.zeros(16, 48 * 128, dtype=bf16), turn, norm, norm, 1e-6, pool, slots, 32, **more)


def norms(width: int = 4096) -> None:
    from kernels.fused import add_rms_norm, silu_mul

    x = torch.zeros(16, width, dtype=bf16)
    add_rms_norm(x, x.clone(), x[0].clone(), 1e-6)
    silu_mul(x)


def linear(kind: str, rows: int, out: int = 4096, inner: int = 4096) -> None:
    from kernels.skinny_linear import skinny_linear

    x, scale = torch.zeros(rows, inner, dtype=bf16), torch.ones(out)
    made = {
        "plain": lambda: {"weight": torch.zeros(out, inner, dtype=bf16)},
        "int8": lambda: {"weight": torch.zeros(out, inner, dtype=torch.int8), "scale": scale},
        "fp8": lambda: {"weight": torch.zeros(out, inner).to(torch.float8_e4m3fn), "scale": scale},
        "int4": lambda: {"weight": torch.zeros(out, inner // 2, dtype=torch.uint8), "scale": torch.ones(out, inner // 128)},
    }[kind]()
    skinny_linear(x, **made)


def sampling(penalised: bool) -> None:
    from kernels.sampling import SamplingInputs, sample

    ones, numbers = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    more = {"counts": torch.zeros(4, 151936, dtype=i32), "slots": numbers, "repetition": ones, "frequency": ones, "presence": ones}
    bias = {"bias_ids": torch.zeros(4, 5, dtype=i32), "bias": torch.zeros(4, 5)}
    inputs = SamplingInputs(
        ones, torch.zeros(4, dtype=i32), ones, ones, numbers, numbers, numbers, **({**more, **bias} if penalised else {})
    )
    sample(torch.zeros(4, 151936), inputs)


def experts(rows: int) -> None:
    from kernels.grouped import mixture

    gate_up, down = torch.zeros(128, 2 * 768, 2048, dtype=bf16), torch.zeros(128, 2048, 768, dtype=bf16)
    mixture(torch.zeros(rows, 2048, dtype=bf16), torch.zeros(rows, 128), gate_up, down, 8)


def adapters(rows: int) -> None:
    from kernels.grouped import lora

    x, out = torch.zeros(rows, 2048, dtype=bf16), torch.zeros(rows, 1024, dtype=bf16)
    down, up = torch.zeros(4, 16, 2048, dtype=bf16), torch.zeros(4, 1024, 16, dtype=bf16)
    lora(x, out, down, up, torch.ones(4), torch.zeros(rows, dtype=i32))


def move(dtype: torch.dtype, head_dim: int, sums: bool, stores: bool = True) -> None:
    from kernels.kv_pack import move_runs
    from kernels.ops import as_lanes

    pool = as_lanes(torch.zeros(2, 4, 2, 8, 16, head_dim).to(dtype))
    table = torch.zeros(3, 2, dtype=i32)
    move_runs(pool, pool if stores else None, table, torch.zeros(2, 2, 2, dtype=torch.int64) if sums else None)


_SCALES = torch.ones(2, 8)
CALLS: dict[str, Callable[[], None]] = {
    "decode": decode,
    "decode fp16": lambda: decode(torch.float16),
    "decode fp32": lambda: decode(f32),
    "decode fp8 kv": lambda: decode(kv_scales=_SCALES),
    "decode window cap 4 queries": lambda: decode(num_queries=4, window=100, soft_cap=30.0),
    "prefill": prefill,
    "prefill fp32": lambda: prefill(f32),
    "prefill fp8 kv": lambda: prefill(kv_scales=_SCALES),
    "prefill window cap": lambda: prefill(window=100, soft_cap=30.0),
    "rotate": lambda: rotate(norms=False),
    "rotate norms fp8": lambda: rotate(norms=True, kv_scales=_SCALES),
    "norms": norms,
    "move": lambda: move(bf16, 128, True),
    "move without sums": lambda: move(bf16, 128, False),
    "sums alone": lambda: move(bf16, 128, True, stores=False),
    "move 4-byte lanes": lambda: move(bf16, 30, True),
    "move 2-byte lanes": lambda: move(bf16, 5, True),
    "move bytes": lambda: move(torch.uint8, 3, True),
    "experts 1": lambda: experts(1),
    "experts 4096": lambda: experts(4096),
    "lora 32": lambda: adapters(32),
    "sampling": lambda: sampling(False),
    "sampling penalised": lambda: sampling(True),
    **{f"linear {kind} {rows}": partial(linear, kind, rows) for kind in ("plain", "int8", "fp8", "int4") for rows in (1, 64)},
}


def main(capability: str, *names: str) -> None:
    current = ""
    compile_only(int(capability), lambda told: print(json.dumps({"call": current, **told}), flush=True))
    for current in names or CALLS:
        CALLS[current]()


if __name__ == "__main__":
    main(*sys.argv[1:])
