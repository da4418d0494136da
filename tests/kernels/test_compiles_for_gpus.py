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


COMPILE_MOVE = (
    COMPILE[: COMPILE.index("integers = dict")].replace("import paged_decode", "import kv_pack")
    + """
strides = [f"{pool}_stride_{axis}" for pool in ("source", "target") for axis in ("layer", "block", "half")]
integers = dict.fromkeys(["num_runs", "num_tiles", "half_lanes", *strides], "i32")
for lane, row_lanes, capability, stores, sums in json.loads(sys.argv[1]):
    pointers = {"source_ptr": f"*{lane}", "target_ptr": f"*{lane}", "table_ptr": "*i32", "sums_ptr": "*i64"}
    build(kv_pack._move_runs, pointers | integers,
          dict(BLOCK_SIZE=16, ROW_LANES=row_lanes, TILE_LANES=kv_pack.TILE_LANES, STORES=stores, SUMS=sums),
          capability, 4)
"""
)
MOVE_CASES = [
    ("i64", 32, HOPPER, True, True),
    ("i64", 32, HOPPER, False, True),
    ("i64", 32, HOPPER, True, False),
    ("i32", 15, HOPPER, True, True),
    ("i16", 5, AMPERE, True, True),
    ("u8", 3, BLACKWELL, True, True),
]


def test_move_runs_compiles(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_MOVE, json.dumps(MOVE_CASES)],
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in built] == ["_move_runs"] * len(MOVE_CASES)
    for (_, num_bytes, shared, uses_tensor_cores), case in zip(built, MOVE_CASES, strict=True):
        assert num_bytes > 0, case
        assert shared <= MAX_SHARED_BYTES, f"{case} needs {shared} bytes of shared memory"
        assert not uses_tensor_cores, case
