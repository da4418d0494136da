"""The kernels of a step on shapes of real models: what to call, what it must give, what it must read and compute at least.

Called by bench/kernels.py on a machine with a GPU. Weights and activations are random; nothing is downloaded. Inputs rotate: each
case has as many sets as it takes to be larger than the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import fused, grouped, paged_decode, paged_prefill, reference, reference_fused, reference_grouped, reference_linear
from kernels.sampling import SamplingInputs, sample
from kernels.skinny_linear import skinny_linear

ROTATED_BYTES = 256 << 20  # of inputs, together: several times any cache
MAX_SETS = 64
BLOCK_SIZE = 16
DEVICE = "cuda"  # tests run the cases, small, on a CPU in Triton's interpreter, which is wrong for bfloat16
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """One model's, of a layer."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each product."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "head": (self.vocab, self.hidden),
        }


LLAMA_8B = Shape("8B", 4096, 32, 8, 128, 14336, 128256)
QWEN_06B = Shape("0.6B", 1024, 16, 8, 128, 3072, 151936)
A3B = Shape("A3B", 2048, 32, 4, 128, 768, 151936)

# (shape, sequences, tokens of each, fp8 pool)
DECODE = [
    (LLAMA_8B, 32, 4096, False), (LLAMA_8B, 1, 1024, False), (A3B, 1, 1024, False), (A3B, 1, 4096, False),
    (LLAMA_8B, 1, 32768, False), (LLAMA_8B, 64, 1024, False), (LLAMA_8B, 256, 1024, False), (QWEN_06B, 256, 1024, False),
    (LLAMA_8B, 32, 4096, True),
]  # fmt: skip
# (shape, sequences, tokens of each chunk, tokens with the context)
PREFILL = [
    (LLAMA_8B, 1, 4096, 4096), (LLAMA_8B, 4, 1024, 1024), (LLAMA_8B, 1, 512, 4096), (LLAMA_8B, 1, 16384, 16384),
    (QWEN_06B, 1, 4096, 4096),
]  # fmt: skip
LINEAR = [LLAMA_8B, QWEN_06B]
LINEAR_ROWS = (1, 8, 64)
QUANTISED_ROWS = (1, 16, 64)
ROWS = (64, 4096)
SAMPLED = QWEN_06B
SAMPLING = [(1, 0.95), (64, 0.95), (256, 0.95), (256, 1.0)]  # rows, top_p
EXPERTS = (128, 8, A3B)  # experts, of each token, shape
EXPERT_ROWS = (1, 16, 64, 8192)
STEPS = [(LLAMA_8B, 32, (1, 64, 256), 1024), (QWEN_06B, 28, (1, 256), 1024)]  # shape, layers, batches, tokens of each sequence


@dataclass
class Case:
    """error: of the kernel's result against a reference, relative. nbytes, flops: the least that one call must move and do."""

    name: str
    calls: Sequence[Callable[[], object]]
    error: Callable[[], float]
    nbytes: float
    flops: float = 0.0
    fp8: bool = False
    tolerance: float = 1e-2
    peers: dict[str, Sequence[Callable[[], object]]] = field(default_factory=dict)


def cases(groups: Sequence[str], quick: bool, sweep: bool = False) -> Iterator[Case]:
    from bench.kernel_steps import steps

    makers = {
        "decode": decode(sweep), "prefill": prefill(), "linear": linear(), "quantised": quantised(), "rows": rows(),
        "sampling": sampling(), "experts": experts(), "step": steps(),
    }  # fmt: skip
    for group in groups:
        yield from itertools.islice(makers[group], 3 if quick else None)


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double().to(found.device)
    return float((found - wanted).norm() / wanted.norm())


def random(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype or DTYPE)


