"""One choice of one request inside an engine: its tokens, its blocks, and how much of it has been computed.

State and derived numbers only. What happens to it is decided by the planners of prefill/ and decode/ and done by their
workers; the runner never changes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine.hashing import extend_hashes
from protocol.request import Request, SamplingParams

if TYPE_CHECKING:
    from engine.batch import Chunk


def is_simple(sampling: SamplingParams) -> bool:
    """Greedy, nothing changes the logits, and nobody wants to see them."""
    return (
        sampling.temperature == 0.0
        and not sampling.logit_bias
        and not sampling.has_penalties
        and not sampling.min_tokens
        and sampling.logprobs is None
    )


class TokenCounts:
    """Which tokens the prompt and the output of a sequence hold, brought up to date step by step."""

    __slots__ = ("prompt", "output", "num_counted")

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.prompt = dict.fromkeys(prompt_token_ids, 0)
        self.output: dict[int, int] = {}
        self.num_counted = 0  # output tokens

    def update(self, output_token_ids: list[int]) -> None:
        for token in output_token_ids[self.num_counted :]:
            self.output[token] = self.output.get(token, 0) + 1
        self.num_counted = len(output_token_ids)

    def copy(self) -> TokenCounts:
        """To count on from here without touching this one; the prompt, which no longer changes, is shared."""
        other = TokenCounts(())
        other.prompt, other.output, other.num_counted = self.prompt, dict(self.output), self.num_counted
        return other


class Sequence:
    """token_ids: prompt + output. blocks[i] holds the KV of tokens [i*block_size, (i+1)*block_size).

    num_computed: tokens whose KV is in the blocks. A running sequence has exactly one uncomputed token, the newest.
    output_token_ids: what was delivered before a resumption.
    """

    __slots__ = (
        "request", "choice", "token_ids", "blocks", "num_computed", "block_hashes", "token_counts",
        "is_simple", "enders", "max_len", "chunk",
    )  # fmt: skip

    def __init__(self, request: Request, choice: int = 0, output_token_ids: Iterable[int] = ()) -> None:
        self.request = request
        self.choice = choice
        self.token_ids: list[int] = [*request.prompt_token_ids, *output_token_ids]
        self.blocks: list[int] = []
        self.num_computed = 0
        self.block_hashes: list[bytes] = []
        self.token_counts: TokenCounts | None = None  # the sampler's, where penalties ask for it
        sampling = request.sampling
        self.is_simple = is_simple(sampling)
        # No other token, and no lesser length, can end it (engine/stopping.py says whether one does).
        self.enders = frozenset(() if sampling.ignore_eos else request.eos_token_ids).union(sampling.stop_token_ids or ())
        self.max_len = self.prompt_len + sampling.max_tokens if sampling.max_tokens is not None else sys.maxsize
        self.chunk: Chunk | None = None  # the decode worker's: the one that computes its newest token, the same at every step

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, choice={self.choice}, {self.num_computed}/{len(self.token_ids)} computed, "
            f"prompt_len={self.prompt_len}, blocks={self.blocks})"
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def key(self) -> tuple[str, int]:
        """(request_id, choice): unique among the sequences of a worker."""
        return self.request.request_id, self.choice

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_len(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        """A copy."""
        return self.token_ids[self.prompt_len :]

    @property
    def last_token(self) -> int:
        return self.token_ids[-1]

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Everything but the newest token is computed, and that token was sampled."""
        return self.num_uncomputed == 1 and self.output_len > 0

    def num_blocks_for(self, num_tokens: int, block_size: int) -> int:
        """How many blocks are missing before num_tokens tokens of this sequence have a place."""
        return max(0, -(-num_tokens // block_size) - len(self.blocks))

    def num_full_blocks(self, block_size: int) -> int:
        """Blocks whose every token is computed: these can be sealed."""
        return self.num_computed // block_size

    def last_block_is_full(self, block_size: int) -> bool:
        """The blocks have no place for one more token."""
        return len(self.token_ids) > len(self.blocks) * block_size

    def extend_hashes(self, block_size: int, salt: bytes) -> None:
        """Bring block_hashes up to date with token_ids. Cheap when nothing is new."""
        extend_hashes(self.block_hashes, self.token_ids, block_size, salt)

    def append(self, token: int) -> None:
        self.token_ids.append(token)

    def fork(self, choice: int) -> Sequence:
        """A sibling that shares every block with this one; the caller takes the references (BlockPool.share)."""
        sibling = Sequence(self.request, choice)
        sibling.token_ids = list(self.token_ids)
        sibling.blocks = list(self.blocks)
        sibling.num_computed = self.num_computed
        sibling.block_hashes = list(self.block_hashes)
        return sibling

    def forget_blocks(self) -> list[int]:
        """For preemption: nothing is computed any more. Returns the blocks, whose references the caller releases."""
        blocks, self.blocks, self.num_computed = self.blocks, [], 0
        return blocks


class Ahead:
    """A sequence as if the first tokens of a draft had been sampled: what the sampler asks of a sequence, nothing more.

    Never kept: it is right for the step it was made for.
    """

    __slots__ = ("sequence", "draft", "token_counts")

    def __init__(self, sequence: Sequence, draft: tuple[int, ...]) -> None:
        assert draft, "nothing is ahead"
        self.sequence = sequence
        self.draft = draft
        self.token_counts = sequence.token_counts.copy() if sequence.token_counts is not None else None

    def __len__(self) -> int:
        return len(self.sequence) + len(self.draft)

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def choice(self) -> int:
        return self.sequence.choice

    @property
    def is_simple(self) -> bool:
        return self.sequence.is_simple

    @property
    def output_len(self) -> int:
        return self.sequence.output_len + len(self.draft)

    @property
    def output_token_ids(self) -> list[int]:
        return [*self.sequence.output_token_ids, *self.draft]
