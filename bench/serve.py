"""Load on any OpenAI-compatible server, open loop (a rate or a trace) or closed loop (so many at once), against a promise.

    tandem bench serve --url http://127.0.0.1:8000 --rate 1,2,4 --slo ttft=1,tpot=0.1 --html report.html
    tandem bench serve --trace azure2023_conv.csv.gz --scale 0.1 --speed 2 --requests 200
    tandem bench serve --concurrency 8 --requests 64 --prompt-tokens 512 --output-tokens 64

Traces: Azure CSV, Mooncake JSONL (shared prefixes stay shared), ServeGen CSV, VTC CSV, CSV of lengths alone (with --rate);
.gz too. A list after --rate, --speed or --concurrency is a sweep. Prompts are random token ids by a seed, outputs run to
their full length. In open loop a latency counts from the moment a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from bench import load, report, summary
from bench.client import Client, Sample
from bench.load import Lengths
from bench.summary import Promise
from bench.traces import FORMATS, Arrival, TraceError, read_trace

QUIET_S = 2.0  # what is over sooner shows no bar


class Run(NamedTuple):
    """One point of a sweep."""

    label: str
    offered: float  # requests per second that were meant to come; 0 in closed loop
    concurrency: int  # 0 in open loop
    duration_s: float
    samples: list[Sample]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument("--url", default="http://127.0.0.1:8000", help="the server's root (default: %(default)s)")
    where.add_argument("--model", help="default: the first that the server names")
    where.add_argument("--api-key", default=os.environ.get("TANDEM_API_KEY", ""), help="bearer token (default: $TANDEM_API_KEY)")
    where.add_argument("--tenant-key", action="append", default=[], metavar="NAME=KEY", help="the bearer token of one tenant")
    what = parser.add_argument_group("what is sent")
    what.add_argument("--trace", type=Path, help=f"a file of arrivals: {', '.join(FORMATS)}")
    what.add_argument(
        "--rate", type=_numbers, metavar="R[,R...]", help="requests per second, Poisson unless --cv or --burst say otherwise"
    )
    what.add_argument(
        "--concurrency", type=_counts, metavar="C[,C...]", help="closed loop: so many at once, each answer begets the next"
    )
    what.add_argument("--requests", type=int, help="how many (default: 100, or the whole trace)")
    what.add_argument("--speed", type=_numbers, default=[1.0], metavar="X[,X...]", help="a trace's arrivals, so many times as fast")
    what.add_argument(
        "--cv", type=float, default=1.0, help="of the gaps between arrivals: 1 Poisson, 0 even, above 1 bursty (gamma)"
    )
    what.add_argument("--burst", type=int, default=1, help="so many requests arrive at once")
    what.add_argument("--prompt-tokens", type=_lengths, default=Lengths(256, 256), metavar="N|LOW:HIGH")
    what.add_argument("--output-tokens", type=_lengths, default=Lengths(64, 64), metavar="N|LOW:HIGH")
    what.add_argument("--scale", type=float, default=1.0, help="a trace's lengths times this, for a smaller model")
    what.add_argument("--max-prompt", type=int, default=1 << 20, help="longer prompts are cut")
    what.add_argument("--max-output", type=int, default=1 << 20, help="longer answers are cut")
    what.add_argument("--vocab", type=int, default=2000, help="prompt token ids are below this (default: %(default)s)")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request (default: %(default)s)")
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "--slo", type=_promise, default=Promise(), metavar="ttft=S,tpot=S", help="the promise; goodput counts against it"
    )
    out.add_argument("--html", type=Path, help="write a report with plots here, one file that needs nothing else")


def _told(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the sentence of an ArgumentTypeError alone."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _positive(text: str, kind: type) -> list[Any]:
    numbers = [kind(part) for part in text.split(",")]
    if not all(number > 0 for number in numbers):
        raise ValueError(f"{text}: wanted numbers above zero")
    return numbers


_numbers = _told(lambda text: _positive(text, float))
_counts = _told(lambda text: _positive(text, int))
_lengths = _told(Lengths.parse)
_promise = _told(Promise.parse)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every point of the sweep, the table, the report. -> what goes into the JSON file."""
    if args.rate and args.concurrency:
        raise SystemExit("either --rate or --concurrency: a loop is open or closed")
    try:
        keys = dict(pair.split("=", 1) for pair in args.tenant_key)
        client = Client(args.url, keys, args.api_key, args.timeout)
        model = args.model or asyncio.run(client.get("/v1/models"))["data"][0]["id"]
        plans = list(_plans(args, list(keys)))
    except (OSError, ValueError, TraceError) as error:
        raise SystemExit(f"bench serve: {error}") from None
    runs = []
    for label, offered, concurrency, arrivals in plans:
        runs.append(asyncio.run(_run(client, model, args, label, offered, concurrency, arrivals)))
    rows = [(one.label, summary.summarize(one.samples, args.slo, one.duration_s)) for one in runs]
    tenants = [summary.by_tenant(one.samples, args.slo, one.duration_s) for one in runs]
    print(summary.table(rows), flush=True)
    for one, parts in zip(runs, tenants, strict=True):
        if parts:
            print(f"\n{one.label}, by tenant\n" + summary.table([(name or "-", row) for name, row in parts.items()]))
    for label, row in rows:
        for reason, number in row["reasons"].items():
            print(f"{label}: {number} x {reason}")
    result = {
        "url": args.url, "model": model, "seed": args.seed, "trace": str(args.trace) if args.trace else None,
        "slo": {name: value for name, value in args.slo._asdict().items() if value is not None},
        "runs": [
            {"label": one.label, "offered_rate": one.offered or None, "max_concurrency": one.concurrency or None, **row,
             "tenants": parts, "samples": [_plain(sample) for sample in one.samples]}
            for one, (_, row), parts in zip(runs, rows, tenants, strict=True)
        ],
    }  # fmt: skip
    if args.html:
        args.html.write_text(report.page(runs, rows, tenants, args.slo, args.url, model), encoding="utf-8")
        print(f"report: {args.html}")
    return result


