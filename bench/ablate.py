"""What each idea buys: the same load on servers that do without one of them, one server after the other.

    tandem bench ablate --json ablate.json --plot ablate.svg
    tandem bench ablate --only "all,no chunking" --requests 40

Every row is a real server (`tandem serve`, Ray and all) on the cores that are there, set up by the options shown with it. Load:
open loop, Poisson arrivals and lengths drawn by --seed, the same requests for every row; half of the prompts begin with one of four
shared beginnings of 192 tokens. The model has random weights of a small Llama's shape (30 million parameters), its KV pool is
small, so that memory is scarce. A promise of --slo is what goodput counts; latencies count from when a request was due.

    all                      continuous batching, paged KV, chunked prefill, prefix cache, prefill apart from decode, admission
    no continuous batching   decode takes nobody in until the whole batch is over            decode.without=continuous-batching
    no paging                a sequence holds blocks for the longest answer from its start   decode.without=paging
    no chunking              a prompt is computed in one step, whole                         --no-enable-chunked-prefill and budgets
    no prefix cache          equal beginnings are computed again                             --no-enable-prefix-caching
    no disaggregation        one worker with all cores prefills and decodes, in chunks       --prefill 0
    neither of the two       the same without chunks: prompts hold up everybody's tokens
    no admission             at --overload times the rate, beside `all` at that rate         scheduler.admission=false
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import load, shapes, summary
from bench.client import Client, Sample
from bench.observing import _server
from bench.summary import Promise
from bench.traces import Arrival
from simulation import plot

MAX_LEN = 1024
BLOCK_SIZE = 16
NUM_BLOCKS = 448  # seven sequences of MAX_LEN, or some twenty of this load
STEM_LEN, NUM_STEMS = 192, 4
PROMPT, OUTPUT = load.Lengths(64, 448), load.Lengths(16, 128)
WHOLE = ("--set", f"prefill.max_num_batched_tokens={MAX_LEN}", "--set", f"decode.max_num_batched_tokens={MAX_LEN}")
CHUNKS = ("--set", "prefill.max_num_batched_tokens=256", "--set", "decode.max_num_batched_tokens=128")
SAMPLE_S = 0.5  # between two looks at the KV pool


class Row(NamedTuple):
    """One server. overloaded: at the higher rate."""

    name: str
    options: tuple[str, ...]
    overloaded: bool = False


ROWS = (
    Row("all", CHUNKS),
    Row("no continuous batching", (*CHUNKS, "--set", "decode.without=continuous-batching")),
    Row("no paging", (*CHUNKS, "--set", "decode.without=paging")),
    Row("no chunking", (*WHOLE, "--no-enable-chunked-prefill")),
    Row("no prefix cache", (*CHUNKS, "--no-enable-prefix-caching")),
    Row("no disaggregation", (*CHUNKS, "--prefill", "0")),
    Row("neither of the two", (*WHOLE, "--no-enable-chunked-prefill", "--prefill", "0")),
    Row("all, overloaded", CHUNKS, True),
    Row("no admission", (*CHUNKS, "--set", "scheduler.admission=false"), True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=60, help="of each row (default: %(default)s)")
    parser.add_argument("--overload", type=float, default=3.0, metavar="X", help="times the rate (default: %(default)s)")
    parser.add_argument(
        "--slo", default="ttft=2,tpot=0.1", help="the promise, and what the scheduler goes by (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="rows by name, comma-separated")
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="small", help="of the model (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="an SVG: distributions of TTFT and of gaps between tokens")


def run(args: argparse.Namespace) -> dict[str, Any]:
    try:
        promise = Promise.parse(args.slo)
    except ValueError as error:
        raise SystemExit(f"bench ablate: --slo {error}") from None
    if promise.ttft is None or promise.tpot is None:
        raise SystemExit("bench ablate: --slo wants both, as in ttft=2,tpot=0.1")
    if not (args.rate > 0 and args.requests > 0 and args.overload > 1):
        raise SystemExit("bench ablate: --rate and --requests are above 0, --overload is above 1")
    wanted = args.only.split(",") if args.only else [row.name for row in ROWS]
    unknown = set(wanted) - {row.name for row in ROWS}
    if unknown:
        raise SystemExit(f"bench ablate: --only {', '.join(sorted(unknown))}: there are {', '.join(row.name for row in ROWS)}")
    found: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = shapes.make(args.shape, Path(folder), with_tokenizer=True)
        for row in ROWS:
            if row.name in wanted:
                found[row.name] = _measure(row, model, promise, args)
                print(f"{row.name}: {time.monotonic() - started:.0f} s", flush=True)
    rows = [(name, one["figures"]) for name, one in found.items()]
    print(f"\n{_load_in_words(args)}\n\n{table(rows)}")
    if args.plot:
        args.plot.write_text(picture(found), encoding="utf-8")
    return {"load": _load_in_words(args), "slo": args.slo, "seed": args.seed, "rows": found}


def _load_in_words(args: argparse.Namespace) -> str:
    return (
        f"{args.requests} requests a row, Poisson {args.rate:g}/s ({args.overload * args.rate:g}/s where overloaded), prompts "
        f"{PROMPT.low}-{PROMPT.high} tokens, half of them behind one of {NUM_STEMS} shared beginnings of {STEM_LEN}, answers "
        f"{OUTPUT.low}-{OUTPUT.high} tokens, seed {args.seed}; model {args.shape}, {NUM_BLOCKS} blocks of {BLOCK_SIZE} tokens, "
        f"promise {args.slo}"
    )


def arrivals_of(rate: float, number: int, seed: int) -> list[Arrival]:
    """The load: the same lengths and the same order at any rate, and gaps that scale with it."""
    rng = random.Random(f"ablate {seed}")
    found = load.synthetic(number, 1.0, 1.0, 1, PROMPT, OUTPUT, [], rng)
    out = []
    for arrival in load.faster(found, rate):
        if rng.random() < 0.5:
            stem = (rng.randrange(NUM_STEMS),)
            arrival = arrival._replace(prompt_tokens=arrival.prompt_tokens + STEM_LEN, prefix=stem, block=STEM_LEN)
        out.append(arrival)
    return out


# ---- one row ---------------------------------------------------------------------------------------------------------


def _measure(row: Row, model: Path, promise: Promise, args: argparse.Namespace) -> dict[str, Any]:
    slo = (f"scheduler.ttft_target_s={promise.ttft}", f"scheduler.tpot_target_s={promise.tpot}")
    options = [
        "--served-model-name", "m", "--max-model-len", str(MAX_LEN), "--block-size", str(BLOCK_SIZE),
        "--num-gpu-blocks-override", str(NUM_BLOCKS), *(part for one in slo for part in ("--set", one)), *row.options,
    ]  # fmt: skip
    rate = args.rate * (args.overload if row.overloaded else 1.0)
    with _server(Path(__file__).resolve().parents[1], str(model), options) as server:
        asyncio.run(_load(server.url, arrivals_of(4.0, 8, args.seed + 1), args.seed + 1))  # warms it up, with other prompts
        samples, seconds, waste, used = asyncio.run(_watched(server.url, arrivals_of(rate, args.requests, args.seed), args.seed))
    figures = summary.summarize(samples, promise, seconds)
    figures |= {"kv_waste": waste, "kv_used": used, "cached_share": _cached_share(samples)}
    gaps = [1000 * gap for sample in samples for gap in sample.gaps]
    return {
        "options": list(row.options),
        "figures": figures,
        "ttft_s": sorted(sample.ttft for sample in samples if sample.ttft is not None),
        "itl_ms": sorted(gaps),
    }


def _cached_share(samples: Sequence[Sample]) -> float:
    prompts = sum(sample.prompt_tokens for sample in samples)
    return sum(sample.cached_tokens for sample in samples) / prompts if prompts else 0.0


async def _load(url: str, arrivals: Sequence[Arrival], seed: int) -> tuple[list[Sample], float]:
    client = Client(url, {}, timeout_s=300.0)
    client.origin = time.perf_counter()

    async def one(index: int, arrival: Arrival) -> Sample:
        prompt = load.prompt_tokens(arrival, index, seed, 2000)
        await asyncio.sleep(max(0.0, arrival.at_s - client.now()))
        body = {"model": "m", "prompt": prompt, "temperature": 0.0, "max_tokens": arrival.output_tokens, "ignore_eos": True}
        return await client.complete(Sample("", arrival.at_s), body)

    samples = await asyncio.gather(*(one(index, arrival) for index, arrival in enumerate(arrivals)))
    return list(samples), client.now()


async def _watched(url: str, arrivals: Sequence[Arrival], seed: int) -> tuple[list[Sample], float, float, float]:
    """The load, and meanwhile the decode pool: (mean share of its used slots that hold no token, mean share of it in use)."""
    seen: list[tuple[float, float]] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            with contextlib.suppress(OSError):
                look = await asyncio.to_thread(_pool, url)
                if look is not None:
                    seen.append(look)

    watching = asyncio.create_task(watch())
    try:
        samples, seconds = await _load(url, arrivals, seed)
    finally:
        watching.cancel()
    waste = [unused / used for unused, used in seen if used]
    used = [used / (NUM_BLOCKS * BLOCK_SIZE) for _, used in seen]
    return samples, seconds, statistics.mean(waste) if waste else 0.0, statistics.mean(used) if used else 0.0


def _pool(url: str) -> tuple[float, float] | None:
    """(slots without a token, slots of used blocks) of the decode worker, as /metrics has them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        text = answer.read().decode()

    def value(name: str) -> float | None:
        found = re.search(rf'^{name}\{{[^}}]*role="decode"[^}}]*\}} (\S+)$', text, re.M)
        return float(found.group(1)) if found else None

    unused, used = value("tandem_worker_unused_kv_slots"), value("tandem_worker_used_blocks")
    return None if unused is None or used is None else (unused, used * BLOCK_SIZE)


