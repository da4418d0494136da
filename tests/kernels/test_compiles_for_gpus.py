"""The Triton kernels are compiled down to machine code for real GPUs on any machine: the compiler needs no device.

What this shows is that they compile, use the tensor cores and fit into shared memory. What they compute is tested in
the interpreter and, where there is a GPU, on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

ROOT = Path(__file__).resolve().parents[2]
AMPERE, HOPPER, BLACKWELL = 80, 90, 100
MAX_SHARED_BYTES = 99 * 1024  # what the smallest of them (sm_86) gives one block

CASES = [("fp16", AMPERE), ("bf16", HOPPER), ("fp16", BLACKWELL), ("fp32", HOPPER)]

# Runs without TRITON_INTERPRET, hence in a process of its own. Prints one line of JSON for each kernel and case.
COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels import paged_decode

def build(kernel, types, constants, capability, num_warps):
    signature = types | dict.fromkeys(constants, "constexpr")
    built = compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    print(json.dumps([kernel.__name__, len(built.asm["cubin"]), built.metadata.shared, "mma" in built.asm["ptx"]]))

integers = dict.fromkeys(
    ["block_size", "split_len", "q_stride_row", "q_stride_head", "kv_stride_block", "kv_stride_half", "kv_stride_head",
     "kv_stride_token", "tables_stride_row"], "i32")
for dtype, capability in json.loads(sys.argv[1]):
    pointers = {"q_ptr": f"*{dtype}", "kv_ptr": f"*{dtype}", "tables_ptr": "*i32", "seq_lens_ptr": "*i32",
                "sums_ptr": "*fp32", "stats_ptr": "*fp32", "scale_log2": "fp32"}
    build(paged_decode._attend_split, pointers | integers,
          dict(NUM_SPLITS=4, HEAD_DIM=128, HEADS_PER_KV=4, TILE_HEADS=16, TILE_DIM=128, TILE_LEN=paged_decode.TILE_LEN),
          capability, 4)
    build(paged_decode._combine_splits,
          {"sums_ptr": "*fp32", "stats_ptr": "*fp32", "seq_lens_ptr": "*i32", "out_ptr": f"*{dtype}",
           "split_len": "i32"},
          dict(NUM_SPLITS=4, HEAD_DIM=128, TILE_DIM=128), capability, 1)
"""


def test_paged_decode_compiles(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(CASES)],
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in built] == ["_attend_split", "_combine_splits"] * len(CASES)
    for (dtype, capability), case in zip(CASES, zip(built[::2], built[1::2], strict=True), strict=True):
        for name, num_bytes, shared, uses_tensor_cores in case:
            where = f"{name} for {dtype} on sm_{capability}"
            assert num_bytes > 0, where
            assert shared <= MAX_SHARED_BYTES, f"{where} needs {shared} bytes of shared memory"
            # float32 stays exact: no tf32
            assert uses_tensor_cores == (name == "_attend_split" and dtype != "fp32"), where