def _plain(sample: Sample) -> dict[str, Any]:
    told = {name: value for name, value in vars(sample).items() if name != "token_ids"}
    return {**told, "ttft": sample.ttft, "tpot": sample.tpot}


def _plans(args: argparse.Namespace, tenants: list[str]) -> Sequence[tuple[str, float, int, list[Arrival]]]:
    """(label, offered rate, concurrency, arrivals) of each point."""
    rng = random.Random(args.seed)
    arrivals, has_times = _from_trace(args) if args.trace else ([], False)
    number = args.requests or (len(arrivals) if arrivals else 100)

    def some(rate: float) -> list[Arrival]:
        if not arrivals:
            return load.synthetic(number, rate, args.cv, args.burst, args.prompt_tokens, args.output_tokens, tenants, rng)
        law = load.synthetic(len(arrivals), rate, args.cv, args.burst, args.prompt_tokens, args.output_tokens, [], rng)
        return [arrival._replace(at_s=when.at_s) for arrival, when in zip(arrivals, law, strict=True)]

    if args.concurrency:
        return [(f"{n} at once", 0.0, n, some(1.0)) for n in args.concurrency]
    if args.rate:
        return [(f"{rate:g} req/s", rate, 0, some(rate)) for rate in args.rate]
    if not arrivals:
        raise ValueError("one of --trace, --rate and --concurrency is needed")
    if not has_times:
        raise ValueError(f"{args.trace} holds lengths and no arrivals: add --rate or --concurrency")
    span = max(arrivals[-1].at_s, 1e-9)
    return [(f"trace x{speed:g}", speed * len(arrivals) / span, 0, load.faster(arrivals, speed)) for speed in args.speed]


def _from_trace(args: argparse.Namespace) -> tuple[list[Arrival], bool]:
    name, arrivals = read_trace(args.trace, args.requests)
    return load.fitted(arrivals, args.scale, args.max_prompt, args.max_output), name != "lengths"


async def _run(
    client: Client, model: str, args: argparse.Namespace, label: str, offered: float, concurrency: int, arrivals: list[Arrival]
) -> Run:
    run_id = secrets.token_hex(4)
    samples: list[Sample] = []
    bar = tqdm(
        total=len(arrivals), desc=label, unit="req", delay=QUIET_S, disable=None, file=sys.stderr, leave=False, colour=_colour()
    )
    client.origin = time.perf_counter()

    async def one(index: int, arrival: Arrival) -> None:
        # The prompt is made before the request is due, so that making it is not counted as the server's time.
        body = {
            "model": model, "prompt": load.prompt_tokens(arrival, index, args.seed, args.vocab), "temperature": 0.0,
            "max_tokens": arrival.output_tokens, "ignore_eos": True,
        }  # fmt: skip
        if arrival.tenant:
            body["user"] = arrival.tenant
        sample = Sample(arrival.tenant, arrival.at_s, request_id=f"bench-{run_id}-{index}")
        if not concurrency:
            await asyncio.sleep(max(0.0, arrival.at_s - client.now()))
        else:
            sample.planned = client.now()
        samples.append(await client.complete(sample, body))
        bar.update()

    if not concurrency:
        await _open_loop(client, arrivals, one)
    else:
        queue = iter(enumerate(arrivals))

        async def worker() -> None:
            for index, arrival in queue:
                await one(index, arrival)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    bar.close()
    return Run(label, offered, concurrency, client.now(), sorted(samples, key=lambda sample: sample.planned))


LEAD_S = 1.0  # prompts are made so long before they are due


async def _open_loop(client: Client, arrivals: list[Arrival], one: Callable[[int, Arrival], Any]) -> None:
    """Start each when it is nearly due, however many are still under way: memory holds what runs, not the whole trace."""
    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, arrival.at_s - LEAD_S - client.now()))
            group.create_task(one(index, arrival))


def _colour() -> str | None:
    """NO_COLOR, whatever its value, means none (no-color.org)."""
    return None if os.environ.get("NO_COLOR") else "blue"