def num_sets(nbytes: float) -> int:
    return max(1, min(MAX_SETS, -(-ROTATED_BYTES // int(nbytes))))


class _Paged(NamedTuple):
    q: Tensor
    pool: Tensor
    tables: Tensor
    lens: Tensor
    scales: Tensor | None


def _paged(shape: Shape, batch: int, context: int, num_queries: int, fp8: bool) -> _Paged:
    num_blocks = batch * -(-context // BLOCK_SIZE)
    pool = random(num_blocks, 2, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    tables = torch.randperm(num_blocks, device=DEVICE).to(torch.int32).view(batch, -1)
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    q = random(batch * num_queries, shape.heads, shape.head_dim)
    scales = torch.rand(2, shape.kv_heads, device=DEVICE) + 0.5 if fp8 else None
    return _Paged(q, pool.to(torch.float8_e4m3fn) if fp8 else pool, tables, lens, scales)


def _attention_error(got: Tensor, case: _Paged, context: int, num_queries: int, shape: Shape) -> float:
    """Of the first and the last sequence, against float64 on the CPU."""
    worst = 0.0
    for row in {0, len(case.lens) - 1}:
        blocks = case.pool[case.tables[row].long()].double()  # [blocks, 2, kv_heads, BLOCK_SIZE, head_dim]
        if case.scales is not None:
            blocks *= case.scales.double()[None, :, :, None, None]
        k, v = blocks.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context].cpu()
        one = slice(row * num_queries, (row + 1) * num_queries)
        some = slice(max(0, num_queries - 64), num_queries)  # of a long chunk, its last queries
        wanted = reference.attend(case.q[one][some].double().cpu(), k, v, shape.head_dim**-0.5)
        worst = max(worst, relative(got[one][some], wanted))
    return worst


def decode(sweep: bool) -> Iterator[Case]:
    for shape, batch, context, fp8 in DECODE:
        nbytes = batch * context * 2 * shape.kv_heads * shape.head_dim * (1 if fp8 else 2)
        sets = [_paged(shape, batch, context, 1, fp8) for _ in range(num_sets(nbytes))]
        forms: list[dict[str, int]] = [{}]
        if sweep:
            forms += [{"num_stages": stages} for stages in (3, 7)]
            forms += [{"min_split_len": least, "max_splits": most} for least in (64, 128, 256, 512) for most in (8, 16, 64)]
        for form in forms:
            call = lambda one, form=form: paged_decode.paged_decode_attention(  # noqa: E731
                one.q, one.pool, one.tables, one.lens, one.q.shape[2] ** -0.5, kv_scales=one.scales, **form
            )
            calls = [lambda one=one, call=call: call(one) for one in sets]
            name = f"decode attention {shape.name} {batch} x {context}{' fp8 kv' if fp8 else ''}"
            peers = {}
            if not fp8 and not form:
                dense = [_dense(one, batch) for one in sets]
                peers["sdpa, not paged"] = [lambda one=one: F.scaled_dot_product_attention(*one, enable_gqa=True) for one in dense]
            yield Case(
                name + "".join(f" {key}={value}" for key, value in form.items()),
                calls,
                lambda calls=calls, sets=sets, context=context, shape=shape: _attention_error(
                    calls[0](), sets[0], context, 1, shape
                ),
                nbytes,
                peers=peers,
            )
        del sets


def _dense(one: _Paged, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    together = one.pool[one.tables.long()]  # [batch, blocks, 2, kv_heads, BLOCK_SIZE, head_dim]
    k, v = together.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).contiguous()
    return one.q.view(batch, 1, *one.q.shape[1:]).transpose(1, 2), k, v


def prefill() -> Iterator[Case]:
    for shape, batch, chunk, context in PREFILL:
        one = _paged(shape, batch, context, chunk, False)
        starts = torch.arange(0, (batch + 1) * chunk, chunk, dtype=torch.int32, device=DEVICE)
        call = lambda one=one, starts=starts: paged_prefill.paged_prefill_attention(  # noqa: E731
            one.q, one.pool, one.tables, starts, one.lens, one.q.shape[2] ** -0.5
        )
        pairs = batch * (chunk * (context - chunk) + chunk * (chunk + 1) / 2)
        peers: dict[str, Sequence[Callable[[], object]]] = {}
        if chunk == context:
            _, k, v = _dense(_Paged(one.q[:batch], *one[1:]), batch)
            q = one.q.view(batch, chunk, *one.q.shape[1:]).transpose(1, 2)
            for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                peers[name] = [lambda q=q, k=k, v=v, backend=backend: _sdpa(q, k, v, backend)]
        yield Case(
            f"prefill attention {shape.name} {batch} x {chunk} of {context}",
            [call],
            lambda call=call, one=one, context=context, chunk=chunk, shape=shape: _attention_error(
                call(), one, context, chunk, shape
            ),
            2.0 * one.q.nbytes + one.pool.nbytes,
            4.0 * pairs * shape.heads * shape.head_dim,
            peers=peers,
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def linear() -> Iterator[Case]:
    for shape in LINEAR:
        for name, (out, inner) in shape.matrices.items():
            weights = [random(out, inner, scale=inner**-0.5) for _ in range(num_sets(2.0 * out * inner))]
            for num_rows in LINEAR_ROWS:
                x = random(num_rows, inner)
                calls = [lambda w=w, x=x: skinny_linear(x, w) for w in weights]
                yield Case(
                    f"linear {shape.name} {name} {num_rows} x {inner} -> {out}",
                    calls,
                    lambda calls=calls, x=x, weights=weights: relative(calls[0](), x.double() @ weights[0].double().t()),
                    2.0 * (out * inner + num_rows * (out + inner)),
                    2.0 * num_rows * out * inner,
                    peers={"F.linear": [lambda w=w, x=x: F.linear(x, w) for w in weights]},
                )


def quantised() -> Iterator[Case]:
    out, inner = LINEAR[0].matrices["gate_up"]
    for kind, width in (("int8", 1.0), ("fp8", 1.0), ("int4", 0.5)):
        sets = [quantised_weight(kind, out, inner) for _ in range(num_sets(width * out * inner))]
        for num_rows in QUANTISED_ROWS:
            x = random(num_rows, inner)
            calls = [lambda made=made, x=x: skinny_linear(x, **made) for made in sets]
            plain = random(out, inner)
            yield Case(
                f"linear {kind} {LINEAR[0].name} gate_up {num_rows} rows",
                calls,
                lambda calls=calls, x=x, sets=sets: relative(
                    calls[0](), x.double() @ reference_linear.dequantized(**sets[0]).t().to(x.device)
                ),
                width * out * inner + 2.0 * num_rows * (out + inner),
                2.0 * num_rows * out * inner,
                peers={"F.linear bf16": [lambda plain=plain, x=x: F.linear(x, plain)]},
            )


def quantised_weight(kind: str, out: int, inner: int, group: int = 128) -> dict[str, Tensor]:
    if kind == "int4":
        packed = torch.randint(0, 256, (out, inner // 2), dtype=torch.uint8, device=DEVICE)
        return {"weight": packed, "scale": torch.rand(out, inner // group, device=DEVICE) / 64}
    scale = torch.rand(out, device=DEVICE) / 64
    if kind == "fp8":
        return {"weight": random(out, inner).to(torch.float8_e4m3fn), "scale": scale}
    return {"weight": torch.randint(-128, 128, (out, inner), dtype=torch.int8, device=DEVICE), "scale": scale}


def rows() -> Iterator[Case]:
    shape, eps = LINEAR[0], 1e-5
    for num_rows in ROWS:
        weight = random(shape.hidden)
        sets = [
            (random(num_rows, shape.hidden), random(num_rows, shape.hidden)) for _ in range(num_sets(4.0 * num_rows * shape.hidden))
        ]
        x, residual = sets[0]
        yield Case(
            f"add + rms norm {num_rows} x {shape.hidden}",
            [lambda x=x, r=r, w=weight: fused.add_rms_norm(x, r, w, eps) for x, r in sets],
            lambda x=x, r=residual, w=weight: relative(
                fused.add_rms_norm(x, r.clone(), w, eps)[1], reference_fused.add_rms_norm(x, r, w, eps)[1]
            ),
            2.0 * 4 * num_rows * shape.hidden,
            peers={"torch": [lambda x=x, r=r, w=weight: F.rms_norm(r.add_(x), w.shape, w, eps) for x, r in sets]},
        )
        wide = [random(num_rows, 2 * shape.inner) for _ in range(num_sets(4.0 * num_rows * shape.inner))]
        yield Case(
            f"silu * up {num_rows} x {shape.inner}",
            [lambda x=x: fused.silu_mul(x) for x in wide],
            lambda wide=wide: relative(fused.silu_mul(wide[0]), reference.silu_mul(wide[0])),
            2.0 * 3 * num_rows * shape.inner,
            peers={"torch": [lambda x=x: F.silu(x[:, : shape.inner]) * x[:, shape.inner :] for x in wide]},
        )
        yield _rotating(shape, num_rows)


def _rotating(shape: Shape, num_rows: int) -> Case:
    """q/k norm, rotation and KV write; in place, so what is timed turns on and on."""
    width = shape.matrices["qkv"][0]
    sets = [random(num_rows, width) for _ in range(num_sets(2.0 * num_rows * width))]
    pool = torch.zeros(num_rows // BLOCK_SIZE + 1, 2, shape.kv_heads, BLOCK_SIZE, shape.head_dim, dtype=DTYPE, device=DEVICE)
    slots = torch.randperm(num_rows, device=DEVICE)
    angles = torch.rand(num_rows, 1, shape.head_dim // 2, device=DEVICE)
    turn, norm = torch.polar(torch.ones_like(angles), angles), random(shape.head_dim)

    def error() -> float:
        qkv, mirror = sets[0].clone(), torch.zeros_like(pool)
        wanted = reference_fused.rotate_and_write(qkv, turn, norm, norm, 1e-6, mirror, slots.tolist(), shape.heads)
        fused.rotate_and_write(qkv, turn, norm, norm, 1e-6, pool, slots, shape.heads)
        return max(relative(qkv, wanted), relative(pool, mirror))

    return Case(
        f"norm + rotate + write kv {num_rows} rows",
        [lambda x=x: fused.rotate_and_write(x, turn, norm, norm, 1e-6, pool, slots, shape.heads) for x in sets],
        error,
        2.0 * num_rows * (2 * width + shape.head_dim),
    )


def sampling() -> Iterator[Case]:
    vocab = SAMPLED.vocab
    for num_rows, top_p in SAMPLING:
        sets = [random(num_rows, vocab, dtype=torch.float32, scale=3.0) for _ in range(num_sets(4.0 * num_rows * vocab))]
        full = lambda value, dtype=torch.float32, n=num_rows: torch.full((n,), value, dtype=dtype, device=DEVICE)  # noqa: E731
        numbers = torch.arange(num_rows, device=DEVICE)
        inputs = SamplingInputs(
            full(0.7), full(20 if top_p < 1 else 0, torch.int32), full(top_p), full(0.0), numbers, numbers, numbers
        )
        yield Case(
            f"sampling {num_rows} x {vocab}, top_p {top_p}",
            [lambda x=x, inputs=inputs: sample(x, inputs) for x in sets],
            lambda x=sets[0], inputs=inputs: sampling_error(x, inputs),
            4.0 * num_rows * vocab,
            tolerance=0.0,
        )


def sampling_error(logits: Tensor, inputs: SamplingInputs) -> float:
    """Share of the first rows whose token is not the twin's."""
    from engine.philox import uniforms
    from kernels.reference_sampling import sample_row

    count = min(16, len(logits))
    found = sample(logits, inputs)[:count].tolist()
    columns = (inputs.seeds, inputs.choices, inputs.positions)
    drawn = uniforms(*(column[:count].tolist() for column in columns))
    wrong = 0
    for row in range(count):
        wrong += found[row] != sample_row(
            logits[row].cpu().numpy(),
            float(drawn[row]),
            temperature=float(inputs.temperature[row]),
            top_k=int(inputs.top_k[row]),
            top_p=float(inputs.top_p[row]),
        )
    return wrong / count


def experts() -> Iterator[Case]:
    num, top_k, shape = EXPERTS
    gate_up, down = random(num, 2 * shape.inner, shape.hidden, scale=0.02), random(num, shape.hidden, shape.inner, scale=0.03)
    for num_rows in EXPERT_ROWS:
        x, logits = random(num_rows, shape.hidden), random(num_rows, num, dtype=torch.float32)
        distinct = len(grouped.route(logits, top_k, True)[0].unique())
        call = lambda x=x, logits=logits: grouped.mixture(x, logits, gate_up, down, top_k)  # noqa: E731
        some = slice(0, 8)
        yield Case(
            f"experts {shape.name} {num_rows} rows",
            [call],
            lambda call=call, x=x, logits=logits, some=some: relative(
                call()[some], reference_grouped.mixture(x[some], logits[some], gate_up, down, top_k)
            ),
            2.0 * distinct * 3 * shape.inner * shape.hidden,
            2.0 * num_rows * top_k * 3 * shape.inner * shape.hidden,
            tolerance=2e-2,
        )
