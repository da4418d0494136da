"""The ranks of one group as threads of this process: gloo over loopback, an in-memory store, the leader in the calling thread.

For tests of models/ and engine/. What a rank's thread raised is in `errors`; the leader's engine loop is tests/offline.py's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.distributed import HashStore

from engine.follower import Follower, Pushes
from engine.group import Group
from engine.runner import ModelRunner, OnLayer
from models.interface import Shard
from models.load import LoadedModel, load_model
from protocol.parallel import Parallel
from tests.offline import Offline, poisoned_pool


class Ranks:
    """A context. `engine` is the leader's; runners[rank] are all ranks' runners. The other arguments go to Offline.

    change(loaded, rank): what a test does to a rank's model once it is loaded. make_on_layer(rank, runner): as Follower wants it.
    """

    def __init__(
        self,
        name: str,
        parallel: Parallel,
        *,
        block_size: int = 8,
        num_blocks: int = 256,
        timeout_s: float = 20.0,
        quantization: str = "auto",
        change: Callable[[LoadedModel, int], None] | None = None,
        make_on_layer: Callable[[int, ModelRunner], Callable[[Pushes], OnLayer]] | None = None,
        **more: Any,
    ) -> None:
        self.parallel = parallel
        self.errors: dict[int, BaseException] = {}
        self.runners: dict[int, ModelRunner] = {}
        self._quantization = quantization
        self._name, self._block_size, self._num_blocks, self._timeout_s = name, block_size, num_blocks, timeout_s
        self._change, self._make_on_layer, self._more = change, make_on_layer, more
        self._store = HashStore()
        self._threads = [threading.Thread(target=self._follow, args=(r,), daemon=True) for r in range(1, parallel.num_ranks)]

    def _load(self, rank: int) -> tuple[LoadedModel, Group | None]:
        group = None
        if self.parallel.num_ranks > 1:
            group = Group(self._store, rank, self.parallel, timeout_s=self._timeout_s)
        loaded = load_model(
            self._name, device="cpu", shard=Shard(self.parallel, rank), ranks=group, quantization=self._quantization
        )
        if self._change is not None:
            self._change(loaded, rank)
        return loaded, group

    def _follow(self, rank: int) -> None:
        try:
            loaded, group = self._load(rank)
            kv = poisoned_pool(loaded, self._block_size, self._num_blocks)
            runner = ModelRunner(loaded, kv, loaded.kv_layout(self._block_size), num_threads=1, group=group)
            self.runners[rank] = runner
            del group  # the runner's reference is the one that counts when it leaves
            Follower(runner, self._make_on_layer(rank, runner) if self._make_on_layer else None).run()
        except BaseException as error:
            self.errors[rank] = error

    def __enter__(self) -> Ranks:
        for thread in self._threads:
            thread.start()
        try:
            loaded, group = self._load(0)
            self.engine = Offline(loaded, block_size=self._block_size, num_blocks=self._num_blocks, group=group, **self._more)
        except BaseException:
            self._join()
            raise
        self.runners[0] = self.engine.runner
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.engine.runner.stop()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(self._timeout_s + 10)
            assert not thread.is_alive(), "a rank hangs"

    def kv(self, rank: int) -> torch.Tensor:
        return self.runners[rank].kv
