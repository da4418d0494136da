"""Sampling on the device against its twin and against the engine's sampler: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from engine import sampler
from engine.philox import uniforms
from engine.sequence import Sequence
from kernels.reference_sampling import sample_row
from kernels.sampling import IN_PROMPT, SamplingInputs, _random_bits, sample
from protocol.request import Request, SamplingParams
from tests.kernels.poisoned import DEVICE

VOCAB = 301


def logits_of(rows: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


def inputs_of(rows: int, **given: object) -> SamplingInputs:
    """Scalars or lists for every row; tensors as they are."""
    values: dict = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "choices": 0, "seeds": 5, **given}
    values.setdefault("positions", list(range(rows)))
    kinds = {"top_k": torch.int32, "seeds": torch.int64, "choices": torch.int64, "positions": torch.int64, "slots": torch.int64}
    made = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=kinds.get(name, torch.float32))
        made[name] = value.to(DEVICE)
    return SamplingInputs(**made)


def twin(logits: torch.Tensor, inputs: SamplingInputs, **more: object) -> list[int]:
    drawn = uniforms(inputs.seeds.tolist(), inputs.choices.tolist(), inputs.positions.tolist())
    return [
        sample_row(
            logits[row].cpu().numpy(),
            float(drawn[row]),
            temperature=float(inputs.temperature[row]),
            top_k=int(inputs.top_k[row]),
            top_p=float(inputs.top_p[row]),
            min_p=float(inputs.min_p[row]),
            **more,
        )
        for row in range(len(logits))
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": VOCAB},
        {"top_k": VOCAB - 1},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.7},
        {"temperature": 1e-9},
    ],
    ids=str,
)
def test_tokens_of_the_twin(settings: dict) -> None:
    rows = 8
    logits, inputs = logits_of(rows), inputs_of(rows, **settings)
    before = logits.clone()
    assert sample(logits, inputs).tolist() == twin(logits, inputs)
    assert torch.equal(logits, before), "nothing changes the logits, so they are left alone"


def test_every_row_has_its_own_settings() -> None:
    rows = 12
    inputs = inputs_of(
        rows,
        temperature=[0.0, 0.5, 1.0, 2.0] * 3,
        top_k=[0, 3, 0, 50] * 3,
        top_p=[1.0, 1.0, 0.7, 0.95] * 3,
        seeds=[3, -1, 2**62, 17] * 3,
        choices=[0, 1, 2] * 4,
        positions=[5, 2**32 - 1, 77] * 4,
    )
    logits = logits_of(rows, 1000)
    unsigned = [seed % 2**64 for seed in inputs.seeds.tolist()]
    drawn = uniforms(unsigned, inputs.choices.tolist(), inputs.positions.tolist())
    expected = [
        sample_row(
            logits[row].cpu().numpy(),
            float(drawn[row]),
            temperature=float(inputs.temperature[row]),
            top_k=int(inputs.top_k[row]),
            top_p=float(inputs.top_p[row]),
        )
        for row in range(rows)
    ]
    assert sample(logits, inputs).tolist() == expected


def test_a_row_alone_draws_the_same_token() -> None:
    logits, inputs = logits_of(6, 500), inputs_of(6, top_p=0.9)
    together = sample(logits, inputs)
    for row in range(6):
        alone = inputs_of(1, top_p=0.9, positions=[row])
        assert sample(logits[row : row + 1].contiguous(), alone).tolist() == [int(together[row])]


def test_ties_with_the_last_token_inside_are_inside() -> None:
    """Four tokens share the second place of two: all of them can be drawn, the rest cannot."""
    row = torch.full((64,), -3.0)
    row[[5, 20, 33, 50]], row[40] = 2.0, 3.0
    logits = row.repeat(40, 1).to(DEVICE)
    inputs = inputs_of(40, top_k=2)
    found = sample(logits, inputs)
    assert set(found.tolist()) == {5, 20, 33, 40, 50}
    assert found.tolist() == twin(logits, inputs)


def test_greedy_takes_the_first_of_equals() -> None:
    row = torch.zeros(5000)
    row[[4, 3000, 4999]] = 1.0
    assert sample(row[None].to(DEVICE), inputs_of(1, temperature=0.0)).tolist() == [4]


def test_shares_are_the_probabilities() -> None:
    """300 draws from four tokens."""
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    logits = torch.tensor(np.log(weights), dtype=torch.float32).repeat(300, 1).to(DEVICE)
    found = np.bincount(sample(logits, inputs_of(300)).cpu().numpy(), minlength=4) / 300
    assert np.abs(found - weights).max() < 0.11  # four standard deviations


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gets_no_token(value: float, temperature: float) -> None:
    logits = logits_of(3)
    logits[1, 77] = value
    found = sample(logits, inputs_of(3, temperature=temperature)).tolist()
    assert found[1] == -1
    assert min(found[0], found[2]) >= 0
    assert sample(torch.full((1, 9), float("-inf"), device=DEVICE), inputs_of(1)).tolist() == [-1]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = logits_of(10, 50)
    logits[:, ::2] = float("-inf")
    assert all(token % 2 for token in sample(logits, inputs_of(10, temperature=5.0)).tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_and_bias(temperature: float) -> None:
    rows, slots = 8, [3, 0, 9, 1, 2, 4, 8, 7]
    generator = np.random.default_rng(4)
    counts = np.where(generator.random((10, VOCAB)) < 0.2, generator.integers(1, 4, (10, VOCAB)), 0)
    counts += np.where(generator.random((10, VOCAB)) < 0.2, IN_PROMPT, 0)
    on_device = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    bias_ids = torch.full((rows, 3), -1, dtype=torch.int32)
    bias = torch.zeros(rows, 3)
    bias_ids[:, 0], bias[:, 0] = torch.arange(rows, dtype=torch.int32), 4.0
    bias_ids[::2, 1], bias[::2, 1] = 17, float("-inf")
    logits = logits_of(rows)
    inputs = inputs_of(
        rows, temperature=temperature, counts=on_device, slots=slots, repetition=1.3, frequency=0.4, presence=0.2,
        bias_ids=bias_ids, bias=bias,
    )  # fmt: skip
    drawn = uniforms(inputs.seeds.tolist(), inputs.choices.tolist(), inputs.positions.tolist())
    expected = [
        sample_row(
            logits[row].cpu().numpy(),
            float(drawn[row]),
            temperature=temperature,
            counts=counts[slots[row]],
            penalties=(float(np.float32(1.3)), float(np.float32(0.4)), float(np.float32(0.2))),
            bias={row: 4.0} | ({17: -np.inf} if row % 2 == 0 else {}),
        )
        for row in range(rows)
    ]
    found = sample(logits, inputs).tolist()
    assert found == expected
    after = counts.copy()
    for row, token in enumerate(found):
        after[slots[row], token] += 1
    assert np.array_equal(on_device.cpu().numpy(), after), "each token is counted in its own row and nothing else is"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
        {"temperature": 1.2},
        {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.1, "top_p": 0.95},
    ],
    ids=str,
)
def test_tokens_of_the_engines_sampler(params: dict) -> None:
    rows = 6
    logits = logits_of(rows, seed=3)
    prompt, output = (3, 4, 9, 4), [9, 200, 9]
    sequences = []
    for row in range(rows):
        sampling = SamplingParams(seed=1000 + row, **params)
        request = Request(request_id=f"{row}", model="", prompt_token_ids=prompt, sampling=sampling)
        sequences.append(Sequence(request, 0, output))
    expected = [found.token for found in sampler.sample(logits.cpu(), sequences)]
    counts = torch.zeros(rows, VOCAB, dtype=torch.int32, device=DEVICE)
    counts[:, 9], counts[:, 200] = 2, 1
    counts[:, list(set(prompt))] += IN_PROMPT
    p = sequences[0].request.sampling
    inputs = inputs_of(
        rows, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, counts=counts, slots=list(range(rows)),
        repetition=p.repetition_penalty, frequency=p.frequency_penalty, presence=p.presence_penalty,
        seeds=[1000 + row for row in range(rows)], positions=[len(prompt) + len(output)] * rows,
    )  # fmt: skip
    assert sample(logits, inputs).tolist() == expected


def test_the_bits_of_philox() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def draw(seeds_ptr, choices_ptr, positions_ptr, out_ptr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0)
        bits = _random_bits(tl.load(seeds_ptr + row), tl.load(choices_ptr + row), tl.load(positions_ptr + row), 2)
        tl.store(out_ptr + row, bits.to(tl.int64, bitcast=True))

    generator = np.random.default_rng(1)
    seeds = [0, 2**64 - 1, *(int(seed) for seed in generator.integers(0, 2**63, 20))]
    choices, positions = generator.integers(0, 2**32, (2, len(seeds))).tolist()
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], device=DEVICE)
    out = torch.zeros(len(seeds), dtype=torch.int64, device=DEVICE)
    draw[(len(seeds),)](signed, torch.tensor(choices, device=DEVICE), torch.tensor(positions, device=DEVICE), out)
    found = [(value % 2**64 >> 11) * 2.0**-53 for value in out.tolist()]
    assert found == uniforms(seeds, choices, positions, stream=2).tolist()


def test_no_rows_and_wrong_arguments() -> None:
    assert sample(logits_of(0), inputs_of(0)).shape == (0,)
    with pytest.raises(AssertionError, match="top_k must be torch.int32"):
        sample(logits_of(2), inputs_of(2, top_k=torch.zeros(2)))


@pytest.mark.gpu
def test_a_large_vocabulary_on_a_gpu() -> None:
    logits = logits_of(32, 151_936)
    inputs = inputs_of(32, top_k=[0, 20] * 16, top_p=[0.95, 1.0, 0.8, 0.99] * 8)
    assert sample(logits, inputs).tolist() == twin(logits, inputs)
