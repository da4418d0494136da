"""One engine step: chunks in, KV written, tokens out. It decides nothing and changes no Sequence.

Called by the loops of prefill/worker.py and decode/worker.py, which apply the result to their sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as SequenceOf

import torch
from torch import Tensor

from engine.batch import Chunk
from engine.sequence import Sequence
from engine.stats import StepStats
from models.load import LoadedModel
from protocol.events import TokenLogprobs
from protocol.kv import KVLayout

import msgspec


class Sample(msgspec.Struct, frozen=True):
    """error: why this sequence got no token (its logits are not finite); then token is -1 and its request fails alone (R11)."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class StepResult(msgspec.Struct, frozen=True):
    """prompt_logprobs[request_id]: the entries of the prompt positions that this step scored; over all chunks of a prompt
    they add up to prompt_len entries, the first of them None."""

    samples: list[Sample]
    prompt_logprobs: dict[str, list[TokenLogprobs | None]]
    stats: StepStats


class ModelRunner:
    def __init__(self, loaded: LoadedModel, kv: Tensor, layout: KVLayout, num_threads: int | None = None) -> None: ...

    def run(self, chunks: SequenceOf[Chunk], on_layer: Callable[[int], None] | None = None) -> StepResult: ...

    def copy_block(self, source: int, target: int) -> None: ...
