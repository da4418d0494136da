"""Sequences, their hashes, and when they stop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.hashing import block_hashes, extend_hashes
from engine.sequence import Sequence
from engine.stopping import finish_reason
from protocol.request import Request, SamplingParams


def make(prompt: tuple[int, ...] = (5, 6, 7), output: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    request = Request(request_id="r", model="m", prompt_token_ids=prompt, sampling=params, eos_token_ids=(2, 3))
    return Sequence(request, 0, output)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 7))
def test_hashes_grow_as_if_computed_at_once(tokens: list[int], more: list[int], block_size: int) -> None:
    hashes = block_hashes(tokens, block_size, b"salt")
    assert len(hashes) == len(tokens) // block_size
    extend_hashes(hashes, tokens + more, block_size, b"salt")
    assert hashes == block_hashes(tokens + more, block_size, b"salt")


def test_a_hash_depends_on_everything_before_it() -> None:
    plain = block_hashes([1, 2, 3, 4], 2, b"")
    assert block_hashes([9, 2, 3, 4], 2, b"")[1] != plain[1]
    assert block_hashes([1, 2, 3, 4], 2, b"salt")[0] != plain[0]
    assert block_hashes([1, 2, 3, 5], 2, b"")[0] == plain[0]
    assert block_hashes([1, 2, 3, 4], 4, b"")[0] not in plain


def test_derived_numbers() -> None:
    sequence = make(output=(8,))
    assert (sequence.prompt_len, sequence.output_len, len(sequence), sequence.num_uncomputed) == (3, 1, 4, 4)
    assert not sequence.is_decoding
    sequence.num_computed = 3
    assert sequence.is_decoding
    sequence.blocks = [4, 9]
    assert sequence.num_blocks_for(5, 2) == 1
    assert not sequence.last_block_is_full(2)
    sequence.append(9)
    assert sequence.last_block_is_full(2)
    assert sequence.num_full_blocks(2) == 1
    assert sequence.forget_blocks() == [4, 9]
    assert (sequence.num_computed, sequence.blocks) == (0, [])
    assert "r" in repr(sequence)


def test_a_fork_is_independent() -> None:
    first = make()
    first.blocks, first.num_computed = [4, 9], 3
    second = first.fork(1)
    second.append(5)
    second.blocks.append(7)
    assert (first.token_ids, first.blocks, second.key) == ([5, 6, 7], [4, 9], ("r", 1))
    assert second.num_computed == 3


@pytest.mark.parametrize(
    ("output", "sampling", "expected"),
    [
        ((8,), {}, None),
        ((8, 2), {}, ("stop", None)),
        ((8, 2), {"ignore_eos": True}, None),
        ((8, 3), {"stop_token_ids": (3,), "ignore_eos": True}, ("stop", 3)),
        ((2,), {"min_tokens": 2}, None),
        ((8, 2), {"min_tokens": 2}, ("stop", None)),
        ((8, 9), {"max_tokens": 2}, ("length", None)),
        ((8, 2), {"max_tokens": 2}, ("stop", None)),
        ((8, 9), {"max_tokens": None}, None),
        ((8,) * 7, {"max_tokens": None}, ("length", None)),
        ((8,) * 7, {"max_tokens": None, "min_tokens": 9}, ("length", None)),
        ((), {}, None),
    ],
)
def test_finish_reason(output: tuple[int, ...], sampling: dict[str, Any], expected: tuple[str, int | None] | None) -> None:
    assert finish_reason(make(output=output, **sampling), max_model_len=10) == expected
