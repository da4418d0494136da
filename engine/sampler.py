"""From logits to tokens, all rows of a step at once. Greedy rows without extras cost one maximum and nothing else.

Order, as in vLLM: min_tokens mask, logit_bias, repetition / frequency / presence penalties, temperature, min_p, top_k,
top_p; then the inverse CDF, in vocabulary order, of one counter-based uniform per row. Log-probabilities are those of the
model's own distribution, before all of that. Called by engine/runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import msgspec
import torch
from torch import Tensor

from engine.philox import uniforms
from engine.sequence import Ahead, Sequence, TokenCounts
from protocol.events import TokenLogprobs

NUM_CANDIDATES = 1024  # top_p looks at so many first; a row whose nucleus is wider is sorted as a whole
NOT_FINITE = "the model's logits for this sequence are not finite numbers; its KV or the weights are damaged"


Sampled = Sequence | Ahead


class Sample(msgspec.Struct, frozen=True):
    """error: why this sequence got no token; then token is -1, and its request fails alone (truth rule R11)."""

    sequence: Sampled
    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def sample(logits: Tensor, sequences: SequenceOf[Sampled]) -> list[Sample]:
    """One token for each sequence from its row of logits, float32 [rows, vocab_size]; logits are left as they are."""
    best, tokens = logits.max(dim=-1)
    are_simple = [sequence.is_simple for sequence in sequences]
    if all(are_simple) and bool(torch.isfinite(best).all()):
        return list(map(Sample, sequences, tokens.tolist()))
    if not all(_is_plain(sequence) for sequence in sequences):
        tokens = _choose(logits, tokens, sequences)
    finite = torch.isfinite(best).tolist()  # a NaN anywhere in the row is its maximum
    chosen = tokens.tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(chosen)
    for row, sequence in enumerate(sequences):
        count = sequence.request.sampling.logprobs
        if count is not None and finite[row]:
            logprobs[row] = score(logits[row : row + 1], [chosen[row]], count)[0]
    return [
        Sample(sequence, token, logprob) if ok else Sample(sequence, -1, None, NOT_FINITE)
        for sequence, token, logprob, ok in zip(sequences, chosen, logprobs, finite, strict=True)
    ]


def score(logits: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprobs]:
    """What the model thinks of these tokens, one per row: logprob, rank, and the num_top best.

    A token's own logprob and its value in the list come from the same subtraction, so they are equal to the bit.
    """
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logits > own).sum(dim=-1) + 1).tolist()
    values = (own - lse)[:, 0].tolist()
    if not num_top:
        return [TokenLogprobs(*entry) for entry in zip(tokens, values, ranks, strict=True)]
    top_values, top_tokens = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    top_values -= lse
    result = []
    for row, (token, value, rank) in enumerate(zip(tokens, values, ranks, strict=True)):
        pairs = zip(top_tokens[row].tolist(), top_values[row].tolist(), strict=True)
        result.append(TokenLogprobs(token, value, rank, tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))))
    return result


def _is_plain(sequence: Sampled) -> bool:
    """Greedy, and nothing changes the logits."""
    sampling = sequence.request.sampling
    return (
        sampling.temperature == 0.0
        and not sampling.logit_bias
        and not sampling.has_penalties
        and sequence.output_len >= sampling.min_tokens
    )


def _choose(logits: Tensor, greedy: Tensor, sequences: SequenceOf[Sampled]) -> Tensor:
    """Tokens of rows of which at least one is not plain."""
    odd = [row for row, sequence in enumerate(sequences) if not _is_plain(sequence)]
    some = logits[torch.tensor(odd, device=logits.device)]  # a copy, changed in place below
    for row, index in enumerate(odd):
        _adjust(some[row], sequences[index])
    tokens = some.argmax(dim=-1)
    drawn = [row for row, index in enumerate(odd) if sequences[index].request.sampling.temperature > 0.0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _draw(some[rows], [sequences[odd[row]] for row in drawn])
    result = greedy.clone()
    result[torch.tensor(odd, device=logits.device)] = tokens
    return result


def _adjust(row: Tensor, sequence: Sampled) -> None:
    """min_tokens, logit_bias and penalties of one sequence, in place on its logits [vocab_size]."""
    request, sampling = sequence.request, sequence.request.sampling
    device = row.device
    if sequence.output_len < sampling.min_tokens:
        stops = {*(sampling.stop_token_ids or ()), *(() if sampling.ignore_eos else request.eos_token_ids)}
        row[torch.tensor([token for token in stops if token < len(row)], dtype=torch.int64, device=device)] = -torch.inf
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=device)
        row[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=device)
    if not sampling.has_penalties:
        return
    counts = sequence.token_counts
    if counts is None or counts.num_counted > sequence.output_len:
        counts = sequence.token_counts = TokenCounts(request.prompt_token_ids)
    counts.update(sequence.output_token_ids)
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(list(counts.prompt.keys() | counts.output.keys()), device=device)
        values = row[ids]
        penalty = sampling.repetition_penalty
        row[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if counts.output:
        ids = torch.tensor(list(counts.output), device=device)
        times = torch.tensor(list(counts.output.values()), dtype=row.dtype, device=device)
        row[ids] -= sampling.frequency_penalty * times + sampling.presence_penalty


def _draw(logits: Tensor, sequences: SequenceOf[Sampled]) -> Tensor:
    """Inverse CDF of one uniform per row. logits [rows, vocab_size] is overwritten."""
    params = [sequence.request.sampling for sequence in sequences]
    device = logits.device

    def column(values: SequenceOf[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # Subtracting the maximum first keeps a tiny temperature from making infinities.
    logits -= logits.amax(dim=-1, keepdim=True)
    logits /= column([max(p.temperature, 1e-6) for p in params])
    weights = logits.exp_()  # of the best token: 1
    if any(p.min_p > 0.0 for p in params):
        weights.masked_fill_(weights < column([p.min_p for p in params]), 0.0)
    limits = [p.top_k if 0 < p.top_k < weights.shape[-1] else 0 for p in params]
    if any(limits):
        best = weights.topk(max(limits), dim=-1).values
        ranks = torch.tensor([max(limit - 1, 0) for limit in limits], device=device)[:, None]
        least = best.gather(1, ranks).masked_fill(column(limits) == 0, 0.0)
        weights.masked_fill_(weights < least, 0.0)
    if any(p.top_p < 1.0 for p in params):
        weights.masked_fill_(weights < _nucleus(weights, column([p.top_p for p in params])), 0.0)
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    seeds = [p.seed or 0 for p in params]
    drawn = uniforms(seeds, [s.choice for s in sequences], [len(s) for s in sequences])
    target = torch.from_numpy(drawn).to(device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """The least weight inside the nucleus of each row, [rows, 1]; tokens that tie with it are inside.

    The nucleus: most likely tokens until their sum reaches top_p; the token that crosses the line belongs to it.
    """
    goal = weights.sum(dim=-1, keepdim=True, dtype=torch.float64) * top_p.double()
    num = min(NUM_CANDIDATES, weights.shape[-1])
    least, open_ended = _crossing(weights.topk(num, dim=-1).values, goal)
    wide = torch.nonzero(open_ended & (top_p[:, 0] < 1.0))[:, 0]
    if num < weights.shape[-1] and len(wide):
        least[wide] = _crossing(weights[wide].sort(dim=-1, descending=True).values, goal[wide])[0]
    return least.masked_fill(top_p >= 1.0, 0.0)


def _crossing(ordered: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """(weight at which the running sum of each descending row reaches its goal, whether it never does)."""
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    inside = (before < goal).sum(dim=-1, keepdim=True)
    least = ordered.gather(1, (inside - 1).clamp_(min=0))
    reached = before[:, -1] + ordered[:, -1] >= goal[:, 0]
    return least, ~reached
