"""The engine alone, as a share of what the machine can do: first the machine's limits, then prefill and decode, in one process.

    tandem bench engine --shape llama-135m --threads 1
    tandem bench engine MODEL_FOLDER --quantization int8 --json engine.json --plot engine.svg

Limits: how fast a gigabyte of memory is read, and how fast large and small matrices are multiplied. Prefill: prompts of several
lengths in chunks; their floating-point operations (two per weight and token, the head once, and attention's own) per second
as a share of the 2048^3 product's. Decode: steps of several batch sizes after --context tokens, each with one token per
sequence; the time in which weights and KV could be read once, or the products be made if that is longer, as a share of the step.
No cluster, no HTTP: a runner, a block pool, and prompts of random tokens. Medians, and the range. A shape is made with random
weights, without a download; a bfloat16 copy of them lies in --scratch for as long as it runs.
"""

from __future__ import annotations

import argparse
import inspect
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import shapes
from engine.batch import Chunk
from engine.blocks import BlockPool
from engine.runner import ModelRunner
from engine.sequence import Sequence as Running
from kernels import ops
from kvtransfer.pool import KVPool
from models.config import ModelConfig
from models.load import LoadedModel, load_model
from models.sizes import kv_nbytes_per_token, num_params
from protocol.errors import TandemError
from protocol.parallel import ALONE
from protocol.request import Request, SamplingParams
from simulation import plot

READ_BYTES = 1 << 30
NUM_STEPS = 12  # of each batch size
SQUARE = 2048
FEW, MANY = 16, 512  # rows of the other two products


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model's folder or name; or --shape")
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as for serve (default: float32 on a CPU)")
    parser.add_argument("--quantization", default="none", help="as for serve (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine (default: %(default)s)")
    parser.add_argument("--prompts", type=_counts, default=[256, 1024, 4096], metavar="N[,N...]", help="prefill lengths")
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens in one step (default: %(default)s)")
    parser.add_argument("--batches", type=_counts, default=[1, 8, 16, 64], metavar="B[,B...]", help="decode batch sizes")
    parser.add_argument("--context", type=int, default=256, help="tokens before the first decode step (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="of each prefill (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="where a shape's weights lie meanwhile (default: the system's place for such)")
    parser.add_argument("--plot", type=Path, help="an SVG: shares of the limits")


def _counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: wanted whole numbers, comma-separated") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted numbers above zero")
    return found


class Range(NamedTuple):
    """Of several measurements of the same."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        return cls(statistics.median(values), min(values), max(values))


class Clock:
    """Seconds of a call: CUDA's own events where it runs on a GPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")

    def seconds(self, act: Callable[[], Any]) -> float:
        if not self._on_gpu:
            started = time.perf_counter()
            act()
            return time.perf_counter() - started
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        act()
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


def run(args: argparse.Namespace) -> dict[str, Any]:
    if (args.model is None) == (args.shape is None):
        raise SystemExit("bench engine: one of MODEL and --shape is needed")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("bench engine: --device cuda, and there is no CUDA device here, or a torch without CUDA; use --device cpu")
    if args.chunk < 1 or args.threads < 1 or args.repeats < 1:
        raise SystemExit("bench engine: --chunk, --threads and --repeats are at least 1")
    scratch = tempfile.TemporaryDirectory(dir=args.scratch) if args.shape else nullcontext()
    with scratch as folder:
        try:
            name = str(shapes.make(args.shape, Path(folder))) if folder else args.model
            loaded = load_model(name, args.dtype, args.device, **_quantized(args.quantization))
        except TandemError as error:
            raise SystemExit(f"bench engine: {error.message}") from None
        if loaded.config.family == "toy":
            raise SystemExit("bench engine: the toy has no weights to measure; name a model or a --shape")
        limits = measure_limits(args.device, [1, 2] if args.device == "cpu" else [args.threads])
        torch.set_num_threads(args.threads)
        rows = measure_engine(loaded, args)
    title = f"{args.shape or args.model}, {loaded.dtype}, {args.device}, {args.threads} thread(s), quantization {args.quantization}"
    found = with_shares(rows, limits[str(args.threads)] if str(args.threads) in limits else limits["2"], loaded, args)
    _show(title, limits, found)
    if args.plot:
        args.plot.write_text(picture(found), encoding="utf-8")
    return {"model": title, "limits": limits, **found}


def _quantized(wanted: str) -> dict[str, Any]:
    """What load_model() wants to hear of it. Raises SystemExit where this build cannot."""
    if "quantization" in inspect.signature(load_model).parameters:
        return {"quantization": wanted}
    if wanted != "none":
        raise SystemExit(f"bench engine: --quantization {wanted}: this build loads weights as they are, without quantising them")
    return {}


# ---- the machine -----------------------------------------------------------------------------------------------------


