"""Memory while a prompt of 32k tokens is prefilled in chunks: what the first chunks needed is what the last ones need.

The pool is a shared mapping (RssShmem), so what is looked at, the process's own memory (RssAnon), is all the rest.
"""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest

from bench import shapes

PROMPT_LEN, CHUNK_LEN = 32_768 - 64, 512
WARM = 6  # chunks; by then torch, oneDNN and the allocator have what they keep
BOUND = 32 << 20


def own_nbytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


def prefill(folder: str, results: Any) -> None:
    """In a process of its own, whose memory is this prompt's alone."""
    import torch

    from bench.engine import Bare
    from engine.batch import Chunk
    from models.load import load_model

    torch.set_num_threads(1)
    bare = Bare(load_model(folder, device="cpu"), block_size=32, num_blocks=PROMPT_LEN // 32 + 2, threads=1)
    sequence = bare.sequence(PROMPT_LEN, 1, seed=0)
    seen: list[int] = []
    while sequence.num_uncomputed:
        number = min(CHUNK_LEN, sequence.num_uncomputed)
        bare.runner.run([Chunk(sequence, number)])
        sequence.num_computed += number
        seen.append(own_nbytes())
    results.put(seen)


@pytest.mark.more
def test_memory_stays_flat_while_a_long_prompt_is_prefilled(tmp_path: Path) -> None:
    folder = shapes.make("tiny", tmp_path)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=prefill, args=(str(folder), results))
    child.start()
    seen = results.get(timeout=280)
    child.join(20)
    assert len(seen) == -(-PROMPT_LEN // CHUNK_LEN)
    growth = max(seen[WARM:]) - seen[WARM - 1]
    print(f"after {WARM} chunks {seen[WARM - 1] >> 20} MiB, at most {max(seen) >> 20} MiB, at the end {seen[-1] >> 20} MiB")
    assert growth <= BOUND, f"{growth >> 20} MiB more than after the first {WARM} chunks"
