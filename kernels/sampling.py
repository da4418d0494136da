"""From logits to tokens on the device, in Triton: what engine/sampler.py does, without the host hearing of it.

Called by `kernels/cuda_ops.py` for tensors on a GPU (it needs triton); the slow obvious twin is reference_sampling.py. Order and
meaning are the sampler's: bias (a minimum length is a bias of -inf on the stop tokens), repetition, frequency and presence
penalties, temperature, min_p, top_k, top_p (ties with the last token inside are inside), then the inverse CDF, in vocabulary
order, of one counter-based uniform (Philox4x32-10, the bits of engine/philox.py). No log-probabilities.

One program per row. No sort: a token's weight exp((logit - best) / temperature) is at most 1, so its bits order it, and the least
weight that is still inside is found bit by bit from counts and sums over the row (three bits a pass). Sums are of weights in fixed
point, 2**-40 fine: integers have one sum whatever the order, so a row's token depends on nothing but the row. A weight below 2**-41
of the best token's is zero; over 150,000 tokens that is less than 1e-7 of the mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

IN_PROMPT = 1 << 30  # of an entry of `counts`: the prompt holds this token; the rest counts it in the output
TILE = 2048
UNIT = tl.constexpr(2.0**40)  # a weight of 1 in fixed point
PROMPT_BIT = tl.constexpr(IN_PROMPT)
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingInputs:
    """One entry for each row, on the device; fixed addresses, so a captured graph reads new values.

    temperature float32, 0 for greedy; top_k int32, 0 for all; top_p, min_p float32; seeds int64 (64 bits, whatever the sign);
    choices, positions int64: the Philox counter. repetition, frequency, presence float32 with counts int32 [num_slots, vocab] and
    slots int64, the row of counts: how often the output holds each token, plus IN_PROMPT. bias_ids int32 [rows, width], negative
    for none and distinct within a row, with bias float32 of that shape.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    choices: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    repetition: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def sample(logits: torch.Tensor, inputs: SamplingInputs, *, stream: int = 0, counts_output: bool = True) -> torch.Tensor:
    """One token per row of logits, float32 [rows, vocab_size], contiguous -> int64 [rows]; -1 where a row's best is not finite.

    Bias and penalties are written into logits. counts_output: add each token to its row of counts. Waits for nothing.
    """
    rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32, f"logits must be float32, not {logits.dtype}"
    assert logits.is_contiguous(), "logits must be contiguous"
    _check(inputs, rows, vocab_size)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    if inputs.bias_ids is not None:
        width = inputs.bias_ids.shape[1]
        _add_bias[(rows,)](
            logits, inputs.bias_ids, inputs.bias, width, VOCAB=vocab_size, TILE=triton.next_power_of_2(width), num_warps=1
        )
    penalised = inputs.counts is not None
    _sample[(rows,)](
        logits,
        tokens,
        inputs.temperature,
        inputs.top_k,
        inputs.top_p,
        inputs.min_p,
        inputs.seeds,
        inputs.choices,
        inputs.positions,
        inputs.counts if penalised else tokens,
        inputs.slots if penalised else tokens,
        inputs.repetition if penalised else logits,
        inputs.frequency if penalised else logits,
        inputs.presence if penalised else logits,
        VOCAB=vocab_size,
        STREAM=stream,
        PENALISED=penalised,
        COUNTS_OUTPUT=penalised and counts_output,
        TILE=min(TILE, triton.next_power_of_2(vocab_size)),
        num_warps=8,
    )
    return tokens