def measure_limits(device: str, threads: Sequence[int]) -> dict[str, dict[str, float]]:
    """Per number of threads: read_gb_s (10^9 bytes), and GFLOP/s of three float32 products, each in the form that is quickest (a
    plain product, F.linear, the engine's own with a packed matrix). The best of several runs: a limit is what the machine does
    when nobody disturbs it."""
    clock, found = Clock(device), {}
    data = torch.ones(READ_BYTES // 4, device=device)
    for number in threads:
        torch.set_num_threads(number)
        reads = [clock.seconds(lambda: torch.sum(data)) for _ in range(8)]
        row = {"read_gb_s": READ_BYTES / min(reads) / 1e9}
        for rows in (FEW, MANY, SQUARE):
            left, right = torch.randn(rows, SQUARE, device=device), torch.randn(SQUARE, SQUARE, device=device)
            packed = ops.pack(right)
            forms = (partial(torch.matmul, left, right), partial(F.linear, left, right), partial(ops.linear, left, packed))
            with torch.inference_mode():
                times = [clock.seconds(form) for form in forms for _ in range(5 if rows == SQUARE else 20)]
            row[f"sgemm_{rows}_gflop_s"] = 2e-9 * rows * SQUARE * SQUARE / min(times)
        found[str(number)] = row
    return found


# ---- the engine ------------------------------------------------------------------------------------------------------


class Bare:
    """A runner and a block pool, and as little around them as a step needs."""

    def __init__(self, loaded: LoadedModel, block_size: int, num_blocks: int, threads: int) -> None:
        self.layout = loaded.kv_layout(block_size)
        self.kv = KVPool(self.layout, num_blocks, str(loaded.device))
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=False)
        self.runner = ModelRunner(loaded, self.kv.tensor, self.layout, threads)
        self._vocab = loaded.config.vocab_size

    def sequence(self, length: int, room: int, seed: int) -> Running:
        rng = random.Random(seed)
        request = Request(
            request_id=f"bench-{seed}",
            model="",
            prompt_token_ids=tuple(rng.randrange(10, self._vocab) for _ in range(length)),
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
        )
        made = Running(request)
        made.blocks = self.pool.allocate(self.layout.num_blocks_for(length + room))
        return made

    def prefill(self, sequence: Running, chunk: int) -> None:
        while sequence.num_uncomputed and not sequence.output_len:
            number = min(chunk, sequence.num_uncomputed)
            is_last = number == sequence.num_uncomputed
            self._apply([Chunk(sequence, number, (sequence,) if is_last else ())])

    def decode(self, sequences: Sequence[Running]) -> None:
        self._apply([Chunk(sequence, 1, (sequence,)) for sequence in sequences])

    def release(self, sequences: Sequence[Running]) -> None:
        for sequence in sequences:
            self.pool.release(sequence.forget_blocks())

    def _apply(self, chunks: list[Chunk]) -> None:
        result = self.runner.run(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        for sample in result.samples:
            if sample.error is not None:
                raise SystemExit(f"bench engine: {sample.error}")
            sample.sequence.append(sample.token)


def measure_engine(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, dict[str, Range]]:
    """prefill[length]: seconds of the whole prompt. decode[batch]: seconds of a step."""
    longest = loaded.config.max_position_embeddings
    prompts = [length for length in args.prompts if length + 1 <= longest]
    for length in set(args.prompts) - set(prompts):
        print(f"a prompt of {length} tokens is left out: the model reads {longest}")
    tokens = max([*(length + 1 for length in prompts), *(batch * (args.context + NUM_STEPS + 3) for batch in args.batches)])
    num_blocks = -(-tokens // args.block_size) + 2 * max(args.batches)
    bare = Bare(loaded, args.block_size, num_blocks, args.threads)
    clock = Clock(args.device)
    try:
        found: dict[str, dict[str, Range]] = {"prefill": {}, "decode": {}}
        for length in prompts:
            times = []
            for repeat in range(args.repeats + 1):  # the first one warms caches and lazy libraries up
                sequence = bare.sequence(length, 1, repeat)
                seconds = clock.seconds(lambda sequence=sequence: bare.prefill(sequence, args.chunk))
                bare.release([sequence])
                times.append(seconds)
            found["prefill"][str(length)] = Range.of(times[1:])
        for batch in args.batches:
            sequences = [bare.sequence(args.context, NUM_STEPS + 3, 100 + i) for i in range(batch)]
            for sequence in sequences:
                bare.prefill(sequence, args.chunk)
            times = [clock.seconds(lambda sequences=sequences: bare.decode(sequences)) for _ in range(NUM_STEPS + 2)]
            bare.release(sequences)
            found["decode"][str(batch)] = Range.of(times[2:])
        return found
    finally:
        bare.kv.close()


# ---- shares ----------------------------------------------------------------------------------------------------------


def weight_nbytes(loaded: LoadedModel, quantization: str) -> float:
    """Of the weights that one decode step reads: all but the rows of an embedding that is not the head's. Group scales are not
    counted, so that a share errs on the low side."""
    bits = {"int8": 8, "int4": 4}.get(quantization, 8 * loaded.dtype.itemsize)
    return matrix_params(loaded.config) * bits / 8


def matrix_params(config: ModelConfig) -> int:
    """Weights that each token is multiplied by, the head included."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return num_params(config, ALONE, 0) - embedding


def attention_flops(config: ModelConfig, num_tokens: int) -> float:
    """Scores and weighted values of a causal prompt: 4 * head_dim per head and pair of tokens."""
    pairs = sum(_pairs(num_tokens, config.window(layer)) for layer in range(config.num_layers))
    return 4.0 * config.num_heads * config.head_dim * pairs


def _pairs(num_tokens: int, window: int | None) -> int:
    if window is None or window >= num_tokens:
        return num_tokens * (num_tokens + 1) // 2
    return window * (window + 1) // 2 + (num_tokens - window) * window


def with_shares(
    rows: dict[str, dict[str, Range]], limits: dict[str, float], loaded: LoadedModel, args: argparse.Namespace
) -> dict[str, Any]:
    """Figures for people, and the share of the limit that the median reaches."""
    config = loaded.config
    params, head = matrix_params(config), config.vocab_size * config.hidden_size
    kv = kv_nbytes_per_token(config, ALONE, 0, loaded.dtype.itemsize)
    prefill, decode = [], []
    for text, seconds in rows["prefill"].items():
        length = int(text)
        flops = 2.0 * (params - head) * length + 2.0 * head + attention_flops(config, length)
        prefill.append({
            "prompt_len": length, "seconds": seconds._asdict(), "tokens_per_s": length / seconds.median,
            "gflop_s": flops / seconds.median / 1e9, "share": flops / seconds.median / 1e9 / limits[f"sgemm_{SQUARE}_gflop_s"],
        })  # fmt: skip
    for text, seconds in rows["decode"].items():
        batch = int(text)
        nbytes = weight_nbytes(loaded, args.quantization) + batch * (args.context + NUM_STEPS / 2) * kv
        reading = nbytes / limits["read_gb_s"] / 1e9
        computing = 2.0 * params * batch / limits[f"sgemm_{FEW if batch <= FEW else MANY}_gflop_s"] / 1e9
        decode.append({
            "batch": batch, "step_s": seconds._asdict(), "tokens_per_s": batch / seconds.median,
            "read_gb_s": nbytes / seconds.median / 1e9, "share_of_read": reading / seconds.median,
            "share_of_products": computing / seconds.median, "share": max(reading, computing) / seconds.median,
        })  # fmt: skip
    return {"prefill": prefill, "decode": decode}


def _show(title: str, limits: dict[str, dict[str, float]], found: dict[str, Any]) -> None:
    print(title)
    print(f"\n{'threads':>8} {'read GB/s':>10} " + " ".join(f"{f'{rows} rows':>10}" for rows in (FEW, MANY, SQUARE)) + "   GFLOP/s")
    for threads, row in limits.items():
        print(f"{threads:>8} " + " ".join(f"{value:10.1f}" for value in row.values()))
    print(f"\n{'prompt':>8} {'tok/s':>9} {'seconds':>9} {'min':>8} {'max':>8} {'GFLOP/s':>9} {'of limit':>9}")
    for row in found["prefill"]:
        s = row["seconds"]
        print(f"{row['prompt_len']:8d} {row['tokens_per_s']:9.1f} {s['median']:9.3f} {s['least']:8.3f} {s['most']:8.3f} "
              f"{row['gflop_s']:9.1f} {row['share']:9.0%}")  # fmt: skip
    print(f"\n{'batch':>8} {'tok/s':>9} {'step ms':>9} {'min':>8} {'max':>8} {'GB/s':>9} {'of limit':>9}")
    for row in found["decode"]:
        s = row["step_s"]
        print(f"{row['batch']:8d} {row['tokens_per_s']:9.1f} {1e3 * s['median']:9.1f} {1e3 * s['least']:8.1f} "
              f"{1e3 * s['most']:8.1f} {row['read_gb_s']:9.1f} {row['share']:9.0%}")  # fmt: skip


def picture(found: dict[str, Any]) -> str:
    """Both halves as shares of their limits."""
    prefill = [(float(row["prompt_len"]), 100 * row["share"]) for row in found["prefill"]]
    reads = [(float(row["batch"]), 100 * row["share_of_read"]) for row in found["decode"]]
    products = [(float(row["batch"]), 100 * row["share_of_products"]) for row in found["decode"]]
    speed = [(float(row["batch"]), row["tokens_per_s"]) for row in found["decode"]]
    panels = [
        ("Prefill", plot.panel([plot.Curve("of the 2048^3 product", prefill)], "prompt tokens", "% of limit")),
        ("Decode step", plot.panel([plot.Curve("reading", reads), plot.Curve("products", products)], "batch", "% of limit")),
        ("Decode", plot.panel([plot.Curve("tokens/s", speed)], "batch", "tokens/s")),
    ]
    return plot.page(panels, ["prefill / reading / tokens", "products"])