# ---- for people ------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("ok", "completed", "d", 1.0), ("refused", "refused", "d", 1.0), ("failed", "failed", "d", 1.0),
    ("out tok/s", "output_throughput", ".1f", 1.0), ("good/s", "request_goodput", ".2f", 1.0),
    ("TTFT p50 ms", "median_ttft_ms", ".0f", 1.0), ("TTFT p99 ms", "p99_ttft_ms", ".0f", 1.0),
    ("ITL p50 ms", "median_itl_ms", ".1f", 1.0), ("ITL p99 ms", "p99_itl_ms", ".0f", 1.0),
    ("KV waste %", "kv_waste", ".1f", 100.0), ("KV used %", "kv_used", ".0f", 100.0), ("cached %", "cached_share", ".0f", 100.0),
)  # fmt: skip


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown, a line per server."""
    head = ["| |" + "|".join(f" {name} " for name, *_ in COLUMNS) + "|", "|---|" + "--:|" * len(COLUMNS)]
    lines = []
    for label, row in rows:
        cells = [
            "-" if row[key] is None else format(row[key] * times if times != 1 else row[key], how) for _, key, how, times in COLUMNS
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*head, *lines])


def picture(found: dict[str, dict[str, Any]]) -> str:
    """Distributions: steady rows above, overloaded ones below."""
    panels, labels = [], list(found)
    for key, name, unit in (("ttft_s", "Time to first token", "s"), ("itl_ms", "Between two tokens", "ms")):
        for overloaded in (False, True):
            chosen = {row.name for row in ROWS if row.overloaded is overloaded}
            curves = [plot.Curve(label, _cdf(one[key]) if label in chosen else []) for label, one in found.items()]
            panels.append((f"{name}{', overloaded' if overloaded else ''}", plot.panel(curves, unit, "share", 1.0)))
    return plot.page(panels, labels)


def _cdf(values: Sequence[float]) -> list[tuple[float, float]]:
    """At most two hundred points of it."""
    stride = max(1, len(values) // 200)
    return [(value, (i + 1) / len(values)) for i, value in enumerate(values) if i % stride == 0 or i == len(values) - 1]
