"""`--step-log`: one line of JSON for each step of a worker, for those who ask why a step took as long as it did.

A file for each worker, opened to append, so that the lives of one worker follow each other in it. Written by the workers after each
step; costs a few ten microseconds, and the file grows until somebody takes it away (it is reopened when it is gone).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from engine.blocks import BlockPool

log = logging.getLogger(__name__)


def path_for(given: str, worker: str) -> Path:
    """`steps.jsonl` of worker decode:0 -> `steps.decode-0.jsonl`."""
    path = Path(given).expanduser()
    return path.with_name(f"{path.stem}.{worker.replace(':', '-')}{path.suffix or '.jsonl'}")


class StepLog:
    """Raises OSError at once when the file cannot be opened; later only the log hears of it."""

    def __init__(self, path: Path, incarnation: str) -> None:
        self.path = path
        self.incarnation = incarnation
        self.num_steps = 0
        self._file: TextIO | None = self._open()
        self._inode = os.fstat(self._file.fileno()).st_ino
        self._before = (0, 0, 0)

    def step(
        self,
        began_at: float,
        seconds: float,
        tokens: Iterable[tuple[str, int]],
        num_running: int,
        num_waiting: int,
        pool: BlockPool,
        more: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """tokens: of each request in this step, as (request_id, number). began_at: seconds of the worker's own clock. more: what
        only this kind of worker has to tell, by name."""
        counts = (pool.num_allocated, pool.num_freed, pool.num_evicted)
        allocated, freed, evicted = (now - before for now, before in zip(counts, self._before, strict=True))
        self._before = counts
        self.num_steps += 1
        of: dict[str, int] = {}
        for request_id, number in tokens:
            of[request_id] = of.get(request_id, 0) + number
        self._write(
            {
                "worker": self.incarnation,
                "step": self.num_steps,
                "at_s": round(began_at, 6),
                "step_s": round(seconds, 6),
                "tokens": of,
                "running": num_running,
                "waiting": num_waiting,
                "blocks_allocated": allocated,
                "blocks_freed": freed,
                "blocks_evicted": evicted,
                "blocks_used": pool.num_used,
                "blocks_free": pool.num_free,
                **more,
            }
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("a", encoding="utf-8", buffering=1)  # a line at a time: a killed worker loses at most its last

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            if self.num_steps % 256 == 0 and not self._is_there():
                self.close()
            if self._file is None:
                self._file = self._open()
                self._inode = os.fstat(self._file.fileno()).st_ino
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:  # a full disk must not end a step
            log.warning("the step log %s: %s", self.path, error)

    def _is_there(self) -> bool:
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False
