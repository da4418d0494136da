"""One line a step, counts that add up, and a log that outlives its file."""

from __future__ import annotations

import json

import pytest

from engine.blocks import BlockPool
from engine.step_log import StepLog, path_for


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_for_each_worker():
    assert path_for("/tmp/steps.jsonl", "decode:0").name == "steps.decode-0.jsonl"
    assert path_for("steps", "prefill:12").name == "steps.prefill-12.jsonl"


def test_counts_are_those_since_the_line_before(tmp_path):
    pool, path = BlockPool(4, 8), tmp_path / "deep" / "s.jsonl"
    log = StepLog(path, "decode-0-abc")
    blocks = pool.allocate(3)
    log.step(1.0, 0.25, [("a", 5), ("b", 1), ("a", 2)], 2, 1, pool)
    for block, name in zip(blocks, (b"x", b"y", b"z"), strict=True):
        pool.seal(block, name)
    pool.release(blocks)
    pool.allocate(2)  # one is clear, one is evicted
    log.step(1.25, 0.5, [], 0, 0, pool)
    first, second = lines(path)
    assert first["tokens"] == {"a": 7, "b": 1}
    assert (first["running"], first["waiting"], first["step"], first["step_s"]) == (2, 1, 1, 0.25)
    assert [first[f"blocks_{name}"] for name in ("allocated", "freed", "evicted", "used")] == [3, 0, 0, 3]
    assert [second[f"blocks_{name}"] for name in ("allocated", "freed", "evicted", "used")] == [2, 3, 1, 2]


def test_it_comes_back_when_its_file_was_taken_away_and_never_raises(tmp_path):
    pool, path = BlockPool(4, 8), tmp_path / "s.jsonl"
    log = StepLog(path, "prefill-0-abc")
    path.rename(tmp_path / "old.jsonl")
    for _ in range(600):
        log.step(0.0, 0.1, [], 0, 0, pool)
    assert sum(len(lines(tmp_path / name)) for name in ("old.jsonl", "s.jsonl")) == 600
    log.close()
    path.unlink()
    path.mkdir()
    log.step(0.0, 0.1, [], 0, 0, pool)


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        StepLog(tmp_path / "file" / "s.jsonl", "x")
