"""KV on its way: each transfer crosses its sender's link, its receiver's, and what they all share, if they share something.

A link serves first come, first served at its full rate, which moves as many bytes as fair sharing would and needs no event for it.
Layers travel while later ones are computed, so a transfer may begin with its prefill and cannot end before it.
"""

from __future__ import annotations


class Link:
    __slots__ = ("bytes_per_s", "free_at", "nbytes")

    def __init__(self, gbps: float) -> None:
        self.bytes_per_s = gbps * 1e9 / 8
        self.free_at = 0.0
        self.nbytes = 0  # carried so far


def send(path: tuple[Link, ...], nbytes: int, begun_at: float, computed_at: float, fixed_s: float, num_layers: int) -> float:
    """When the last byte has landed. begun_at, computed_at: first and last layer of the prompt's KV are there."""
    done = computed_at
    for link in path:
        took = nbytes / link.bytes_per_s
        link.free_at = max(link.free_at, begun_at) + took
        link.nbytes += nbytes
        done = max(done, link.free_at, computed_at + took / num_layers)
    return done + fixed_s