def _check(inputs: SamplingInputs, rows: int, vocab_size: int) -> None:
    kinds = {
        torch.float32: ("temperature", "top_p", "min_p", "repetition", "frequency", "presence"),
        torch.int32: ("top_k",),
        torch.int64: ("seeds", "choices", "positions", "slots"),
    }
    for dtype, names in kinds.items():
        for name in names:
            tensor = getattr(inputs, name)
            assert (tensor is None) == (inputs.counts is None and name in ("repetition", "frequency", "presence", "slots")), (
                f"{name} and counts go together"
            )
            assert tensor is None or (tensor.shape == (rows,) and tensor.dtype == dtype), f"{name} must be {dtype} [{rows}]"
            assert tensor is None or tensor.is_contiguous(), f"{name} must be contiguous"
    if inputs.counts is not None:
        assert inputs.counts.dtype == torch.int32, "counts must be int32"
        assert inputs.counts.shape[1] == vocab_size, f"counts are of {inputs.counts.shape[1]} tokens, logits of {vocab_size}"
        assert inputs.counts.is_contiguous(), "counts must be contiguous"
    assert (inputs.bias_ids is None) == (inputs.bias is None), "bias_ids and bias go together"
    if inputs.bias_ids is not None and inputs.bias is not None:
        assert inputs.bias_ids.shape == inputs.bias.shape, "bias_ids and bias differ in shape"
        assert inputs.bias_ids.shape[0] == rows, "bias has another number of rows"
        assert inputs.bias_ids.dtype == torch.int32, "bias_ids must be int32"
        assert inputs.bias.dtype == torch.float32, "bias must be float32"
        assert inputs.bias_ids.is_contiguous(), "bias_ids must be contiguous"
        assert inputs.bias.is_contiguous(), "bias must be contiguous"


