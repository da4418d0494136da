"""How one worker spreads over ranks: tensor ranks share each layer's heads, pipeline stages share the layers.

Pure integers, used by models/ (what to load), kvtransfer/ (who writes to whom) and cluster/ (how many processes). Rank r of a
worker is tensor rank r % tp_size of stage r // tp_size, so rank 0, the leader, is in the first stage.
"""

from __future__ import annotations

import msgspec


class Parallel(msgspec.Struct, frozen=True):
    """The sizes of one worker's group."""

    tp_size: int = 1
    pp_size: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    def rank(self, tp_rank: int, pp_rank: int) -> int:
        assert 0 <= tp_rank < self.tp_size, (self, tp_rank)
        assert 0 <= pp_rank < self.pp_size, (self, pp_rank)
        return pp_rank * self.tp_size + tp_rank

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp_size

    def pp_rank(self, rank: int) -> int:
        return rank // self.tp_size

    def __str__(self) -> str:
        return f"{self.tp_size} x {self.pp_size} (tp x pp)"


ALONE = Parallel()


def part(total: int, size: int, index: int) -> range:
    """The share of `index` when `total` things are dealt to `size` takers in order; the first ones get one more where it is
    uneven.
    """
    assert 0 <= index < size, f"{index} of {size}"
    quotient, rest = divmod(total, size)
    start = index * quotient + min(index, rest)
    return range(start, start + quotient + (index < rest))


def layers_of(num_layers: int, parallel: Parallel, pp_rank: int) -> range:
    return part(num_layers, parallel.pp_size, pp_rank)


def heads_of(num_kv_heads: int, parallel: Parallel, tp_rank: int) -> range:
    """The KV heads on one tensor rank. With fewer heads than ranks each head lies on several ranks."""
    if num_kv_heads >= parallel.tp_size:
        return part(num_kv_heads, parallel.tp_size, tp_rank)
    assert parallel.tp_size % num_kv_heads == 0, f"{num_kv_heads} heads cannot be copied evenly to {parallel.tp_size} ranks"
    head = tp_rank * num_kv_heads // parallel.tp_size
    return range(head, head + 1)