@triton.jit(do_not_specialize=["width"])
def _add_bias(logits_ptr, ids_ptr, bias_ptr, width, VOCAB: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """grid (rows,)"""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    token = tl.load(ids_ptr + row * width + place, mask=place < width, other=-1)
    is_token = (token >= 0) & (token < VOCAB)
    at = logits_ptr + row * VOCAB + token
    bias = tl.load(bias_ptr + row * width + place, mask=is_token, other=0.0)
    tl.store(at, tl.load(at, mask=is_token, other=0.0) + bias, mask=is_token)


@triton.jit
def _sample(  # type: ignore[no-untyped-def]
    logits_ptr,  # [rows, VOCAB] float32
    tokens_ptr,  # [rows] int64
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    choices_ptr,
    positions_ptr,
    counts_ptr,  # [num_slots, VOCAB] int32 where PENALISED, and so the four after it
    slots_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    VOCAB: tl.constexpr,
    STREAM: tl.constexpr,
    PENALISED: tl.constexpr,
    COUNTS_OUTPUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """grid (rows,)"""
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * VOCAB
    if PENALISED:
        counts_at = counts_ptr + tl.load(slots_ptr + row) * VOCAB
        repetition = tl.load(repetition_ptr + row)
        frequency = tl.load(frequency_ptr + row)
        presence = tl.load(presence_ptr + row)
    lane = tl.arange(0, TILE)
    best_value = tl.full([TILE], float("-inf"), tl.float32)
    best_token = tl.full([TILE], VOCAB, tl.int32)
    is_bad = tl.zeros([TILE], tl.int32)
    for start in range(0, VOCAB, TILE):
        token = start + lane
        is_token = token < VOCAB
        x = tl.load(at + token, mask=is_token, other=float("-inf"))
        if PENALISED:
            entry = tl.load(counts_at + token, mask=is_token, other=0)
            times = entry & (PROMPT_BIT - 1)
            x = tl.where(entry != 0, tl.where(x > 0, x / repetition, x * repetition), x)
            x = tl.where(times > 0, x - (frequency * times.to(tl.float32) + presence), x)
            tl.store(at + token, x, mask=is_token)
        is_bad = is_bad | (x != x).to(tl.int32)
        is_better = x > best_value  # of equals in a lane the first stays
        best_value = tl.where(is_better, x, best_value)
        best_token = tl.where(is_better, token, best_token)
    best = tl.max(best_value, 0)
    chosen = tl.min(tl.where(best_value == best, best_token, VOCAB), 0).to(tl.int64)
    is_finite = (tl.max(is_bad, 0) == 0) & (best > float("-inf")) & (best < float("inf"))
    temperature = tl.load(temperature_ptr + row)
    if is_finite & (temperature > 0):
        if PENALISED:
            tl.debug_barrier()  # the logits just written are read again, by other threads maybe
        factor = LOG2_E / tl.maximum(temperature, 1e-6)
        least = _bits(tl.load(min_p_ptr + row))
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < VOCAB):
            least = _threshold(at, best, factor, least, top_k.to(tl.int64), False, VOCAB, TILE)
        total = _mass(at, best, factor, least, VOCAB, TILE)
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            goal = (total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
            least = _threshold(at, best, factor, least, tl.maximum(goal, 1), True, VOCAB, TILE)
            total = _mass(at, best, factor, least, VOCAB, TILE)
        uniform = _random_bits(tl.load(seeds_ptr + row), tl.load(choices_ptr + row), tl.load(positions_ptr + row), STREAM)
        target = tl.umulhi(uniform, total.to(tl.uint64)).to(tl.int64)  # floor(uniform in [0, 1) * total)
        chosen = _inverse(at, best, factor, least, target, VOCAB, TILE)
    chosen = tl.where(is_finite, chosen, -1)
    tl.store(tokens_ptr + row, chosen)
    if COUNTS_OUTPUT:
        tl.debug_barrier()
        if is_finite:
            tl.store(counts_at + chosen, tl.load(counts_at + chosen) + 1)


@triton.jit
def _bits(weight):  # type: ignore[no-untyped-def]
    """A number that orders non-negative floats as they are."""
    return weight.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _weights(at, best, factor, start, VOCAB: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(bits of the weights, weights in fixed point) of a tile of tokens; behind the vocabulary -1 and 0."""
    token = start + tl.arange(0, TILE)
    x = tl.load(at + token, mask=token < VOCAB, other=float("-inf"))
    weight = tl.exp2((x - best) * factor)
    return tl.where(token < VOCAB, _bits(weight), -1), (weight * UNIT).to(tl.int64)


@triton.jit
def _mass(at, best, factor, least, VOCAB: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of the weights that are inside, in fixed point."""
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, VOCAB, TILE):
        bits, fixed = _weights(at, best, factor, start, VOCAB, TILE)
        total += tl.where(bits >= least, fixed, 0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(at, best, factor, least, goal, SUMS: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest bits that still have the goal inside: so many tokens, or SUMS: so much mass; `least` if nothing larger does.

    Ten passes of eight candidates each; what is inside shrinks as the bits grow, so those that hold are the first ones.
    """
    low = tl.full([], 0, tl.int32)
    for step in range(0, 10):
        shift = 27 - 3 * step
        candidate = tl.maximum(low + (tl.arange(0, 8) << shift), least)  # [8]; 0 of them is what is known to hold
        inside = tl.zeros([8], tl.int64)
        for start in range(0, VOCAB, TILE):
            bits, fixed = _weights(at, best, factor, start, VOCAB, TILE)
            value = fixed if SUMS else tl.full([TILE], 1, tl.int64)
            inside += tl.sum(tl.where(bits[None, :] >= candidate[:, None], value[None, :], 0), 1)
        num_hold = tl.sum((inside >= goal).to(tl.int32), 0)
        low += tl.maximum(num_hold - 1, 0) << shift
    return tl.maximum(low, least)


@triton.jit
def _inverse(at, best, factor, least, target, VOCAB: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token, in vocabulary order, with which the running sum exceeds the target."""
    before = tl.full([], 0, tl.int64)
    chosen = tl.full([], VOCAB - 1, tl.int64)
    for start in range(0, VOCAB, TILE):
        bits, fixed = _weights(at, best, factor, start, VOCAB, TILE)
        fixed = tl.where(bits >= least, fixed, 0)
        mass = tl.sum(fixed, 0)
        if (before <= target) & (before + mass > target):
            passed = (before + tl.cumsum(fixed, 0)) > target
            chosen = start + tl.sum((~passed).to(tl.int64), 0)
        before += mass
    return chosen


@triton.jit
def _random_bits(seed, choice, position, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """53 random bits at the upper end of 64: Philox4x32-10 (Salmon et al., SC 2011), as in engine/philox.py."""
    k0, k1 = seed.to(tl.uint64, bitcast=True) & 0xFFFFFFFF, seed.to(tl.uint64, bitcast=True) >> 32
    c0, c1 = position.to(tl.uint64) & 0xFFFFFFFF, choice.to(tl.uint64) & 0xFFFFFFFF
    c2, c3 = (seed * 0 + STREAM).to(tl.uint64), (seed * 0).to(tl.uint64)
    for number in tl.static_range(10):
        if number > 0:
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
    return (((c0 << 32) | c1) >> 11) << 11
